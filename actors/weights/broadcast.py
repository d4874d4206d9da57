"""The actor's part in a broadcast: its own process receives while the engine generates.

    gloo ────────────────────────────► receive buffer     straight into memory that it lends
    NCCL ──► a bucket on the GPU, copied ──┘

A collective cannot be interrupted. One that is given up goes on until its deadline, in a thread
that nobody waits for, and what still arrives does not reach the receive buffer.
"""

from collections import deque
from collections.abc import Callable
from contextlib import suppress

import torch

from actors.weights.receive_buffer import Superseded, WriteTurn
from protocol.errors import CollectiveError
from protocol.messages import Weights
from protocol.sockets import address_towards, parse_tcp
from protocol.weights import CHUNK_BYTES
from transfer.backends import create_backend
from transfer.collective import BUCKETS_BEGUN, Backend, BroadcastGroup, join_store


class Collective:
    """This actor's membership in the current epoch of one learner."""

    def __init__(self, learner_url: str, device: torch.device) -> None:
        """``device`` is the one that the NCCL backend receives on."""
        self._host, self._port = parse_tcp(learner_url)
        self._device = device
        self._backend: Backend | None = None
        self._group: BroadcastGroup | None = None
        self._epoch: int | None = None

    def receive(self, offer: Weights, turn: WriteTurn) -> None:
        """Receive what is offered; blocks, for each bucket until the offer's deadline at most.

        Whatever is raised ends the membership: this object cannot be used after that.
        """
        if not 1 <= offer.rank < offer.world_size:
            raise ValueError(f"rank {offer.rank} of {offer.world_size}")
        if offer.bucket_bytes < 1 or offer.bucket_bytes % CHUNK_BYTES:
            raise ValueError(f"buckets of {offer.bucket_bytes} bytes")
        if offer.epoch != self._epoch or self._group is None or self._backend is None:
            self._backend, self._group = self._meet(offer)
            self._epoch = offer.epoch
        offsets = range(0, offer.num_bytes, offer.bucket_bytes)
        spans = [(offset, min(offer.bucket_bytes, offer.num_bytes - offset)) for offset in offsets]
        if self._backend.device.type == "cpu":
            _receive(self._group, spans, turn)
        else:
            _receive_and_copy(self._group, self._backend, spans, turn)

    def abort(self) -> None:
        """Give up what another thread is receiving."""
        if self._group is not None:
            self._group.abort()

    def _meet(self, offer: Weights) -> tuple[Backend, BroadcastGroup]:
        assert offer.epoch is not None
        # Asked for each epoch, and on this thread: it may wait for a name server, or fail while the
        # network is down.
        own_address = address_towards(self._host, self._port)
        backend = create_backend(offer.backend, own_address=own_address, device=self._device)
        store = join_store(self._host, offer.store_port, offer.timeout_s)
        group = backend.meet(store, offer.epoch, offer.rank, offer.world_size, offer.timeout_s)
        return backend, group


def _receive(group: BroadcastGroup, spans: list[tuple[int, int]], turn: WriteTurn) -> None:
    """Receive bucket by bucket; each is hashed while the next ones arrive."""
    pending: deque[Callable[[], None]] = deque()
    following = iter(spans)

    def begin_next() -> None:
        if (span := next(following, None)) is not None:
            pending.append(group.begin(turn.lend(*span)))

    try:
        for _ in range(BUCKETS_BEGUN):
            begin_next()
        for span in spans:
            pending.popleft()()
            begin_next()
            turn.filled(*span)
    except (Superseded, CollectiveError):
        # Waited for here, where nobody waits for this thread: else the thread that frees the group
        # would wait.
        for wait in pending:
            with suppress(CollectiveError):
                wait()
        raise


def _receive_and_copy(
    group: BroadcastGroup, backend: Backend, spans: list[tuple[int, int]], turn: WriteTurn
) -> None:
    with backend.copy_context():
        # From this stream's memory: what the engine's stream has just freed may still be in use.
        bucket = torch.empty(spans[0][1], dtype=torch.uint8, device=backend.device)
    for offset, num_bytes in spans:
        group.broadcast(bucket[:num_bytes])
        with backend.copy_context():
            turn.write(offset, bucket[:num_bytes])
