"""An actor's weights receiver against a learner's chunks, without sockets between them."""

import asyncio
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch

from actors.weights import pull
from actors.weights.broadcast import Collective
from actors.weights.receive_buffer import Superseded
from actors.weights.receiver import WeightsReceiver
from learner.weights.chunks import ChunkSource
from learner.weights.pack import MemoryPool, pack
from learner.weights.snapshots import Snapshot, SnapshotStore
from protocol.errors import EngineError, PeerLost
from protocol.messages import Header, Weights, WeightsChunk, WeightsPull, WeightsReady
from protocol.weights import CHUNK_BYTES, layout, num_chunks, total_bytes
from tests.packed import packed_digests
from transfer.shared_memory import SharedMemory

SPECS = layout([("a", "bfloat16", (CHUNK_BYTES,)), ("b", "bfloat16", (CHUNK_BYTES // 4,))])
"""Two and a half chunks."""
SIZE = total_bytes(SPECS)
CPU = torch.device("cpu")


def make_snapshot(version: int) -> Snapshot:
    """Random numbers; every version changes one number of the first chunk."""
    model = torch.nn.Module()
    generator = torch.Generator().manual_seed(0)
    for spec in SPECS:
        values = torch.randn(spec.shape, generator=generator)
        if spec.name == "a":
            values[:version] = 0
        model.register_parameter(spec.name, torch.nn.Parameter(values))
    return pack(version, model, SPECS, MemoryPool(SIZE))


class Engine:
    """Holds what it was given, in place or as a copy."""

    def __init__(self, in_place: bool) -> None:
        self.in_place, self.pinned = in_place, False
        self.version = -1
        self.held = torch.zeros(0, dtype=torch.uint8)
        self.loads: list[int] = []
        self.damage = 0
        """Loads after which the first byte is wrong."""

    async def load_weights(self, version: int, memory: SharedMemory, specs: Any) -> float:
        self.held = memory.tensor if self.in_place else memory.tensor.clone()
        self.version = version
        self.loads.append(version)
        if self.damage:
            self.damage -= 1
            self.held[0] ^= 1
        return 0.0

    def digests(self, specs: Any) -> bytes | None:
        return None if self.in_place else packed_digests(self.held, specs)


class Learner:
    """Answers pulls on the event loop, and keeps what it was sent."""

    def __init__(self) -> None:
        self.snapshots = SnapshotStore(make_snapshot(0))
        self.source = ChunkSource(self.snapshots, width=2)
        self.receiver: WeightsReceiver | None = None
        self.pulls: list[WeightsPull] = []
        self.ready: list[WeightsReady] = []
        self.sent_bytes = 0
        self.url = "tcp://127.0.0.1:5555"
        self.change: Callable[[WeightsChunk, list[Any]], tuple[WeightsChunk, list[Any]]] = (
            lambda header, payloads: (header, payloads)
        )

    async def send(self, message: Header, payloads: Any = ()) -> None:
        if isinstance(message, WeightsPull):
            self.pulls.append(message)
            answer = self.source.answer(message)
            header, sent = self.change(answer.header, [memoryview(p) for p in answer.payloads])
            self.sent_bytes += sum(payload.nbytes for payload in sent)
            assert self.receiver is not None
            self.receiver.chunk(header, sent)
        if isinstance(message, WeightsReady):
            self.ready.append(message)

    def publish(self, version: int, *, differences: bool = False) -> Snapshot:
        before, snapshot = self.snapshots.latest, make_snapshot(version)
        self.snapshots.publish(snapshot)
        if differences:
            self.source.keep_differences(before, snapshot)
        return snapshot


@pytest.fixture(params=[True, False], ids=["in place", "copied"])
async def actor(request):
    """A learner, an engine, and `follow(offer)` which returns when the actor has answered."""
    learner, engine = Learner(), Engine(request.param)
    receiver = WeightsReceiver(learner, engine, SPECS, 1.0, CPU)  # type: ignore[arg-type]
    learner.receiver = receiver
    running = asyncio.create_task(receiver.run())

    async def follow(offer: Weights, digests: bytes) -> WeightsReady:
        told = len(learner.ready)
        receiver.announce(offer, [memoryview(digests)])
        while len(learner.ready) == told and not running.done():
            await asyncio.sleep(0.001)
        if running.done():
            await running
        return learner.ready[-1]

    yield SimpleNamespace(
        learner=learner, engine=engine, receiver=receiver, follow=follow, running=running
    )
    running.cancel()


def offer_of(snapshot: Snapshot) -> tuple[Weights, bytes]:
    return snapshot.announcement("stream"), snapshot.digests


async def test_a_new_actor_pulls_every_chunk_once(actor):
    snapshot = actor.learner.snapshots.latest
    ready = await actor.follow(*offer_of(snapshot))
    assert (ready.version, ready.digest, ready.route) == (0, snapshot.digest, "stream")
    assert torch.equal(actor.engine.held, snapshot.packed)
    assert sorted(pull.chunk for pull in actor.learner.pulls) == list(range(num_chunks(SIZE)))


async def test_who_has_the_version_before_gets_only_the_differences(actor):
    await actor.follow(*offer_of(actor.learner.snapshots.latest))
    actor.learner.sent_bytes = 0
    for version in (1, 2, 3):
        snapshot = actor.learner.publish(version, differences=True)
        await actor.follow(*offer_of(snapshot))
        assert torch.equal(actor.engine.held, snapshot.packed)
    assert actor.engine.loads == [0, 1, 2, 3]
    assert 0 < actor.learner.sent_bytes < SIZE / 100


async def test_differences_of_several_versions_add_up(actor):
    await actor.follow(*offer_of(actor.learner.snapshots.latest))
    actor.learner.sent_bytes = 0
    for version in (1, 2, 3):
        snapshot = actor.learner.publish(version, differences=True)
        while actor.learner.source.work():
            pass
    await actor.follow(*offer_of(snapshot))
    assert torch.equal(actor.engine.held, snapshot.packed)
    assert 0 < actor.learner.sent_bytes < SIZE / 100


async def test_a_difference_to_damaged_bytes_is_followed_by_the_whole_chunk(actor):
    await actor.follow(*offer_of(actor.learner.snapshots.latest))
    actor.receiver._loaded.memory.tensor[CHUNK_BYTES + 7] ^= 255
    snapshot = actor.learner.publish(1, differences=True)
    actor.learner.pulls.clear()
    await actor.follow(*offer_of(snapshot))
    assert torch.equal(actor.engine.held, snapshot.packed)
    asked = [(pull.chunk, pull.base) for pull in actor.learner.pulls]
    assert (1, 0) in asked and (1, None) in asked and (0, None) not in asked


async def test_a_chunk_that_always_comes_damaged_ends_the_actor(actor):
    def damage(header, payloads):
        return header, [memoryview(bytes(len(payload))) for payload in payloads]

    actor.learner.change = damage
    with pytest.raises(ExceptionGroup) as error:
        await actor.follow(*offer_of(actor.learner.snapshots.latest))
    assert error.group_contains(PeerLost, match="always comes damaged")
    assert actor.engine.loads == []


async def test_a_version_that_goes_while_it_is_pulled_is_not_loaded(actor):
    first = actor.learner.snapshots.latest
    actor.learner.publish(1)
    actor.receiver.announce(first.announcement("stream"), [memoryview(first.digests)])
    await asyncio.sleep(0.05)
    assert (actor.engine.loads, actor.learner.ready) == ([], [])
    ready = await actor.follow(*offer_of(actor.learner.snapshots.latest))
    assert ready.version == 1


async def test_what_was_pulled_of_a_version_before_it_went_is_used_again(actor):
    """The newer version differs in the first chunk only."""
    first = actor.learner.snapshots.latest
    held_back = asyncio.Event()
    actor.learner.change = lambda header, payloads: (
        (header, payloads) if header.chunk > 0 else (held_back.set() or header, [])  # type: ignore[func-returns-value]
    )
    actor.receiver.announce(first.announcement("stream"), [memoryview(first.digests)])
    await held_back.wait()
    await asyncio.sleep(0.05)
    actor.learner.change = lambda header, payloads: (header, payloads)
    second = actor.learner.publish(1, differences=True)
    actor.learner.sent_bytes = 0
    await actor.follow(*offer_of(second))
    assert torch.equal(actor.engine.held, second.packed)
    assert actor.learner.sent_bytes < 1.1 * CHUNK_BYTES


async def test_on_a_slow_link_no_chunk_is_asked_for_twice(actor, monkeypatch):
    """The last chunk waits behind the others for longer than the link may be silent."""
    monkeypatch.setattr(pull, "PULL_RETRY_S", 0.2)
    answer_at, receive, loop = time.monotonic(), actor.receiver.chunk, asyncio.get_running_loop()

    def late(header: WeightsChunk, payloads: list[memoryview]) -> None:
        nonlocal answer_at
        answer_at = max(answer_at, time.monotonic()) + 0.15
        loop.call_later(answer_at - time.monotonic(), receive, header, payloads)

    monkeypatch.setattr(actor.receiver, "chunk", late)
    await actor.follow(*offer_of(actor.learner.snapshots.latest))
    assert sorted(request.chunk for request in actor.learner.pulls) == [0, 1, 2]


async def test_a_request_that_was_lost_is_made_again(actor, monkeypatch):
    monkeypatch.setattr(pull, "PULL_RETRY_S", 0.05)
    receive, lost = actor.receiver.chunk, [1, 1]

    def lose(header: WeightsChunk, payloads: list[memoryview]) -> None:
        if header.chunk in lost:
            lost.remove(header.chunk)
        else:
            receive(header, payloads)

    monkeypatch.setattr(actor.receiver, "chunk", lose)
    snapshot = actor.learner.snapshots.latest
    assert (await actor.follow(*offer_of(snapshot))).digest == snapshot.digest
    assert sorted(request.chunk for request in actor.learner.pulls) == [0, 1, 1, 1, 2]


async def test_shared_memory_is_read_and_checked(actor):
    snapshot = actor.learner.snapshots.latest
    ready = await actor.follow(snapshot.announcement("shared"), snapshot.digests)
    assert (ready.route, ready.digest, actor.learner.pulls) == ("shared", snapshot.digest, [])
    assert torch.equal(actor.engine.held, snapshot.packed)


async def test_shared_memory_that_is_not_there_is_no_obstacle(actor):
    snapshot = actor.learner.snapshots.latest
    weights = Weights(
        version=0, num_bytes=SIZE, digest=snapshot.digest, shared="/proc/999999999/fd/3"
    )
    ready = await actor.follow(weights, snapshot.digests)
    assert (ready.route, ready.digest) == ("stream", snapshot.digest)


async def test_a_tensor_that_was_replaced_in_shared_memory_is_pulled(actor):
    """Only that tensor's chunks."""
    snapshot = actor.learner.snapshots.latest
    other = make_snapshot(0)
    other.packed[SPECS[1].offset] ^= 1
    weights = Weights(version=0, num_bytes=SIZE, digest=snapshot.digest, shared=other.path)
    ready = await actor.follow(weights, snapshot.digests)
    assert ready.digest == snapshot.digest
    assert [pull.chunk for pull in actor.learner.pulls] == [2]


@pytest.mark.parametrize("actor", [False], ids=["copied"], indirect=True)
async def test_an_engine_that_holds_something_else_is_fed_again_in_full(actor):
    snapshot = actor.learner.snapshots.latest
    actor.engine.damage = 1
    ready = await actor.follow(*offer_of(snapshot))
    assert ready.digest != snapshot.digest
    actor.learner.pulls.clear()
    ready = await actor.follow(*offer_of(snapshot))
    assert ready.digest == snapshot.digest
    assert [pull.base for pull in actor.learner.pulls] == [None] * num_chunks(SIZE)


async def test_a_version_that_is_held_already_is_confirmed_without_another_byte(actor):
    snapshot = actor.learner.snapshots.latest
    first = await actor.follow(*offer_of(snapshot))
    actor.learner.pulls.clear()
    assert await actor.follow(*offer_of(snapshot)) == first
    assert (actor.learner.pulls, actor.engine.loads) == ([], [0])


async def test_a_broadcast_is_joined_even_for_a_version_that_is_held_already(actor, monkeypatch):
    """The others wait for every member."""
    snapshot = actor.learner.snapshots.latest
    first = await actor.follow(*offer_of(snapshot))
    joined = []

    def receive(self, offer, turn):
        joined.append(offer.epoch)
        turn.write(0, snapshot.packed)

    monkeypatch.setattr(Collective, "receive", receive)
    offer = msgspec.structs.replace(
        snapshot.announcement("collective"), epoch=4, rank=1, world_size=2
    )
    again = await actor.follow(offer, snapshot.digests)
    assert (joined, again.route, again.digest) == ([4], "collective", first.digest)


async def test_a_newer_offer_interrupts_a_broadcast_that_hangs_and_its_late_bytes_change_nothing(
    actor, monkeypatch
):
    old, late = actor.learner.snapshots.latest, []
    begun = threading.Event()

    def receive(self, offer, turn):
        late.append((turn, turn.lend(0, CHUNK_BYTES)))
        begun.set()
        time.sleep(2)

    monkeypatch.setattr(Collective, "receive", receive)
    hanging = msgspec.structs.replace(old.announcement("collective"), epoch=1)
    actor.receiver.announce(hanging, [memoryview(old.digests)])
    while not begun.is_set():
        await asyncio.sleep(0.001)
    new = actor.learner.publish(1)
    started = time.monotonic()
    ready = await actor.follow(*offer_of(new))
    assert time.monotonic() - started < 1
    [(turn, bucket)] = late
    bucket.zero_()
    with pytest.raises(Superseded):
        turn.filled(0, CHUNK_BYTES)
    assert (ready.version, torch.equal(actor.engine.held, new.packed)) == (1, True)


@pytest.mark.parametrize("order", [(2, 1), (1, 2, 1), (2, 1, 2)])
async def test_an_older_offer_that_comes_later_changes_nothing(actor, order):
    """Even if the version that is being taken is offered once more behind it."""
    await actor.follow(*offer_of(actor.learner.snapshots.latest))
    offers = {version: actor.learner.publish(version) for version in (1, 2)}
    told = len(actor.learner.ready)
    for version in order:
        snapshot = offers[version]
        actor.receiver.announce(snapshot.announcement("stream"), [memoryview(snapshot.digests)])
        await asyncio.sleep(0)
    deadline = time.monotonic() + 5
    while len(actor.learner.ready) == told and time.monotonic() < deadline:
        await asyncio.sleep(0.001)
    assert actor.engine.version == 2


async def test_being_cancelled_while_the_engine_loads_ends_the_receiver(actor, monkeypatch):
    loading = asyncio.Event()

    async def load(*_):
        loading.set()
        await asyncio.sleep(30)

    monkeypatch.setattr(actor.engine, "load_weights", load)
    snapshot = actor.learner.snapshots.latest
    actor.receiver.announce(snapshot.announcement("stream"), [memoryview(snapshot.digests)])
    await loading.wait()
    actor.running.cancel()
    done, _ = await asyncio.wait({actor.running}, timeout=2)
    assert done


async def test_what_is_being_loaded_is_known_from_the_last_byte_to_the_confirmation(
    actor, monkeypatch
):
    """Not while bytes arrive, which the learner sees by itself."""
    seen = []

    def note(owner, name):
        original = getattr(owner, name)

        async def noted(*arguments):
            seen.append((name, actor.receiver.loading))
            return await original(*arguments)

        monkeypatch.setattr(owner, name, noted)

    note(actor.receiver, "_receive")
    note(actor.receiver, "_intact")
    note(actor.engine, "load_weights")
    for version in (1, 2):
        await actor.follow(*offer_of(actor.learner.publish(version)))
        assert seen == [("_receive", -1), ("_intact", version), ("load_weights", version)]
        assert actor.receiver.loading == -1
        seen.clear()


async def test_after_a_resume_an_older_version_is_taken_and_nothing_before_it_counts(actor):
    await actor.follow(*offer_of(actor.learner.publish(5)))
    resumed = make_snapshot(3)
    actor.learner.snapshots.publish(resumed)
    actor.learner.pulls.clear()
    actor.receiver.start_over()
    ready = await actor.follow(*offer_of(resumed))
    assert (ready.version, ready.digest) == (3, resumed.digest)
    assert [pull.base for pull in actor.learner.pulls] == [None] * num_chunks(SIZE)


@pytest.mark.parametrize("digests", [b"", bytes(16), bytes(32)])
async def test_an_announcement_that_contradicts_itself_ends_the_actor(actor, digests):
    snapshot = actor.learner.snapshots.latest
    with pytest.raises(EngineError, match="digests of version 0"):
        await actor.follow(snapshot.announcement("stream"), digests)
