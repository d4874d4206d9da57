"""The actor's part in a broadcast: its own process receives while the engine generates.

    group ──► staging ──► receive buffer       two staging buckets: one is being filled while the
         └──► staging ──┘                      other one is copied

A collective cannot be interrupted. One that is given up goes on until its deadline, in a thread
that nobody waits for, and what still arrives ends in its staging buckets.
"""

from collections.abc import Callable
from contextlib import suppress

import torch

from protocol.errors import CollectiveError
from protocol.messages import Weights
from protocol.sockets import address_towards, parse_tcp
from protocol.weights import CHUNK_BYTES
from transfer.collective import Backend, Group, create_backend, join_store

Sink = Callable[[int, torch.Tensor], None]
"""Takes (offset, bytes) of the packed weights."""


class Collective:
    """This actor's membership in the current epoch, of one learner."""

    def __init__(self, learner_url: str, device: torch.device) -> None:
        """``device`` is the one that the NCCL backend receives on."""
        self._host, self._port = parse_tcp(learner_url)
        self._device = device
        self._backend: Backend | None = None
        self._group: Group | None = None
        self._epoch: int | None = None
        self._staging: list[torch.Tensor] = []

    def receive(self, offer: Weights, sink: Sink) -> None:
        """Receive what is offered; blocks, up to the offer's deadline for each of its parts.

        Whatever is raised ends the membership: this object is of no more use then.
        """
        if not 1 <= offer.rank < offer.world_size:
            raise ValueError(f"rank {offer.rank} of {offer.world_size}")
        if offer.bucket_bytes < 1 or offer.bucket_bytes % CHUNK_BYTES:
            raise ValueError(f"buckets of {offer.bucket_bytes} bytes")
        if offer.epoch != self._epoch or self._group is None or self._backend is None:
            self._backend, self._group = self._meet(offer)
            self._epoch = offer.epoch
        staging = self._staging_buckets(min(offer.bucket_bytes, offer.num_bytes))
        _receive(self._group, self._backend, staging, offer, sink)

    def abort(self) -> None:
        """Give up what is going on in another thread."""
        if self._group is not None:
            self._group.abort()

    def _staging_buckets(self, size: int) -> list[torch.Tensor]:
        """Kept from push to push: memory is slow when it is first written."""
        if not self._staging or len(self._staging[0]) != size:
            assert self._backend is not None
            device = self._backend.device
            self._staging = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2)]
        return self._staging

    def _meet(self, offer: Weights) -> tuple[Backend, Group]:
        assert offer.epoch is not None
        # Asked anew, and not by whoever makes this object: that may wait for a name server, or
        # fail while the network is down.
        own_address = address_towards(self._host, self._port)
        backend = create_backend(offer.backend, own_address=own_address, device=self._device)
        store = join_store(self._host, offer.store_port, offer.timeout_s)
        group = backend.meet(store, offer.epoch, offer.rank, offer.world_size, offer.timeout_s)
        return backend, group


def _receive(
    group: Group, backend: Backend, staging: list[torch.Tensor], offer: Weights, sink: Sink
) -> None:
    offsets = range(0, offer.num_bytes, offer.bucket_bytes)
    buckets = [staging[n % 2][: offer.num_bytes - offset] for n, offset in enumerate(offsets)]
    pending: Callable[[], None] | None = group.begin(buckets[0])
    for number, offset in enumerate(offsets):
        assert pending is not None
        pending()
        pending = group.begin(buckets[number + 1]) if number + 1 < len(buckets) else None
        try:
            with backend.stream():
                sink(offset, buckets[number])
        except Exception:
            if pending is not None:
                # Here, where nobody waits: else whoever frees the group would.
                with suppress(CollectiveError):
                    pending()
            raise
