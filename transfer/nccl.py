"""The NCCL backend: broadcasts between GPUs."""

import fcntl
import logging
import os
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from functools import partial
from threading import Lock, Thread
from typing import TYPE_CHECKING

import torch
from torch.distributed import Store  # type: ignore[attr-defined]

from protocol.errors import CollectiveError, ConfigError, brief
from transfer.collective import BackendName, StoreBackend, check_bucket, within

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import ProcessGroupNCCL

log = logging.getLogger("transfer")

WATCHDOG_OFF = "TORCH_NCCL_BLOCKING_WAIT"
"""Environment variable of torch: groups made while it is 1 have no watchdog."""
NCCL_SETUP_TIMEOUT_S = 60
NCCL_DEFAULTS = {
    WATCHDOG_OFF: "0",
    # Seconds that torch waits for a communicator to come up; left at its half hour, a meeting that
    # was abandoned could not be aborted before that.
    "TORCH_NCCL_NONBLOCKING_TIMEOUT": str(NCCL_SETUP_TIMEOUT_S),
}
INTERFACE = "NCCL_SOCKET_IFNAME"
"""NCCL would choose one by itself, and listen there."""
_SIOCGIFADDR = 0x8915

_changing_environment = Lock()


class NcclBackend(StoreBackend):
    """Torch's ProcessGroupNCCL, without the default group and without its guards.

    Non-blocking (``blocking = 0``), because NCCL's abort is safe only then. The communicator is
    made by a first broadcast and not by ``eager_connect_single_device``, after which nothing in
    Python could tell when it is ready.

    No watchdog (`WATCHDOG_OFF`). Torch's would, when it saw a broadcast fail, raise a flag that all
    groups of the process share, and the heartbeat monitor of the process's first group, such as the
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

    def _connect(self, store: Store, rank: int, world_size: int, timeout: timedelta) -> "NcclGroup":
        from torch.distributed.distributed_c10d import ProcessGroupNCCL

        options = ProcessGroupNCCL.Options()
        options.config.blocking = 0
        options._timeout = timeout
        with self.copy_context():
            first = torch.zeros(1, dtype=torch.uint8, device=self.device)
        with _without_watchdog():
            group = NcclGroup(ProcessGroupNCCL(store, rank, world_size, options), self, timeout)
        group.broadcast(first)
        return group

    def copy_context(self) -> AbstractContextManager[object]:
        """Context that puts copies on the CUDA stream of the broadcasts."""
        return torch.cuda.stream(self._stream)


class NcclGroup:
    """The members of one epoch; see `transfer.collective.BroadcastGroup`."""

    def __init__(
        self,
        group: "ProcessGroupNCCL",
        backend: NcclBackend,
        timeout: timedelta,
    ) -> None:
        self._group = group
        self._backend = backend
        self._timeout = timeout
        self._over = False
        self._aborting = Lock()

    def broadcast(self, bucket: torch.Tensor) -> None:
        """Send or receive one bucket, and wait for it; an error aborts the communicator."""
        check_bucket(bucket, self._backend.device)
        if self._over:
            raise CollectiveError("the epoch is over")

        def exchange() -> None:
            with self._backend.copy_context():
                pending = self._group.broadcast(bucket, 0, self._timeout)  # type: ignore[attr-defined]
                # CUDA has no wait with a deadline. With one, this asks every millisecond, in C++
                # and without the GIL, whether the broadcast is done or the communicator broken.
                pending.wait(self._timeout)

        try:
            # On another thread: NCCL may take long to connect, which the call does, or to abort,
            # which the wait does where it fails.
            within(self._timeout.total_seconds(), "a bucket", exchange)
        except CollectiveError:
            self.abort()
            raise
        # Aborted kernels end like those that are done.
        if self._over:
            raise CollectiveError("the epoch was aborted")

    def begin(self, bucket: torch.Tensor) -> Callable[[], None]:
        """Begin nothing yet; what is returned sends or receives the bucket."""
        # All of it later: between GPUs a bucket takes next to no time, compared with what is done
        # to it on the CPU.
        return partial(self.broadcast, bucket)

    def abort(self) -> None:
        """End the epoch; a pending broadcast is released."""
        self._over = True
        if self._aborting.acquire(blocking=False):
            # It waits until the kernels have ended, and holds the group until then: the destructor
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
