"""What actors pull: whole chunks and differences, and the thread that answers."""

import itertools
import threading
import time
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from learner.weights import chunks, stream
from learner.weights.chunks import Answer, ChunkSource
from learner.weights.pack import MemoryPool, pack
from learner.weights.snapshots import Snapshot, SnapshotStore
from learner.weights.stream import WeightsStream
from protocol import chunk_codec
from protocol.errors import AsyncGdpoError
from protocol.messages import WeightsChunk, WeightsPull
from protocol.weights import CHUNK_BYTES, layout, total_bytes

SPECS = layout([("w", "bfloat16", (CHUNK_BYTES // 2 + 8,))])
"""A chunk and 16 bytes."""
POOL = MemoryPool(total_bytes(SPECS))


def make_snapshot(version: int) -> Snapshot:
    """Of a random tensor, of which every version sets another number to 0."""
    model = torch.nn.Module()
    values = torch.randn(SPECS[0].shape, generator=torch.Generator().manual_seed(0))
    values[:version] = 0
    model.register_parameter("w", torch.nn.Parameter(values))
    return pack(version, model, SPECS, POOL)


def make_source(*, compress: bool = False) -> ChunkSource:
    return ChunkSource(SnapshotStore(make_snapshot(0)), width=2, compress=compress)


def push(source: ChunkSource, version: int, *, finish: bool = True) -> None:
    before, new = source.snapshots.latest, make_snapshot(version)
    source.snapshots.publish(new)
    source.keep_differences(before, new)
    while finish and source.work():
        pass


def plain(version: int, chunk: int) -> bytes:
    packed = bytes(make_snapshot(version).packed.numpy())
    return packed[chunk * CHUNK_BYTES : (chunk + 1) * CHUNK_BYTES]


def decoded(answer: Answer, base: int | None) -> bytes:
    """As an actor makes bytes of it."""
    chunk = answer.header.chunk
    if answer.header.base is None:
        data = bytearray(answer.plain_bytes)
        chunk_codec.decode_full(answer.header.encoding, answer.payloads[0], data, 2)
    else:
        assert answer.header.base == base
        data = bytearray(plain(answer.header.base, chunk))
        chunk_codec.apply_patches(data, answer.payloads, 2)
    assert chunk_codec.checksum(data) == answer.header.checksum
    return bytes(data)


@pytest.mark.parametrize("compress", [False, True])
def test_a_whole_chunk_is_what_lies_there(compress):
    source = make_source(compress=compress)
    for chunk in (0, 1):
        answer = source.answer(WeightsPull(version=0, chunk=chunk))
        assert decoded(answer, None) == plain(0, chunk)
    sent = source.answer(WeightsPull(version=0, chunk=0))
    assert sent.header.encoding == ("zstd" if compress else "raw")
    assert (len(sent.payloads[0]) < CHUNK_BYTES) == compress


def test_a_version_that_is_gone_and_a_chunk_that_is_none_are_answered_without_bytes():
    source = make_source()
    for pull in (WeightsPull(version=1, chunk=0), WeightsPull(version=0, chunk=2)):
        assert source.answer(pull) == Answer(
            WeightsChunk(version=pull.version, chunk=pull.chunk), (), 0
        )


@settings(max_examples=30, deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=5), st.integers(-1, 6), st.sampled_from([0, 1]))
def test_whatever_was_finished_an_actor_gets_the_right_bytes(finished, base, chunk):
    """Differences may be missing; the answer then is the whole chunk."""
    source = make_source()
    for version, finish in enumerate(finished, start=1):
        push(source, version, finish=finish)
    newest = len(finished)
    answer = source.answer(WeightsPull(version=newest, chunk=chunk, base=max(base, 0)))
    assert decoded(answer, max(base, 0)) == plain(newest, chunk)
    if all(finished[base:-1]) and 0 <= base < newest and chunk == 0:
        assert (answer.header.base, len(answer.payloads)) == (base, newest - base)


def test_a_difference_is_made_once_whoever_asks_for_it(monkeypatch):
    made = []
    encode = chunk_codec.encode_patch

    def counted(*args):
        made.append(1)
        return encode(*args)

    monkeypatch.setattr(chunk_codec, "encode_patch", counted)
    source = make_source()
    push(source, 1, finish=False)
    for _ in range(3):
        source.answer(WeightsPull(version=1, chunk=0, base=0))
    assert len(made) == 1
    while source.work():
        pass
    assert len(made) == 2  # that of the other chunk


def test_finished_differences_keep_no_snapshot():
    source = make_source()
    push(source, 1, finish=False)
    assert source._steps[0].previous is not None
    while source.work():
        pass
    finished: Any = source._steps[0]
    assert (finished.previous, finished.new) == (None, None)


def test_old_differences_go_when_there_are_too_many_or_they_are_too_large(monkeypatch):
    source = make_source()
    for version in range(1, chunks.MAX_STEPS + 4):
        push(source, version)
    assert len(source._steps) == chunks.MAX_STEPS
    oldest = source._steps[0].versions[0]
    newest = source.snapshots.latest.version
    assert source.answer(WeightsPull(version=newest, chunk=0, base=oldest)).header.base == oldest
    # One below has to be pulled in full.
    below = source.answer(WeightsPull(version=newest, chunk=0, base=oldest - 1))
    assert below.header.base is None
    size = source._steps[-1].size
    monkeypatch.setattr(chunks, "MAX_SHARE", 2.5 * size / total_bytes(SPECS))
    push(source, newest + 1)
    assert len(source._steps) == 2


def test_the_newest_differences_stay_however_large_they_are(monkeypatch):
    """They are finished before anybody asks when there is time for it."""
    monkeypatch.setattr(chunks, "MAX_SHARE", 0.0)
    source = make_source()
    for version in (1, 2):
        push(source, version)
        answer = source.answer(WeightsPull(version=version, chunk=0, base=version - 1))
        assert answer.header.base == version - 1
    assert len(source._steps) == 1


# ---- The thread --------------------------------------------------------------------------------


class Slow:
    """A source that says what it was asked, and waits to be let on."""

    def __init__(self) -> None:
        self.turn = threading.Semaphore(0)
        self.worked = 0
        self.fails = False

    def answer(self, pull: WeightsPull) -> Answer:
        assert self.turn.acquire(timeout=5)
        if self.fails:
            raise RuntimeError("broken")
        return Answer(WeightsChunk(version=pull.version, chunk=pull.chunk), (b"123",), 9)

    def work(self) -> bool:
        self.worked += 1
        return self.worked < 3

    def keep_differences(self, previous, new) -> None:
        pass


@pytest.fixture
def served():
    """A stream over a slow source, and the list of what it answered."""
    source = Slow()
    answers: list[tuple[str, int]] = []
    failures: list[Exception] = []
    weights = WeightsStream(source)  # type: ignore[arg-type]
    weights.start(
        lambda session, answer: answers.append((session, answer.header.chunk)), failures.append
    )
    yield source, weights, answers, failures
    for _ in range(200):
        source.turn.release()
    weights.close()


def wait_for(condition) -> None:
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_sessions_take_turns(served):
    source, weights, answers, _ = served
    weights.pull("first", WeightsPull(version=0, chunk=0))
    wait_for(lambda: not weights._waiting)  # it is being answered
    for chunk, session in itertools.product(range(2), ("a", "b")):
        weights.pull(session, WeightsPull(version=0, chunk=chunk))
    for chunk in (2, 3, 4):
        weights.pull("a", WeightsPull(version=0, chunk=chunk))
    for _ in range(8):
        source.turn.release()
    wait_for(lambda: len(answers) == 8)
    assert answers[1:5] == [("a", 0), ("b", 0), ("a", 1), ("b", 1)]
    assert weights.sent_bytes == 8 * 3
    assert weights.plain_bytes == 8 * 9
    assert 0 < weights.share < 1


def test_what_one_session_asks_for_beyond_all_measure_is_dropped(served):
    source, weights, answers, _ = served
    weights.pull("first", WeightsPull(version=0, chunk=0))
    wait_for(lambda: not weights._waiting)
    for chunk in range(stream.MAX_WAITING + 50):
        weights.pull("greedy", WeightsPull(version=0, chunk=chunk))
    weights.pull("modest", WeightsPull(version=0, chunk=0))
    for _ in range(200):
        source.turn.release()
    wait_for(lambda: not weights._waiting and len(answers) >= stream.MAX_WAITING + 2)
    assert len(answers) == stream.MAX_WAITING + 2
    assert answers[2][0] == "modest"


def test_differences_are_made_while_nobody_asks(served):
    source, weights, *_ = served
    weights.keep_differences(None, None)
    wait_for(lambda: source.worked == 3)


def test_a_thread_that_dies_ends_the_run(served):
    source, weights, _, failures = served
    source.fails = True
    source.turn.release()
    weights.pull("a", WeightsPull(version=0, chunk=0))
    wait_for(lambda: bool(failures))
    assert isinstance(failures[0], AsyncGdpoError)
