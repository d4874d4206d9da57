"""Broadcasts of weights within one epoch: what all backends have in common.

    learner  host_store ─┐                              ┌─ broadcast, bucket by bucket
                         ├─► Backend.meet(epoch, rank) ─┤
    actors   join_store ─┘                              └─ abort, when the epoch is over

An epoch has fixed members; rank 0, the learner, sends. Its members meet under the prefix
``weights/<epoch>`` of the learner's store: each says that it is there and waits for the others
before anything is connected, so that a member that never comes costs nothing but the wait.

`transfer.gloo` broadcasts in CPU memory, `transfer.nccl` between GPUs; `transfer.backends` makes
either.

Everything here blocks, none of it for longer than its deadline (`CollectiveError`). What torch
cannot interrupt goes on by itself on a daemon thread, such as a call to a store whose host is
frozen, which has no deadline of its own.
"""

import socket
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import AbstractContextManager
from datetime import timedelta
from threading import Thread
from typing import Literal, Protocol, TypeVar

import torch
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from protocol.errors import CollectiveError, ConfigError, brief

BackendName = Literal["gloo", "nccl"]
ResultT = TypeVar("ResultT")

BUCKETS_BEGUN = 2
"""Buckets of a broadcast that travel at a time; docs/results/speed.md compares it with one."""
GRACE_S = 1.0
"""A backend's own deadline comes first: its error says more, and it has let go of the bucket."""


class BroadcastGroup(Protocol):
    """The members of one epoch, after they have met."""

    def broadcast(self, bucket: torch.Tensor) -> None:
        """Send ``bucket``, as rank 0, or receive into it; raises `CollectiveError`.

        It is contiguous uint8 [n] on the backend's device, of the same size everywhere. When this
        returns it is filled, or handed over: only the others can say whether they have it. After an
        error (a member failed, or the deadline has passed) the epoch is over for this member, and
        the bucket is lost: until the backend has noticed, it may write there.
        """

    def begin(self, bucket: torch.Tensor) -> Callable[[], None]:
        """Begin a `broadcast`; what is returned waits for the bucket, and must be called.

        Until then other work can be done, and other buckets begun: `BUCKETS_BEGUN` in all, each
        waited for in turn.
        """

    def abort(self) -> None:
        """End the epoch, also in good order: later broadcasts raise `CollectiveError`.

        Called from any thread; returns at once. NCCL releases a pending broadcast. Gloo cannot: the
        broadcast ends at its deadline, and may write into its bucket until then.
        """


class Backend(Protocol):
    """How the members of this process's epochs exchange bytes."""

    name: BackendName
    device: torch.device
    """Device that buckets have to be on."""

    def meet(
        self, store: TCPStore, epoch: int, rank: int, world_size: int, timeout_s: float
    ) -> BroadcastGroup:
        """Meet the other members of ``epoch``; ``timeout_s`` is then the deadline of each bucket.

        Meetings of several epochs over one store do not wait for each other. Raises
        `CollectiveError` if one of the members does not come in time.
        """

    def copy_context(self) -> AbstractContextManager[object]:
        """Context for copies from and to buckets: on a GPU it orders them with the broadcasts."""


def host_store(address: str, timeout_s: float) -> tuple[TCPStore, int]:
    """A store that listens on exactly ``address``, and its port; raises `ConfigError`."""
    try:
        listener = socket.create_server((address, 0))
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {address}: {error.strerror or error}; weights.address must be an "
            "IPv4 address of this machine"
        ) from error
    # TCPStore alone would listen on every interface, whatever address it is given.
    with listener:
        port: int = listener.getsockname()[1]
        store = TCPStore(
            address,
            port,
            is_master=True,
            timeout=timedelta(seconds=timeout_s),
            wait_for_workers=False,
            master_listen_fd=listener.detach(),
        )
    return store, port


def join_store(host: str, port: int, timeout_s: float) -> TCPStore:
    """Connect to the learner's store; raises `CollectiveError` if it does not answer in time."""

    def join() -> TCPStore:
        return TCPStore(
            host,
            port,
            is_master=False,
            timeout=timedelta(seconds=timeout_s),
            wait_for_workers=False,
        )

    return within(timeout_s, f"the store at {host}:{port}", join)


class StoreBackend(ABC):
    """A backend whose members meet in the learner's store, however they connect afterwards."""

    def meet(
        self, store: TCPStore, epoch: int, rank: int, world_size: int, timeout_s: float
    ) -> BroadcastGroup:
        """Meet the other members of ``epoch``; see `Backend.meet`."""
        if not 0 <= rank < world_size:
            raise CollectiveError(f"rank {rank} of {world_size}")
        timeout = timedelta(seconds=timeout_s)

        def meet() -> BroadcastGroup:
            # A connection serves one call at a time, and lets nobody else in while that waits: an
            # abandoned meeting would hold up the next one.
            rendezvous = PrefixStore(f"weights/{epoch}", store.clone())  # type: ignore[attr-defined]
            _gather(rendezvous, rank, world_size, timeout)
            return self._connect(rendezvous, rank, world_size, timeout)

        return within(timeout_s, f"epoch {epoch}", meet, discard=lambda group: group.abort())

    @abstractmethod
    def _connect(
        self, store: Store, rank: int, world_size: int, timeout: timedelta
    ) -> BroadcastGroup:
        """Connect to the other members, all of which are there."""


def _gather(store: Store, rank: int, world_size: int, timeout: timedelta) -> None:
    """Say that this member is there, and wait for the others."""
    members = {other: f"member/{other}" for other in range(world_size)}
    store.set(members[rank], "")
    try:
        store.wait(list(members.values()), timeout)
    except RuntimeError as error:
        missing = tuple(other for other, key in members.items() if not store.check([key]))
        ranks = ", ".join(map(str, missing))
        raise CollectiveError(f"rank {ranks} of {world_size} did not come", missing) from error


def within(
    timeout_s: float,
    what: str,
    call: Callable[[], ResultT],
    discard: Callable[[ResultT], None] = lambda _: None,
) -> ResultT:
    """The result of ``call``; if it comes too late it goes to ``discard`` instead.

    Errors of the network become `CollectiveError`.
    """
    outcome: Future[ResultT] = Future()

    def run() -> None:
        try:
            result = call()
        except BaseException as error:
            outcome.set_exception(error)
        else:
            outcome.set_result(result)

    def drop(late: "Future[ResultT]") -> None:
        if late.exception() is None:
            discard(late.result())

    Thread(target=run, name="collective", daemon=True).start()
    try:
        return outcome.result(timeout_s + GRACE_S)
    except TimeoutError as error:
        outcome.add_done_callback(drop)
        raise CollectiveError(f"{what}: nobody answered in {timeout_s:g} s") from error
    except CollectiveError as error:
        raise CollectiveError(f"{what}: {error}", error.missing) from error
    except RuntimeError as error:
        raise CollectiveError(f"{what}: {brief(error)}") from error


def check_bucket(bucket: torch.Tensor, device: torch.device) -> None:
    """Assert that a bucket is contiguous uint8 on a device of the right type."""
    assert bucket.dtype == torch.uint8, bucket.dtype
    assert bucket.is_contiguous()
    assert bucket.device.type == device.type, bucket.device
