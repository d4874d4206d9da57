"""Backends of collectives, as far as one process can tell; several are in tests/integration."""

import os
import socket
import threading
import time
from datetime import timedelta
from typing import ClassVar

import pytest
import torch

from protocol.errors import CollectiveError, ConfigError
from transfer import backends, collective
from transfer.backends import create_backend, gpu_identity, nccl_available
from transfer.collective import GRACE_S, host_store, join_store, within
from transfer.nccl import INTERFACE, NCCL_DEFAULTS, WATCHDOG_OFF, NcclBackend

CPU = torch.device("cpu")
GPU = torch.device("cuda", 0)
LOOPBACK = "127.0.0.1"
NOBODYS = "203.0.113.1"
"""Of a block that is reserved for documentation."""
QUICK_S = 0.3
PATIENCE_S = 10.0
SLACK_S = 0.5


def gloo():
    return create_backend("gloo", own_address=LOOPBACK, device=CPU)


# --- stores and meetings --------------------------------------------------------------------------


def test_a_store_listens_only_on_an_address_of_this_machine():
    with pytest.raises(ConfigError, match=r"cannot listen on 203\.0\.113\.1.*weights\.address"):
        host_store(NOBODYS, PATIENCE_S)


def test_a_store_that_never_answers_is_given_up_at_the_deadline():
    """As that of a frozen learner: the kernel accepts, and torch would wait for ever."""
    with socket.create_server((LOOPBACK, 0)) as mute:
        started = time.monotonic()
        with pytest.raises(CollectiveError, match=r"nobody answered in 0\.3 s"):
            join_store(LOOPBACK, mute.getsockname()[1], QUICK_S)
        assert time.monotonic() - started < QUICK_S + GRACE_S + SLACK_S


def test_a_store_that_is_gone_is_given_up_at_the_deadline():
    with socket.create_server((LOOPBACK, 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(CollectiveError, match=f"the store at {LOOPBACK}:{port}"):
        join_store(LOOPBACK, port, QUICK_S)


def test_an_abandoned_meeting_does_not_hold_up_the_next():
    """Torch's store serves one call at a time, also while that call waits."""
    store, port = host_store(LOOPBACK, PATIENCE_S)
    failures = []

    def alone() -> None:
        try:
            gloo().meet(store, 1, 0, 2, timeout_s=2.0)
        except CollectiveError as error:
            failures.append(error)

    def actor() -> None:
        group = gloo().meet(join_store(LOOPBACK, port, PATIENCE_S), 2, 1, 2, PATIENCE_S)
        group.broadcast(torch.zeros(1, dtype=torch.uint8))

    abandoned, joining = threading.Thread(target=alone), threading.Thread(target=actor)
    abandoned.start()
    time.sleep(QUICK_S)
    joining.start()
    group = gloo().meet(store, 2, 0, 2, PATIENCE_S)
    group.broadcast(torch.ones(1, dtype=torch.uint8))
    assert abandoned.is_alive()
    abandoned.join()
    joining.join()
    assert "rank 1 of 2 did not come" in str(failures[0])


def test_an_epoch_that_was_ended_takes_no_more_buckets():
    store, _ = host_store(LOOPBACK, PATIENCE_S)
    group = gloo().meet(store, 1, 0, 1, PATIENCE_S)
    group.broadcast(torch.zeros(1, dtype=torch.uint8))
    group.abort()
    with pytest.raises(CollectiveError, match="the epoch is over"):
        group.broadcast(torch.zeros(1, dtype=torch.uint8))


@pytest.mark.parametrize(("rank", "world_size"), [(-1, 2), (2, 2), (0, 0)])
def test_a_rank_that_cannot_be_is_refused(rank: int, world_size: int):
    store, _ = host_store(LOOPBACK, PATIENCE_S)
    with pytest.raises(CollectiveError, match=f"rank {rank} of {world_size}"):
        gloo().meet(store, 1, rank, world_size, PATIENCE_S)


def test_what_comes_too_late_is_discarded(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(collective, "GRACE_S", 0.0)
    discarded = []
    done = threading.Event()

    def late() -> str:
        done.wait(PATIENCE_S)
        return "late"

    with pytest.raises(CollectiveError, match="somebody: nobody answered"):
        within(QUICK_S, "somebody", late, discarded.append)
    assert discarded == []
    done.set()
    wait_until(lambda: discarded == ["late"])


def test_a_bug_stays_a_bug():
    def broken() -> None:
        raise TypeError("a bug")

    with pytest.raises(TypeError, match="a bug"):
        within(QUICK_S, "somebody", broken)


# --- which backend --------------------------------------------------------------------------------


def test_gloo_works_in_cpu_memory_whatever_the_device():
    backend = create_backend("gloo", own_address=LOOPBACK, device=GPU)
    assert backend.name == "gloo"
    assert backend.device == CPU


@pytest.mark.skipif(torch.distributed.is_nccl_available(), reason="this torch has NCCL")
def test_nccl_without_a_torch_that_has_it_is_the_users_error():
    with pytest.raises(ConfigError, match=r'weights\.backend = "nccl".*CUDA build.*"gloo"'):
        create_backend("nccl", own_address=LOOPBACK, device=GPU)
    assert not nccl_available()


def test_nccl_without_a_gpu_is_the_users_error(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(backends, "is_nccl_available", lambda: True)
    with pytest.raises(ConfigError, match=r'needs a GPU.*has cpu.*"gloo"'):
        create_backend("nccl", own_address=LOOPBACK, device=CPU)


def test_a_cpu_has_no_identity():
    assert gpu_identity(CPU) == ""


# --- NCCL, over a communicator that is none -------------------------------------------------------


class Work:
    def __init__(self, communicator: "Communicator") -> None:
        self._communicator = communicator

    def wait(self, timeout: timedelta) -> None:
        self._communicator.waiting(timeout)


class Communicator:
    """In the place of torch's ProcessGroupNCCL."""

    class Options:
        def __init__(self) -> None:
            self.config = type("Config", (), {"blocking": -1})()
            self._timeout = timedelta(0)

    made: ClassVar["list[Communicator]"] = []

    def __init__(self, store: object, rank: int, size: int, options: Options) -> None:
        self.options = options
        self.watchdog_off = os.environ[WATCHDOG_OFF]
        self.buckets: list[torch.Tensor] = []
        self.waiting = lambda timeout: None
        self.aborted = threading.Event()
        self.may_abort = threading.Event()
        self.made.append(self)

    def broadcast(self, bucket: torch.Tensor, root: int, timeout: timedelta) -> Work:
        self.buckets.append(bucket)
        return Work(self)

    def abort(self) -> None:
        self.may_abort.wait(PATIENCE_S)
        assert not self.aborted.is_set()
        self.aborted.set()


@pytest.fixture
def communicators(monkeypatch: pytest.MonkeyPatch) -> list[Communicator]:
    monkeypatch.setattr(Communicator, "made", [])
    distributed = torch.distributed.distributed_c10d
    monkeypatch.setattr(distributed, "ProcessGroupNCCL", Communicator, raising=False)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    for variable in (INTERFACE, *NCCL_DEFAULTS):
        # Setting it first makes pytest restore it.
        monkeypatch.setenv(variable, "")
        monkeypatch.delenv(variable)
    return Communicator.made


def meet_alone():
    store, _ = host_store(LOOPBACK, PATIENCE_S)
    return NcclBackend(LOOPBACK, CPU).meet(store, 1, 0, 1, PATIENCE_S)


def wait_until(condition) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_communicator_can_be_aborted_and_has_no_watchdog(communicators: list[Communicator]):
    meet_alone()
    (communicator,) = communicators
    assert communicator.options.config.blocking == 0
    assert communicator.options._timeout == timedelta(seconds=PATIENCE_S)
    assert communicator.watchdog_off == "1"
    # Those of others have theirs.
    assert os.environ[WATCHDOG_OFF] == "0"


@pytest.mark.parametrize("setting", ["0", "1"])
def test_the_users_own_settings_of_nccl_stay(communicators, monkeypatch, setting: str):
    monkeypatch.setenv(WATCHDOG_OFF, setting)
    monkeypatch.setenv(INTERFACE, "ib0")
    meet_alone()
    assert os.environ[WATCHDOG_OFF] == setting
    assert os.environ[INTERFACE] == "ib0"


def test_nccl_listens_on_the_interface_of_the_address(communicators: list[Communicator]):
    meet_alone()
    assert os.environ[INTERFACE] == "=lo"


def test_an_address_of_no_interface_is_the_users_error(communicators: list[Communicator]):
    with pytest.raises(ConfigError, match=INTERFACE):
        NcclBackend(NOBODYS, CPU)


def test_members_have_met_when_a_first_broadcast_went_through(communicators: list[Communicator]):
    meet_alone()
    assert [len(bucket) for bucket in communicators[0].buckets] == [1]


def test_a_broadcast_that_fails_aborts_the_communicator_once(communicators: list[Communicator]):
    group = meet_alone()
    (communicator,) = communicators

    def fail(timeout: timedelta) -> None:
        raise RuntimeError("timed out in blocking wait")

    communicator.waiting = fail
    bucket = torch.zeros(8, dtype=torch.uint8)
    started = time.monotonic()
    with pytest.raises(CollectiveError, match="timed out in blocking wait"):
        group.broadcast(bucket)
    with pytest.raises(CollectiveError, match="over"):
        group.broadcast(bucket)
    group.abort()
    # NCCL takes its time to abort; nobody waits for it.
    assert time.monotonic() - started < SLACK_S
    assert len(communicator.buckets) == 2
    communicator.may_abort.set()
    assert communicator.aborted.wait(PATIENCE_S)


def test_what_an_abort_leaves_is_not_taken_for_a_broadcast(communicators: list[Communicator]):
    """Aborted kernels have ended, which is all that torch looks at."""
    group = meet_alone()
    (communicator,) = communicators
    communicator.waiting = lambda timeout: group.abort()
    with pytest.raises(CollectiveError, match="aborted"):
        group.broadcast(torch.zeros(8, dtype=torch.uint8))
    communicator.may_abort.set()
    assert communicator.aborted.wait(PATIENCE_S)


@pytest.mark.parametrize("stuck_in", ["call", "wait"])
def test_what_nccl_does_not_return_from_is_left_and_aborted_at_the_deadline(
    communicators: list[Communicator], monkeypatch: pytest.MonkeyPatch, stuck_in: str
):
    monkeypatch.setattr(collective, "GRACE_S", 0.0)
    store, _ = host_store(LOOPBACK, PATIENCE_S)
    group = NcclBackend(LOOPBACK, CPU).meet(store, 1, 0, 1, QUICK_S)
    (communicator,) = communicators
    communicator.may_abort.set()
    stays = threading.Event()

    def stuck(*_: object) -> None:
        stays.wait(PATIENCE_S)

    monkeypatch.setattr(communicator, {"call": "broadcast", "wait": "waiting"}[stuck_in], stuck)
    started = time.monotonic()
    with pytest.raises(CollectiveError, match="a bucket: nobody answered"):
        group.broadcast(torch.zeros(8, dtype=torch.uint8))
    assert time.monotonic() - started < QUICK_S + SLACK_S
    assert communicator.aborted.wait(PATIENCE_S)
    stays.set()
