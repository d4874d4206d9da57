"""How weights are laid out, cut and checked; no tensors here, so any language can follow.

Every parameter is written once (tied parameters under their first name), contiguous and
little-endian, one after the other in the order of the manifest, without gaps.

Digests guard against mistakes of ours and of memory, disks and networks, not against forgery (who
may send at all is up to `protocol.keys`). So every parameter has a digest as fast as its memory is
read, the version's digest is taken over names and digests, and a mismatch names the parameter. An
actor computes them from the bytes in its own memory: those that its engine computes with or, where
that fuses and repacks parameters as vLLM does, those that it loaded.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import xxhash

from protocol.framing import Buffer

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

MAX_DIMENSIONS = 16
MAX_TOTAL_BYTES = 1 << 44
"""16 TiB: a manifest that asks for more memory is no model's."""

DIGEST_BYTES = 16
"""Size of one parameter's digest."""

CHUNK_BYTES = 1 << 20
"""Size of what is pulled at once: so small that other messages do not wait long behind it."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """The place of one parameter in the packed weights."""

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
    """Size of the packed weights."""
    return specs[-1].offset + specs[-1].num_bytes if specs else 0


def tensor_digest(data: Buffer) -> bytes:
    """XXH3-128 of one parameter's bytes, in its canonical (big-endian) form."""
    return xxhash.xxh3_128_digest(data)


def whole_digest(digests: bytes, specs: Sequence[TensorSpec]) -> str:
    """A version's digest, in hex.

    It is BLAKE2b (16 bytes) over each parameter's name, a zero byte, and its digest. Raises
    ValueError if there are not as many digests as parameters.
    """
    whole = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for spec, digest in zip(specs, _each(digests, len(specs)), strict=True):
        whole.update(spec.name.encode() + b"\0" + digest)
    return whole.hexdigest()


def differing(specs: Sequence[TensorSpec], ours: bytes, theirs: bytes) -> list[str]:
    """Names of the parameters whose digests differ, in the order of ``specs``.

    Raises ValueError if there are not as many digests as parameters.
    """
    pairs = zip(_each(ours, len(specs)), _each(theirs, len(specs)), strict=True)
    return [spec.name for spec, (a, b) in zip(specs, pairs, strict=True) if a != b]


def _each(digests: bytes, expected: int) -> list[bytes]:
    if len(digests) != expected * DIGEST_BYTES:
        raise ValueError(f"{len(digests)} bytes of digests for {expected} parameters")
    return [digests[i : i + DIGEST_BYTES] for i in range(0, len(digests), DIGEST_BYTES)]


def num_chunks(num_bytes: int) -> int:
    """Chunks of `CHUNK_BYTES`, the last one possibly shorter."""
    return -(-num_bytes // CHUNK_BYTES)


def item_bytes(specs: Sequence[TensorSpec]) -> int:
    """Size of one number, for differences: the smallest type's among the parameters."""
    return min((DTYPE_BYTES[spec.dtype] for spec in specs), default=1)
