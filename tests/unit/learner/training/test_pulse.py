"""Ranks that watch each other, as objects of one process."""

from collections.abc import Iterator
from datetime import timedelta
from threading import Event, Thread

import pytest
from torch.distributed import TCPStore

from learner.training import pulse as pulses
from learner.training.pulse import Pulse
from protocol.errors import AsyncGdpoError, TrainingError

MEET = timedelta(seconds=10)
TIMEOUT_S = 0.5


@pytest.fixture
def pair(monkeypatch) -> Iterator[list[Pulse]]:
    """Ranks 0 and 1, which beat."""
    monkeypatch.setattr(pulses, "BEAT_S", 0.05)
    monkeypatch.setattr(pulses, "_SOON_S", 0.3)
    monkeypatch.setattr(pulses, "_GRACE_S", 0.1)
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    pair = [Pulse(store, rank, 2, TIMEOUT_S) for rank in range(2)]
    other = Thread(target=pair[1].start, args=(MEET,))
    other.start()
    pair[0].start(MEET)
    other.join()
    yield pair
    for pulse in pair:
        pulse.close()


def test_ranks_that_live_lose_nobody(pair):
    error = RuntimeError("of its own")
    assert pair[0].explain(error) is error
    pair[0].check()
    pair[1].check()


def test_a_rank_that_falls_silent_is_lost_and_named(pair):
    lost, told = Event(), list[AsyncGdpoError]()

    def on_lost(error: AsyncGdpoError) -> None:
        told.append(error)
        lost.set()

    pair[0].when_lost(on_lost)
    pair[1].close()
    assert lost.wait(10)
    with pytest.raises(TrainingError, match=r"^rank 1 of the learner \(process \d+ on .*\) does"):
        pair[0].check()
    assert told == [pair[0].explain(RuntimeError("Connection closed by peer"))]


def test_a_rank_that_failed_leaves_its_cause(pair):
    pair[1].leave_cause(MemoryError("no memory left"))
    explained = pair[0].explain(RuntimeError("Connection closed by peer"))
    assert "failed: no memory left" in str(explained)
    assert isinstance(explained, TrainingError)


def test_a_rank_that_does_not_come_is_named():
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with pytest.raises(TrainingError, match=r"rank 1 of the learner did not come within 0\.1 s"):
        Pulse(store, 0, 3, TIMEOUT_S).start(timedelta(seconds=0.1))
