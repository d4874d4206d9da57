"""Packed weights as they arrive: every chunk knows which version its bytes are of.

So a transfer that breaks off is continued by whatever route comes next, and a chunk of an older
version serves as the base of a difference.
"""

from threading import Lock

import numpy as np
import torch

from actors.running_digests import RunningDigests
from protocol.weights import CHUNK_BYTES, TensorSpec, num_chunks, total_bytes

BLOCK_BYTES = 1 << 18
"""Copied, then hashed: little enough to be still in the cache of a core."""


class Superseded(Exception):
    """A writer whose turn is over: another one has taken over the buffer."""


class ReceiveBuffer:
    """Memory for one version of the weights.

    Writers may be threads that nobody can stop (a collective lasts until its deadline), so each
    one holds a turn, and one whose turn is over writes nothing.
    """

    def __init__(self, memory: torch.Tensor, specs: list[TensorSpec]) -> None:
        """``memory`` is uint8 [num_bytes] on the CPU."""
        self.memory = memory
        self._bytes = memory.numpy().data
        self._specs = specs
        self._lock = Lock()
        self._turn = 0
        self._held: list[int | None] = [None] * num_chunks(total_bytes(specs))
        self._digests = RunningDigests(self._bytes, specs)

    def begin(self) -> int:
        """A new turn; it ends the one before."""
        with self._lock:
            self._turn += 1
            return self._turn

    def write(self, turn: int, offset: int, data: torch.Tensor, version: int) -> None:
        """Write whole chunks of ``version``, uint8, from ``offset`` on.

        Raises `Superseded`, and ValueError for anything else than chunks of this memory.
        """
        end = offset + len(data)
        whole = offset % CHUNK_BYTES == 0 and (end % CHUNK_BYTES == 0 or end == len(self.memory))
        if not (whole and 0 <= offset <= end <= len(self.memory)):
            raise ValueError(f"bytes {offset} to {end} of {len(self.memory)} are no chunks")
        with self._lock:
            if turn != self._turn:
                raise Superseded
            chunks = range(offset // CHUNK_BYTES, -(-end // CHUNK_BYTES))
            self._mark(chunks, None)
            for begin in range(offset, end, BLOCK_BYTES):
                stop = min(begin + BLOCK_BYTES, end)
                _copy(self.memory[begin:stop], data[begin - offset : stop - offset])
                self._digests.written(begin, stop)
            self._mark(chunks, version)

    def span(self, chunk: int) -> tuple[int, int]:
        """First byte of a chunk, and the one after its last."""
        begin = chunk * CHUNK_BYTES
        return begin, min(begin + CHUNK_BYTES, len(self.memory))

    def read(self, chunk: int) -> memoryview:
        begin, end = self.span(chunk)
        return self._bytes[begin:end]

    def held(self, chunk: int) -> int | None:
        """Version of the chunk's bytes; None if they are of none, or of several."""
        return self._held[chunk]

    def missing(self, version: int) -> list[int]:
        """Chunks whose bytes are not of ``version``."""
        return [chunk for chunk, held in enumerate(self._held) if held != version]

    def forget(self, names: list[str] | None = None) -> None:
        """The bytes of these tensors (None: of all) are not what they should be."""
        for spec in self._specs:
            if names is None or spec.name in names:
                end = spec.offset + spec.num_bytes
                self._mark(range(spec.offset // CHUNK_BYTES, -(-end // CHUNK_BYTES)), None)
                self._digests.forget(spec.offset, end)

    def digests(self) -> bytes:
        """Of all parameters, from the bytes that were written here."""
        return self._digests.digests()

    def _mark(self, chunks: range, version: int | None) -> None:
        for chunk in chunks:
            self._held[chunk] = version


def _copy(target: torch.Tensor, source: torch.Tensor) -> None:
    if source.is_cpu:
        # As memcpy, which takes a quarter less time than torch's own copy.
        np.copyto(target.numpy(), source.numpy())
    else:
        target.copy_(source)
