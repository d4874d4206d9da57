"""Packed weights as they arrive: every chunk knows which version its bytes are of.

So a transfer that breaks off is continued by whatever route comes next, and a chunk of an older
version serves as the base of a difference.

Writers may be threads that nobody can stop (a collective lasts until its deadline), so each one
has a `WriteTurn`. Once that is over it writes nothing any more, and memory that was lent to it is
detached (`transfer.shared_memory.DetachableView`).
"""

from dataclasses import dataclass
from threading import Lock

import numpy as np
import torch

from actors.weights.running_digests import RunningDigests
from protocol.weights import CHUNK_BYTES, TensorSpec, num_chunks, total_bytes
from transfer.shared_memory import DetachableView, SharedMemory

BLOCK_BYTES = 1 << 18
"""Copied, then hashed: small enough to be still in the cache of a core."""


class Superseded(Exception):
    """The writer's turn is over: another one writes to the buffer."""


@dataclass(frozen=True, slots=True, eq=False)
class WriteTurn:
    """The right to write whole chunks of one version, until the next one is given.

    After that all methods raise `Superseded`. For anything but whole chunks they raise ValueError.
    """

    buffer: "ReceiveBuffer"
    version: int

    def write(self, offset: int, data: torch.Tensor) -> None:
        """Write uint8 ``data`` from ``offset`` on."""
        self.buffer._write(self, offset, data)

    def lend(self, offset: int, num_bytes: int) -> torch.Tensor:
        """Memory to write to without a copy; `filled` gives it back.

        If the turn ends before that, what is written there is lost.
        """
        return self.buffer._lend(self, offset, num_bytes)

    def filled(self, offset: int, num_bytes: int) -> None:
        """Give back what was lent from ``offset`` on: it holds the bytes of the version."""
        self.buffer._filled(self, offset, num_bytes)


class ReceiveBuffer:
    """Memory for one version of the weights."""

    def __init__(self, memory: SharedMemory, specs: list[TensorSpec]) -> None:
        """``memory`` has the size of ``specs``."""
        self.memory = memory
        self._tensor = memory.tensor
        self._bytes = self._tensor.numpy().data
        self._specs = specs
        self._lock = Lock()
        self._turn: WriteTurn | None = None
        self._view: DetachableView | None = None
        """Kept from push to push: pages are slow when they are first touched."""
        self._lent: dict[int, int] = {}
        """Numbers of bytes lent, by offset."""
        self._versions: list[int | None] = [None] * num_chunks(total_bytes(specs))
        self._digests = RunningDigests(self._bytes, specs)

    def begin(self, version: int) -> WriteTurn:
        """Begin the turn of a writer of ``version``, which ends the one before."""
        with self._lock:
            if self._view is not None and self._lent:
                for offset, num_bytes in self._lent.items():
                    self._view.detach(offset, num_bytes)
                self._lent.clear()
                self._view = None
            self._turn = WriteTurn(self, version)
            return self._turn

    def _write(self, turn: WriteTurn, offset: int, data: torch.Tensor) -> None:
        chunks = self._chunks(offset, len(data))
        end = offset + len(data)
        with self._lock:
            self._check(turn)
            self._mark(chunks, None)
            for begin in range(offset, end, BLOCK_BYTES):
                stop = min(begin + BLOCK_BYTES, end)
                _copy(self._tensor[begin:stop], data[begin - offset : stop - offset])
                self._digests.written(begin, stop)
            self._mark(chunks, turn.version)

    def _lend(self, turn: WriteTurn, offset: int, num_bytes: int) -> torch.Tensor:
        chunks = self._chunks(offset, num_bytes)
        with self._lock:
            self._check(turn)
            self._view = self._view or DetachableView(self.memory)
            self._lent[offset] = num_bytes
            self._mark(chunks, None)
            return self._view.tensor[offset : offset + num_bytes]

    def _filled(self, turn: WriteTurn, offset: int, num_bytes: int) -> None:
        with self._lock:
            self._check(turn)
            if self._lent.pop(offset, None) != num_bytes:
                raise ValueError(f"{num_bytes} bytes from {offset} on were not lent")
            self._digests.written(offset, offset + num_bytes)
            self._mark(self._chunks(offset, num_bytes), turn.version)

    def _check(self, turn: WriteTurn) -> None:
        if turn is not self._turn:
            raise Superseded

    def _chunks(self, offset: int, num_bytes: int) -> range:
        end, size = offset + num_bytes, len(self._tensor)
        whole = offset % CHUNK_BYTES == 0 and (end % CHUNK_BYTES == 0 or end == size)
        if not (whole and 0 <= offset <= end <= size):
            raise ValueError(f"bytes {offset} to {end} of {size} are no chunks")
        return range(offset // CHUNK_BYTES, -(-end // CHUNK_BYTES))

    def span(self, chunk: int) -> tuple[int, int]:
        """First byte of a chunk, and the one after its last."""
        begin = chunk * CHUNK_BYTES
        return begin, min(begin + CHUNK_BYTES, len(self._tensor))

    def read(self, chunk: int) -> memoryview:
        """Bytes of a chunk, without a copy."""
        begin, end = self.span(chunk)
        return self._bytes[begin:end]

    def version_of(self, chunk: int) -> int | None:
        """Version that all of the chunk's bytes are of; None if there is none."""
        return self._versions[chunk]

    def missing(self, version: int) -> list[int]:
        """Chunks whose bytes are not of ``version``."""
        return [chunk for chunk, found in enumerate(self._versions) if found != version]

    def forget(self, names: list[str] | None = None) -> None:
        """Note that the bytes of these tensors (None: of all) are not what they should be."""
        for spec in self._specs:
            if names is None or spec.name in names:
                end = spec.offset + spec.num_bytes
                self._mark(range(spec.offset // CHUNK_BYTES, -(-end // CHUNK_BYTES)), None)
                self._digests.forget(spec.offset, end)

    @property
    def digests_known(self) -> bool:
        """Whether all bytes were hashed as they came, so that `digests` takes no time."""
        return self._digests.complete

    def digests(self) -> bytes:
        """Digests of all parameters, from the bytes that were written here."""
        return self._digests.digests()

    def _mark(self, chunks: range, version: int | None) -> None:
        for chunk in chunks:
            self._versions[chunk] = version


def _copy(target: torch.Tensor, source: torch.Tensor) -> None:
    if source.is_cpu:
        # This is memcpy, which takes a quarter less time than torch's own copy.
        np.copyto(target.numpy(), source.numpy())
    else:
        target.copy_(source)
