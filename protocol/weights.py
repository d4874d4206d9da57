"""How weights are laid out, cut and checked; no tensors here, so any language can follow.

Every parameter is written once (tied parameters under their first name), contiguous and
little-endian, one after the other in the order of the manifest, without gaps. The digest of a
version is taken over the parameters themselves, name by name, so that an actor computes it from
what its engine holds, not from what it received. (vLLM fuses and repacks: there it is computed
from the memory that the engine loaded from, after it has.)
"""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from protocol.framing import Buffer

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

MAX_DIMENSIONS = 16
MAX_TOTAL_BYTES = 1 << 44
"""16 TiB: a manifest that asks for more memory is no model's."""

CHUNK_BYTES = 1 << 20
"""One `WeightsPull`: small enough that other messages are not held up behind it."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Where one parameter lies in the packed weights."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


def layout(manifest: Iterable[tuple[str, str, tuple[int, ...]]]) -> list[TensorSpec]:
    """Offsets of a manifest of (name, dtype, shape); raises ValueError if there can be none."""
    specs: list[TensorSpec] = []
    names, offset = set(), 0
    for name, dtype, shape in manifest:
        if name in names:
            raise ValueError(f"{name} is there twice")
        names.add(name)
        if len(shape) > MAX_DIMENSIONS:
            raise ValueError(f"{name}: {len(shape)} dimensions")
        if dtype not in DTYPE_BYTES:
            raise ValueError(f"{name}: cannot send weights of type {dtype}")
        num_bytes = DTYPE_BYTES[dtype]
        for size in shape:
            if size < 0:
                raise ValueError(f"{name}: negative size in {shape}")
            num_bytes *= size
        specs.append(TensorSpec(name, dtype, tuple(shape), offset, num_bytes))
        offset += num_bytes
    if offset > MAX_TOTAL_BYTES:
        raise ValueError(f"{offset} bytes of weights")
    return specs


def total_bytes(specs: list[TensorSpec]) -> int:
    return specs[-1].offset + specs[-1].num_bytes if specs else 0


def digest(tensors: Iterable[tuple[str, Buffer]]) -> str:
    """Digest of (name, bytes) pairs, in order: BLAKE2b of the names and per-tensor digests."""
    whole = hashlib.blake2b(digest_size=16)
    for name, data in tensors:
        whole.update(name.encode() + b"\0" + hashlib.blake2b(data, digest_size=16).digest())
    return whole.hexdigest()


def packed_digest(packed: Buffer, specs: Iterable[TensorSpec]) -> str:
    """`digest` of the parameters as they lie in packed weights."""
    view = memoryview(packed)
    return digest((s.name, view[s.offset : s.offset + s.num_bytes]) for s in specs)


def chunks(num_bytes: int, size: int = CHUNK_BYTES) -> Iterator[tuple[int, int]]:
    """(offset, length) pairs that cover ``num_bytes``."""
    for offset in range(0, num_bytes, size):
        yield offset, min(size, num_bytes - offset)
