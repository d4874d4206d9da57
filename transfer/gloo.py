"""The gloo backend: broadcasts in CPU memory."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta

import torch
from torch.distributed import Store  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import ProcessGroupGloo

from protocol.errors import CollectiveError, brief
from transfer.collective import GRACE_S, BackendName, StoreBackend, check_bucket


class GlooBackend(StoreBackend):
    """Torch's ProcessGroupGloo, bound to one address; see `transfer.collective.Backend`."""

    name: BackendName = "gloo"
    device = torch.device("cpu")

    def __init__(self, own_address: str) -> None:
        self._own_address = own_address

    def _connect(self, store: Store, rank: int, world_size: int, timeout: timedelta) -> "GlooGroup":
        options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._timeout = timeout
        options._devices = [ProcessGroupGloo.create_device(hostname=self._own_address)]
        return GlooGroup(ProcessGroupGloo(store, rank, world_size, options), timeout)

    def copy_context(self) -> AbstractContextManager[object]:
        """No context: copies in CPU memory are done when they return."""
        return nullcontext()


class GlooGroup:
    """The members of one epoch; see `transfer.collective.BroadcastGroup`."""

    def __init__(self, group: ProcessGroupGloo, timeout: timedelta) -> None:
        self._group = group
        self._timeout = timeout
        self._over = False

    def broadcast(self, bucket: torch.Tensor) -> None:
        """Send or receive one bucket, and wait for it."""
        self.begin(bucket)()

    def begin(self, bucket: torch.Tensor) -> Callable[[], None]:
        """Begin to send or receive one bucket; what is returned waits for it."""
        check_bucket(bucket, GlooBackend.device)
        if self._over:
            raise CollectiveError("the epoch is over")
        with self._ending():
            pending = self._group.broadcast(bucket, 0, self._timeout)  # type: ignore[attr-defined]

        def wait() -> None:
            with self._ending():
                pending.wait(self._timeout + timedelta(seconds=GRACE_S))

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
        """End the epoch; a pending broadcast goes on until its deadline."""
        self._over = True
