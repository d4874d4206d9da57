"""Hundreds of thousands of hostile messages: nothing but `BadMessage`, no growth, and it goes on.

`make fuzz` runs for longer. ``--fuzz-seed`` repeats a run; what fails shows the frames.
"""

import gc
import logging
import math
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from actors.engines.model_files import write_model_files
from learner.run.throughput import Throughput
from protocol.config import ActorConfig
from protocol.errors import BadMessage, TrainingError
from protocol.framing import decode_to_actor, encode
from protocol.groups import Group
from protocol.messages import PROTOCOL_VERSION, Ack, Failed, Header, Hello, Welcome
from protocol.weights import layout
from tests.unit.factories import REWARDS, VOCAB, Cluster, make_config, make_snapshot
from tests.unit.mutants import Frames, Mutants, pack_tree
from tests.unit.wire_examples import EXAMPLES, FRAMES, name_of

SHARES = {"whole messages": 0.6, "groups": 0.15, "to an actor": 0.25}
"""Of --fuzz-frames."""
PARTS = 4
"""Each share is sent in so many tests, so that none takes long on a busy machine."""
ROUND = 500
"""Mutants between two looks at the books."""
MAX_GROWTH_BYTES = 512 << 10
TO_LEARNER = [name for name in FRAMES if name in ("hello", "group", "failed", "status")] + [
    "weights_pull",
    "weights_ready",
    "goodbye",
]
SESSIONS = ("a", "b", "c")


@pytest.fixture(params=range(PARTS))
def fuzz(request: pytest.FixtureRequest) -> Callable[[str], tuple[int, Random]]:
    """Number of frames for a share of them, and its random numbers; both are printed."""

    def start(share: str) -> tuple[int, Random]:
        chosen = request.config.getoption("--fuzz-seed")
        seed = Random().getrandbits(32) if chosen == "random" else int(chosen)
        num_frames = int(request.config.getoption("--fuzz-frames") * SHARES[share] / PARTS)
        print(f"\n{share}, part {request.param}: {num_frames} frames, --fuzz-seed {seed}")
        return num_frames, Random(f"{seed}/{request.param}")

    return start


class HonestLog(logging.Handler):
    """Every line of the log is one printable line, whatever peers wrote into it."""

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        assert text.isprintable(), repr(text)
        assert len(text) < 2000, text


@contextmanager
def honest_log() -> Iterator[None]:
    """In place of all other handlers: captured records would be kept, and count as growth."""
    log = logging.getLogger("learner")
    before = log.handlers, log.propagate, log.level
    log.handlers, log.propagate = [HonestLog()], False
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.handlers, log.propagate = before[:2]
        log.setLevel(before[2])


@pytest.fixture(autouse=True)
def _short_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is bounded is full after the warm-up, so that all later growth is a leak."""
    monkeypatch.setattr("protocol.leases._REMEMBERED_FAILURES", 200)
    monkeypatch.setattr("learner.weights.snapshots._REMEMBERED_DIGESTS", 50)
    monkeypatch.setattr("learner.run.throughput._REMEMBERED_ACTORS", 50)
    # Most of the time would go into these otherwise.
    monkeypatch.setattr("tests.unit.factories.make_snapshot", lru_cache(maxsize=8)(make_snapshot))


def run(num_frames: int, one: Callable[[], None], after_round: Callable[[], None]) -> None:
    """Mutants in rounds; memory is traced, which takes its time, over the last quarter."""
    rounds = max(5, math.ceil(num_frames / ROUND))
    traced = max(4, rounds // 4)
    started = time.perf_counter()
    with honest_log():
        for number in range(rounds):
            if number == rounds - traced:
                gc.collect()
                tracemalloc.start()
            for _ in range(ROUND):
                one()
            after_round()
    gc.collect()
    grown, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    seconds = time.perf_counter() - started
    print(f"{rounds * ROUND / seconds:.0f} frames/s, memory grew by {grown / 1024:.0f} KiB")
    assert grown < MAX_GROWTH_BYTES


@contextmanager
def shown(frames: Frames) -> Iterator[None]:
    """Whatever comes out of it but `BadMessage` is a bug, and these frames are its proof."""
    try:
        yield
    except Exception as error:
        error.add_note(f"frames: {[frame[:500] for frame in frames]!r}")
        raise


class Learner:
    """A coordinator with actors that are partly hostile, and what must hold between messages."""

    def __init__(self) -> None:
        self.cluster = Cluster(make_config(training={"steps": 10**9}, admission={"max_actors": 8}))
        self.progress = Throughput(self.cluster.coordinator, self.cluster.clock)
        self.num_accepted = 0
        add = self.cluster.buffer.add

        def checked_add(group: Group, prompt_index: int) -> None:
            self.num_accepted += 1
            assert_valid(group, self.cluster.version)
            add(group, prompt_index)

        self.cluster.buffer.add = checked_add  # type: ignore[method-assign]
        self.cluster.open_training()
        self.go_on()

    def receive(self, session: str, frames: Frames) -> None:
        with shown(frames):
            self.cluster.receive(session, frames)

    def lease_of(self, session: str) -> int:
        held = self.cluster.coordinator.leases.held_by(session)
        return held[0].number if held else 1

    def lease_for(self, session: str) -> int:
        """A lease that it holds: without one no mutant of a group comes far."""
        cluster = self.cluster
        if not cluster.coordinator.leases.held_by(session):
            cluster.train()
            cluster.join(session)
            cluster.coordinator.tick()
        return self.lease_of(session)

    def go_on(self) -> None:
        """Good messages work, whatever came before; the books balance, nothing waits unsent."""
        cluster, coordinator = self.cluster, self.cluster.coordinator
        for actor in coordinator.actors():
            if actor.session not in SESSIONS:
                coordinator.unreachable(actor.session)
        for session in SESSIONS:
            # Whatever it said, it begins anew; its leases go to others.
            cluster.join(session)
        while cluster.train():
            pass
        for session in SESSIONS:
            cluster.weights_ready(session, cluster.version)
        cluster.pass_time(0.1)
        for session in SESSIONS:
            for kind in (Ack, Header):
                cluster.heard(session, kind)
        held = [h for s in SESSIONS for h in coordinator.leases.held_by(s)]
        assert held
        assert cluster.finish(held[0].holder, held[0].number).verdict == "accepted"
        self._check()
        self._forget()

    def _check(self) -> None:
        coordinator = self.cluster.coordinator
        books = coordinator.leases.counts
        assert all(book.balanced and book.outstanding >= 0 for book in books.values())
        assert self.cluster.buffer.counts.balanced
        assert books["train"].received == self.cluster.buffer.counts.accepted == self.num_accepted
        assert coordinator.num_live == len(SESSIONS)
        for actor in coordinator.actors():
            assert actor.num_leases == len(coordinator.leases.held_by(actor.session))
        # From actors that all send nothing but nonsense the run ends, and in no other way.
        assert coordinator.failure is None or isinstance(coordinator.failure, TrainingError)
        rates = self.progress.sample()
        assert all(
            math.isfinite(rate) for rate in (rates.actor_idle_share, rates.actors_wanted or 0)
        )
        assert len(coordinator.outbox) < 100

    def _forget(self) -> None:
        """What a run of this length keeps, or the factories do."""
        self.cluster.forget_messages()
        self.progress.restart()


def assert_valid(group: Group, version: int) -> None:
    """What the trainer relies on, said once more and in other words than `unpack_group`."""
    assert group.reward_names == REWARDS
    assert group.scores.shape == (2, 2)
    assert not np.isinf(group.scores).any()
    assert 1 <= len(group.prompt_tokens) <= 8
    assert len(group.rollouts) == 2
    for rollout in group.rollouts:
        assert 1 <= len(rollout.tokens) == len(rollout.logprobs) <= 8
        assert set(rollout.tokens.tolist()) <= set(range(VOCAB))
        assert all(-math.inf < logprob <= 0 for logprob in rollout.logprobs.tolist())
        starts, versions = zip(*rollout.spans, strict=True)
        assert starts[0] == 0
        assert list(starts) == sorted({*starts})
        assert starts[-1] < len(rollout.tokens)
        assert list(versions) == sorted({*versions})
        assert 0 <= versions[0] <= versions[-1] <= version
        assert rollout.finish in ("stop", "length")
    assert set(group.prompt_tokens.tolist()) <= set(range(VOCAB))


# ---- The learner -------------------------------------------------------------------------------


def test_no_mutant_of_any_message_harms_the_learner(fuzz):
    num_frames, random = fuzz("whole messages")
    learner = Learner()
    mutants = Mutants(random, [FRAMES[name] for name in (*FRAMES, *TO_LEARNER, *TO_LEARNER)])

    def one() -> None:
        session = random.choice((*SESSIONS, *SESSIONS, f"s{random.randrange(1000)}", "\xff\n"))
        frames = None
        if random.random() < 0.2:
            lease = learner.lease_of(session)
            frames = random.choice(
                (
                    encode(*learner.cluster.group_message(lease)),
                    encode(Failed(lease=lease, kind="prompt", cause="x\n")),
                    encode(Hello(protocol=PROTOCOL_VERSION, session=session)),
                )
            )
        learner.receive(session, mutants.next(frames))

    run(num_frames, one, learner.go_on)
    assert learner.cluster.coordinator.counters.bad_messages > num_frames / 2


def test_no_mutant_of_a_group_is_trained_on_unless_it_is_valid(fuzz):
    num_frames, random = fuzz("groups")
    learner = Learner()
    mutants = Mutants(random, [FRAMES["group"]])

    def one() -> None:
        session = random.choice(SESSIONS)
        frames = encode(*learner.cluster.group_message(learner.lease_for(session)))
        change = mutants.valid_header if random.random() < 0.8 else mutants.next
        learner.receive(session, change(frames))

    run(num_frames, one, learner.go_on)
    verdicts = learner.cluster.coordinator.counters.verdicts
    print(f"verdicts: {dict(verdicts)}")
    # Otherwise the mutants would all die at the access.
    assert verdicts["rejected"] > num_frames / 4
    assert learner.num_accepted > num_frames / 20


# ---- The actor ---------------------------------------------------------------------------------


def test_no_mutant_of_any_message_harms_an_actor(fuzz, tmp_path):
    num_frames, random = fuzz("to an actor")
    names = [name for name in FRAMES if name not in TO_LEARNER]
    mutants = Mutants(random, [FRAMES[name] for name in names])
    welcomed, folder = 0, tmp_path / "model"
    folder.mkdir()

    def one() -> None:
        nonlocal welcomed
        frames = mutants.next()
        with shown(frames):
            try:
                message, payloads = decode_to_actor(frames)
            except BadMessage as error:
                assert str(error).isprintable()
                assert len(str(error)) < 2000
                return
            if isinstance(message, Welcome):
                welcomed += 1
                take_welcome(message, payloads)

    def take_welcome(welcome: Welcome, payloads: list[memoryview]) -> None:
        with suppress(BadMessage):
            write_model_files(folder, welcome.files, payloads)
        # `Actor` makes one line of these.
        with suppress(ValueError):
            layout(welcome.manifest)
        with suppress(ValidationError):
            ActorConfig.model_validate(welcome.actor)

    def after_round() -> None:
        for name in names:
            decode_to_actor(FRAMES[name])
        assert [*tmp_path.iterdir()] == [folder]
        assert all(path.suffix == ".json" for path in folder.iterdir())

    run(num_frames, one, after_round)
    assert welcomed > 0


# ---- Trees -------------------------------------------------------------------------------------

LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=10)
    | st.binary(max_size=10)
)
TREES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(max_size=5) | LEAVES, inner, max_size=3)
    ),
    max_leaves=10,
)


@st.composite
def headers(draw: st.DrawFn) -> dict[str, Any]:
    """The keys of a message with any values."""
    example = draw(st.sampled_from([e for e in EXAMPLES if name_of(e) in TO_LEARNER]))
    fields = {name: draw(TREES) for name in example.__struct_fields__ if draw(st.booleans())}
    good = {name: getattr(example, name) for name in example.__struct_fields__}
    return {"type": name_of(example), **good, **fields}


def test_headers_with_the_right_keys_and_any_values_harm_nobody():
    learner = Learner()

    @settings(max_examples=300, deadline=None)
    @given(headers())
    def send(tree):
        learner.receive("a", [pack_tree(tree)])

    with honest_log():
        send()
    learner.go_on()
