"""Digests of packed tensors, made while their bytes are still in the processor's cache.

written    [0, 4 MiB)  [4, 8 MiB)  [8, 12 MiB) ...      in order: every byte is hashed at once
tensors    aaaaabbbbbbbbbbbbbbbbbbbbcddddddddd ...      else: when the digests are asked for
"""

from bisect import bisect_right

import xxhash

from protocol.weights import TensorSpec, tensor_digest


class RunningDigests:
    """Digests of the tensors in one memory, every change of which is told to `written`.

    Not for several threads at once.
    """

    def __init__(self, data: memoryview, specs: list[TensorSpec]) -> None:
        """``data`` is the memory, in the layout of ``specs``."""
        self._data = data
        self._specs = specs
        self._offsets = [spec.offset for spec in specs]
        self._known: list[bytes | None] = [None] * len(specs)
        self._hash = xxhash.xxh3_128()
        self._next = 0
        """Tensor that is being hashed."""
        self._end: int | None = None
        """Byte up to which it is hashed; None if it cannot continue."""

    def written(self, begin: int, end: int) -> None:
        """Note that the bytes from ``begin`` to ``end`` have changed."""
        self.forget(begin, end)
        if begin == 0:
            self._hash.reset()
            self._next = self._end = 0
        if begin != self._end:
            # What was hashed of the tensor may be among what has changed.
            self._end = None
            return
        while self._next < len(self._specs) and self._end < end:
            spec = self._specs[self._next]
            stop = min(end, spec.offset + spec.num_bytes)
            self._hash.update(self._data[self._end : stop])
            self._end = stop
            if stop == spec.offset + spec.num_bytes:
                self._known[self._next] = self._hash.digest()
                self._hash.reset()
                self._next += 1

    def forget(self, begin: int, end: int) -> None:
        """Have the digests of what lies there computed again, even if nothing was written."""
        index = max(0, bisect_right(self._offsets, begin) - 1)
        while index < len(self._specs) and self._offsets[index] < end:
            self._known[index] = None
            index += 1

    @property
    def complete(self) -> bool:
        """Whether nothing is left to be computed."""
        return None not in self._known

    def digests(self) -> bytes:
        """Digests of all tensors, one after the other; reads those not hashed yet."""
        return b"".join(
            known if known is not None else tensor_digest(self._of(spec))
            for known, spec in zip(self._known, self._specs, strict=True)
        )

    def _of(self, spec: TensorSpec) -> memoryview:
        return self._data[spec.offset : spec.offset + spec.num_bytes]
