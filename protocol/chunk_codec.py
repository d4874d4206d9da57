"""How a chunk of packed weights is encoded for the wire: whole, or as the difference to another.

A patch leads from the bytes of one version to those of another, bit for bit:

    patch = zstd(planes(base XOR data))         data = base XOR unplanes(unzstd(patch))

XOR is taken byte by byte, so patches compose: target at b, with b -> b+1, b+1 -> b+2, ... applied,
is at the newest; and each also leads back. ``planes`` of words of ``width`` bytes (the item size of
the weights) are the lowest bytes of all words, then the next higher ones, up to the highest; bytes
after the last whole word stay at the end as they are. The zstd stream is one frame that states its
content size, the chunk's length. A compressed whole chunk is a patch of a chunk of zeros.

Measured on one core: 29 million weights, trained in float32, that one step of AdamW moved at the
learning rates 1e-6, 1e-5 and 1e-4. The percentage of the plain bytes that is left, then GB/s of
plain bytes, encode / apply (`benchmarks/delta.py` measures what was chosen):

                        sent as bfloat16                              sent as float32
    zstd level 1        1e-6           1e-5           1e-4            1e-6           1e-4
    XOR                 2.0 1.5/2.5    9.7 0.5/1.1    27.7 0.3/0.9    51.1 0.3/0.9   71.7 0.6/1.2
    XOR, planes         1.9 1.4/1.9    8.5 0.6/1.1    21.3 0.5/1.3    38.9 0.8/1.4   60.7 0.7/1.4
    minus               2.1 1.5/2.5    9.5 0.5/1.1    25.2 0.3/0.9    52.1 0.3/0.9   72.4 0.9/1.3
    minus, planes       2.6 1.0/1.6   11.8 0.4/0.8    27.6 0.3/0.8    46.4 0.4/0.9   64.0 0.5/1.1
    zigzag, planes      1.7 1.2/1.3    7.8 0.6/0.9    18.8 0.4/1.1    37.0 0.7/1.2   59.0 0.6/1.1
    level -5: XOR, p.   4.6 1.5/2.0   15.6 0.7/1.2    36.3 0.6/1.5    51.5 1.1/1.7   68.3 0.8/1.5
    level 3: XOR, p.    1.8 1.2/1.8    8.4 0.5/1.1    22.6 0.3/1.2    40.0 0.5/1.2   61.3 0.5/1.4

Of the bfloat16 weights that change, 84 % change by one unit in the last place (at 1e-5). Minus
(modulo 2^16 or 2^32) gives 0x0001 or 0xFFFF for it, the second of which spoils both planes; zigzag,
(d << 1) ^ (d >> 15), mends that and is the smallest, by 3 to 12 % of what is sent, but costs 16 to
30 % of the speed of applying, on every actor, and has the words put together for every patch, not
once for all. Planes pay in size and, where many weights change, in speed as well: zstd gets through
the even high bytes quickly. Level -5 sends up to two and a half times as much; level 3 encodes up
to 45 % slower and saves nothing.
"""

import threading
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import xxhash
import zstandard

from protocol.errors import BadMessage, brief, one_line
from protocol.framing import Buffer

Encoding = Literal["raw", "zstd"]
"""Encoding of a whole chunk."""

_Bytes: TypeAlias = npt.NDArray[np.uint8]

_LEVEL = 1
_WORDS = {1: "<u1", 2: "<u2", 4: "<u4"}


class _Workspace(threading.local):
    """Memory of one thread: new memory for every chunk costs as much time as the encoding itself.

    (Freed megabytes go back to the system, and the next ones are mapped page by page.)
    """

    def __init__(self) -> None:
        self.compressor = zstandard.ZstdCompressor(level=_LEVEL)
        self.decompressor = zstandard.ZstdDecompressor()
        self._difference = self._planes = np.empty(0, dtype=np.uint8)

    def difference(self, length: int) -> _Bytes:
        """Memory for a difference of that length."""
        if len(self._difference) < length:
            self._difference = np.empty(length, dtype=np.uint8)
        return self._difference[:length]

    def planes(self, length: int) -> _Bytes:
        """Memory for planes of that length."""
        if len(self._planes) < length:
            self._planes = np.empty(length, dtype=np.uint8)
        return self._planes[:length]


_workspace = _Workspace()


def checksum(data: Buffer) -> str:
    """XXH3-64 of a chunk's plain bytes, in hex (16 digits): against mistakes, not malice."""
    return xxhash.xxh3_64_hexdigest(data)


def encode_full(data: Buffer, width: int, *, compress: bool) -> tuple[Encoding, Buffer]:
    """A whole chunk: ``data`` itself, or compressed if that is asked for and smaller.

    Trained weights shrink to about 70 % (bfloat16) or 85 % (float32), at 0.6 GB/s.
    """
    plain = _bytes_of(data)
    if compress:
        compressed = _compress(plain, width)
        if len(compressed) < len(plain):
            return "zstd", compressed
    return "raw", data


def decode_full(encoding: str, payload: Buffer, target: Buffer, width: int) -> None:
    """Write a whole chunk into ``target``, of the chunk's length.

    Raises `BadMessage`, with ``target`` as it was, if the payload is no chunk of that length.
    """
    goal = _bytes_of(target)
    if encoding == "raw":
        plain = _bytes_of(payload)
        if len(plain) != len(goal):
            raise BadMessage(f"a chunk of {len(plain)} bytes, where {len(goal)} are wanted")
        goal[:] = plain
    elif encoding == "zstd":
        _from_planes(_decompress(payload, len(goal)), goal, width)
    else:
        raise BadMessage(f"a chunk in the encoding {one_line(encoding, 40)!r}")


def encode_patch(base: Buffer, data: Buffer, width: int) -> bytes:
    """The patch that turns ``base`` into ``data``, of the same length.

    A chunk that did not change takes some fifty bytes; one that changed beyond recognition takes
    as many as ``data``, and a few more: then send it whole.
    """
    old, new = _bytes_of(base), _bytes_of(data)
    if len(old) != len(new):
        raise ValueError(f"no patch leads from {len(old)} bytes to {len(new)}")
    difference = _workspace.difference(len(new))
    np.bitwise_xor(old, new, out=difference)
    return _compress(difference, width)


def apply_patches(target: Buffer, patches: Sequence[Buffer], width: int) -> None:
    """Bring ``target`` forward, in place, by patches that follow each other.

    Only its `checksum` tells whether it then is what it ought to be. Raises `BadMessage`, with
    ``target`` as it was, if any of them is no patch of its length. Takes memory for three times
    that length at most, whatever the patches claim and however many there are.
    """
    goal = _bytes_of(target)
    if not patches:
        return
    planes = _decompress(patches[0], len(goal))
    if len(patches) > 1:
        gathered = _workspace.planes(len(goal))
        gathered[:] = planes
        planes = gathered
        for patch in patches[1:]:
            np.bitwise_xor(planes, _decompress(patch, len(goal)), out=planes)
    difference = _workspace.difference(len(goal))
    _from_planes(planes, difference, width)
    np.bitwise_xor(goal, difference, out=goal)


def _bytes_of(data: Buffer) -> _Bytes:
    return np.frombuffer(data, dtype=np.uint8)


def _compress(data: _Bytes, width: int) -> bytes:
    planes = _workspace.planes(len(data))
    whole, words, rows = _words_and_rows(data, planes, width)
    for byte, row in enumerate(rows):
        # Several times as fast as copying every width-th byte.
        np.right_shift(words, 8 * byte, out=row, casting="unsafe")
    planes[whole:] = data[whole:]
    return _workspace.compressor.compress(planes.data)


def _from_planes(planes: _Bytes, data: _Bytes, width: int) -> None:
    """Write the words that have these planes into ``data``."""
    whole, words, rows = _words_and_rows(data, planes, width)
    words[:] = rows[-1]
    for row in rows[-2::-1]:
        np.left_shift(words, 8, out=words)
        np.bitwise_or(words, row, out=words)
    data[whole:] = planes[whole:]


def _words_and_rows(
    data: _Bytes, planes: _Bytes, width: int
) -> tuple[int, npt.NDArray[Any], _Bytes]:
    """Bytes in whole words, and views of the words [n] and of their planes [width, n]."""
    if width not in _WORDS:
        raise ValueError(f"words of {width} bytes")
    words = len(data) // width
    whole = words * width
    return whole, data[:whole].view(_WORDS[width]), planes[:whole].reshape(width, words)


def _decompress(payload: Buffer, length: int) -> _Bytes:
    """The content of a frame that must have ``length`` bytes; raises `BadMessage`."""
    size = memoryview(payload).nbytes
    # zstd's own bound is length + length / 256 + 64. More can only be frames of empty blocks,
    # which take time and give nothing.
    if size > length + length // 128 + 128:
        raise BadMessage(f"{size} compressed bytes for a chunk of {length}")
    try:
        frame = zstandard.get_frame_parameters(payload)
        # zstd takes memory as these two say; no content needs a window larger than itself.
        if frame.content_size != length or frame.window_size > length:
            raise BadMessage(
                f"compressed chunk of {frame.content_size} bytes with a window of "
                f"{frame.window_size}, where {length} are wanted"
            )
        plain = _workspace.decompressor.decompress(payload, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise BadMessage(f"not a compressed chunk: {brief(error)}") from error
    if len(plain) != length:
        # A skippable frame states a size, too; zstandard 0.23 returns nothing for it.
        raise BadMessage(f"compressed chunk of {len(plain)} bytes, where {length} are wanted")
    return np.frombuffer(plain, dtype=np.uint8)
