"""Broadcasts of weights within one epoch: gloo in CPU memory, NCCL between GPUs, one interface.

    learner  host_store ─┐                              ┌─ Group.broadcast, bucket by bucket
                         ├─► Backend.meet(epoch, rank) ─┤
    actors   join_store ─┘                              └─ Group.abort, when the epoch is over

An epoch has fixed members; rank 0, the learner, sends. Its members meet under the prefix
``weights/<epoch>`` of the learner's store: each says that it is there and waits for the others
before anything is connected, so that a member that never comes costs nothing but the wait.

Everything here blocks, none of it for longer than its deadline (`CollectiveError`). What torch
cannot interrupt goes on by itself on a daemon thread: calls to a store whose host is frozen, for
one, which have no deadline of their own.
"""

import fcntl
import logging
import os
import socket
import struct
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from functools import partial
from threading import Lock, Thread
from typing import Literal, Protocol, TypeVar

import torch
from torch.distributed import (  # type: ignore[attr-defined]
    PrefixStore,
    Store,
    TCPStore,
    is_nccl_available,
)
from torch.distributed.distributed_c10d import ProcessGroupGloo

from protocol.errors import CollectiveError, ConfigError, brief

log = logging.getLogger("transfer")

BackendName = Literal["gloo", "nccl"]
ResultT = TypeVar("ResultT")

GRACE_S = 1.0
"""A backend's own deadline comes first: its error says more, and it has let go of the bucket."""

WATCHDOG_OFF = "TORCH_NCCL_BLOCKING_WAIT"
NCCL_SETUP_TIMEOUT_S = 60
NCCL_DEFAULTS = {
    WATCHDOG_OFF: "0",
    # Seconds that torch waits for a communicator to come up; left at its half hour, a meeting that
    # was abandoned could not be aborted for as long.
    "TORCH_NCCL_NONBLOCKING_TIMEOUT": str(NCCL_SETUP_TIMEOUT_S),
}
INTERFACE = "NCCL_SOCKET_IFNAME"
"""NCCL would choose one by itself, and listen there."""
_SIOCGIFADDR = 0x8915

_changing_environment = Lock()


class Group(Protocol):
    """The members of one epoch, met."""

    def broadcast(self, bucket: torch.Tensor) -> None:
        """Send ``bucket``, as rank 0, or receive into it; raises `CollectiveError`.

        It is contiguous uint8 [n] on the backend's device, of the same size everywhere. When this
        returns it is filled, or handed over: that the others have it, only they can say. After an
        error (a member failed, or the deadline has passed) the epoch is over for this member, and
        the bucket is lost: until the backend has noticed, it may write there.
        """

    def begin(self, bucket: torch.Tensor) -> Callable[[], None]:
        """`broadcast` in two parts: what is returned waits for the bucket, and is to be called.

        Until then other work can be done, but no other bucket be begun.
        """

    def abort(self) -> None:
        """End the epoch, also in good order: later broadcasts raise `CollectiveError`.

        From any thread; returns at once. A broadcast that is pending is released by NCCL. Gloo
        cannot: it ends at its deadline, and may write into its bucket until then.
        """


class Backend(Protocol):
    """How the members of this process's epochs exchange bytes."""

    name: BackendName
    device: torch.device
    """Where buckets have to be."""

    def meet(
        self, store: TCPStore, epoch: int, rank: int, world_size: int, timeout_s: float
    ) -> Group:
        """Meet the other members of ``epoch``; ``timeout_s`` is then the deadline of each bucket.

        Meetings of several epochs over one store do not wait for each other. Raises
        `CollectiveError` if one of the members does not come in time.
        """

    def stream(self) -> AbstractContextManager[object]:
        """Context of copies from and to buckets: on a GPU it orders them with the broadcasts."""


def create_backend(name: BackendName, *, own_address: str, device: torch.device) -> Backend:
    """The backend ``name``, whose sockets are bound to this machine's ``own_address``.

    ``device`` is the GPU for NCCL; gloo works in CPU memory, whatever it is. Raises `ConfigError`.
    """
    if name == "gloo":
        return _Gloo(own_address)
    if not is_nccl_available():
        raise ConfigError(
            'weights.backend = "nccl" needs a torch that is built with NCCL, and this one '
            f'({torch.__version__}) is not: install a CUDA build, or set it to "gloo"'
        )
    if device.type != "cuda" or not torch.cuda.is_available():
        raise ConfigError(
            f'weights.backend = "nccl" needs a GPU, and this process has {device} and sees '
            f'{torch.cuda.device_count()} GPUs: set it to "gloo"'
        )
    return _Nccl(own_address, device)


def nccl_available() -> bool:
    """Whether this process could broadcast by NCCL."""
    return is_nccl_available() and torch.cuda.is_available()


def gpu_identity(device: torch.device) -> str:
    """The UUID of the GPU ``device``, the same in every process; empty for the CPU.

    NCCL refuses two ranks on one GPU.
    """
    if device.type != "cuda":
        return ""
    return str(torch.cuda.get_device_properties(device).uuid)


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

    return _within(timeout_s, f"the store at {host}:{port}", join)


class _Meeting(ABC):
    """How members come together is the same for all backends, how they connect is not."""

    def meet(
        self, store: TCPStore, epoch: int, rank: int, world_size: int, timeout_s: float
    ) -> Group:
        return _meet(self._connect, store, epoch, rank, world_size, timeout_s)

    @abstractmethod
    def _connect(self, store: Store, rank: int, world_size: int, timeout: timedelta) -> Group: ...


class _Gloo(_Meeting):
    name: BackendName = "gloo"
    device = torch.device("cpu")

    def __init__(self, own_address: str) -> None:
        self._own_address = own_address

    def _connect(
        self, store: Store, rank: int, world_size: int, timeout: timedelta
    ) -> "_GlooGroup":
        options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._timeout = timeout
        options._devices = [ProcessGroupGloo.create_device(hostname=self._own_address)]
        return _GlooGroup(ProcessGroupGloo(store, rank, world_size, options), timeout)

    def stream(self) -> AbstractContextManager[object]:
        return nullcontext()


class _GlooGroup:
    def __init__(self, group: ProcessGroupGloo, timeout: timedelta) -> None:
        self._group = group
        self._timeout = timeout
        self._over = False

    def broadcast(self, bucket: torch.Tensor) -> None:
        self.begin(bucket)()

    def begin(self, bucket: torch.Tensor) -> Callable[[], None]:
        _check_bucket(bucket, _Gloo.device)
        if self._over:
            raise CollectiveError("the epoch is over")
        with self._ending():
            work = self._group.broadcast(bucket, 0, self._timeout)  # type: ignore[attr-defined]

        def wait() -> None:
            with self._ending():
                work.wait(self._timeout + timedelta(seconds=GRACE_S))

        return wait

    @contextmanager
    def _ending(self) -> Iterator[None]:
        """The epoch ends with the first error."""
        try:
            yield
        except RuntimeError as error:
            # Members may be out of step now, some with this bucket and some without.
            self._over = True
            raise CollectiveError(brief(error)) from error

    def abort(self) -> None:
        self._over = True


class _Nccl(_Meeting):
    """Torch's ProcessGroupNCCL, without the default group and without its guards.

    Non-blocking (``blocking = 0``), because NCCL's abort is safe only then. The communicator is
    made by a first broadcast and not by ``eager_connect_single_device``, after which nothing in
    Python could tell when it is ready.

    No watchdog (`WATCHDOG_OFF`). Torch's would, when it saw a broadcast fail, raise a flag that all
    groups of the process share, and the heartbeat monitor of the process's first group, say the
    trainer's, would then end the process, whatever TORCH_NCCL_ASYNC_ERROR_HANDLING says. The
    variable is read when a group is made, so others keep their watchdog.

    This cannot deadlock with the communicators of training, though NCCL in general warns of using
    two at once. What is sent comes from a snapshot in host memory, copied on a stream of its own:
    no broadcast waits for training. And the broadcast's other members train nothing: a GPU that it
    shares with training may wait for an actor until the bucket's deadline, but no actor ever
    waits for that training, so there is no circle.

    Members that remain form a new communicator: ncclCommShrink and Grow were not measured.
    """

    name: BackendName = "nccl"

    def __init__(self, own_address: str, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device)
        # What the user has set stays.
        for variable, value in NCCL_DEFAULTS.items():
            os.environ.setdefault(variable, value)
        if INTERFACE not in os.environ:
            os.environ[INTERFACE] = "=" + _interface(own_address)

    def _connect(
        self, store: Store, rank: int, world_size: int, timeout: timedelta
    ) -> "_NcclGroup":
        from torch.distributed.distributed_c10d import ProcessGroupNCCL

        options = ProcessGroupNCCL.Options()
        options.config.blocking = 0
        options._timeout = timeout
        with self.stream():
            first = torch.zeros(1, dtype=torch.uint8, device=self.device)
        with _without_watchdog():
            group = _NcclGroup(ProcessGroupNCCL(store, rank, world_size, options), self, timeout)
        group.broadcast(first)
        return group

    def stream(self) -> AbstractContextManager[object]:
        return torch.cuda.stream(self._stream)


class _NcclGroup:
    def __init__(
        self,
        group: "torch.distributed.distributed_c10d.ProcessGroupNCCL",
        backend: _Nccl,
        timeout: timedelta,
    ) -> None:
        self._group = group
        self._backend = backend
        self._timeout = timeout
        self._over = False
        self._aborting = Lock()

    def broadcast(self, bucket: torch.Tensor) -> None:
        _check_bucket(bucket, self._backend.device)
        if self._over:
            raise CollectiveError("the epoch is over")

        def exchange() -> None:
            with self._backend.stream():
                work = self._group.broadcast(bucket, 0, self._timeout)  # type: ignore[attr-defined]
                # CUDA has no wait with a deadline. With one, this asks every millisecond, in C++
                # and without the GIL, whether the broadcast is done or the communicator broken.
                work.wait(self._timeout)

        try:
            # From outside, for NCCL may be long in connecting, which the call does, or in aborting,
            # which the wait does where it fails.
            _within(self._timeout.total_seconds(), "a bucket", exchange)
        except CollectiveError:
            self.abort()
            raise
        # Aborted kernels end like those that are done.
        if self._over:
            raise CollectiveError("the epoch was aborted")

    def begin(self, bucket: torch.Tensor) -> Callable[[], None]:
        # All of it later: between GPUs a bucket takes next to no time, compared with what is done
        # to it on the CPU.
        return partial(self.broadcast, bucket)

    def abort(self) -> None:
        self._over = True
        if self._aborting.acquire(blocking=False):
            # It waits until the kernels have ended, and holds the group for as long: the destructor
            # of one that is not aborted does all of this under the GIL.
            Thread(target=self._abort, name="nccl-abort", daemon=True).start()

    def _abort(self) -> None:
        try:
            self._group.abort()
        except RuntimeError as error:
            log.warning("NCCL could not abort a communicator: %s", brief(error))


@contextmanager
def _without_watchdog() -> Iterator[None]:
    """Groups that are made meanwhile get no watchdog."""
    with _changing_environment:
        before = os.environ.get(WATCHDOG_OFF, NCCL_DEFAULTS[WATCHDOG_OFF])
        os.environ[WATCHDOG_OFF] = "1"
        try:
            yield
        finally:
            # Not removed: other threads may be reading the environment, which C allows only as long
            # as nothing moves in it.
            os.environ[WATCHDOG_OFF] = before


def _interface(address: str) -> str:
    """The network interface that has the IPv4 ``address``; raises `ConfigError`."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", name.encode()))
            except OSError:
                # It has no IPv4 address.
                continue
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    raise ConfigError(
        f"no network interface has {address} as its first address: say by {INTERFACE} which one "
        "NCCL is to use"
    )


def _meet(
    connect: Callable[[Store, int, int, timedelta], Group],
    store: TCPStore,
    epoch: int,
    rank: int,
    world_size: int,
    timeout_s: float,
) -> Group:
    if not 0 <= rank < world_size:
        raise CollectiveError(f"rank {rank} of {world_size}")
    timeout = timedelta(seconds=timeout_s)

    def meet() -> Group:
        # A connection serves one call at a time, and lets nobody else in while that waits: an
        # abandoned meeting would hold up the next one.
        rendezvous = PrefixStore(f"weights/{epoch}", store.clone())  # type: ignore[attr-defined]
        _gather(rendezvous, rank, world_size, timeout)
        return connect(rendezvous, rank, world_size, timeout)

    return _within(timeout_s, f"epoch {epoch}", meet, discard=lambda group: group.abort())


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


def _within(
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


def _check_bucket(bucket: torch.Tensor, device: torch.device) -> None:
    assert bucket.dtype == torch.uint8, bucket.dtype
    assert bucket.is_contiguous()
    assert bucket.device.type == device.type, bucket.device
