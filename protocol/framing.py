"""Messages to ZeroMQ frames and back; the only place that decodes bytes from the network.

Decoding is bounded (number of frames, header bytes, lengths and depth inside the header), then
validated against the types of `protocol.messages`, then the payload frames are checked against
the sizes that the header declares. Whatever is wrong becomes `BadMessage`.
"""

from collections.abc import Sequence
from typing import Any, TypeAlias

import msgpack
import msgspec

from protocol.errors import BadMessage, brief
from protocol.messages import MAX_PAYLOADS, Header, ToActor, ToLearner

Buffer: TypeAlias = bytes | bytearray | memoryview

MAX_FRAMES = 1 + MAX_PAYLOADS
MAX_HEADER_BYTES = 4 << 20
"""Largest header of a message to an actor; a lease carries a data row."""
MAX_HEADER_BYTES_TO_LEARNER = 128 << 10
MAX_PAYLOAD_BYTES = 256 << 20
"""Largest payload frame; weights travel in chunks far below it."""


def encode(header: Header, payloads: Sequence[Buffer] = ()) -> list[Buffer]:
    """Frames of one message: the header with the payloads' sizes filled in, then the payloads."""
    sizes = tuple(memoryview(payload).nbytes for payload in payloads)
    return [msgspec.msgpack.encode(msgspec.structs.replace(header, sizes=sizes)), *payloads]


def decode_to_learner(frames: Sequence[Buffer]) -> tuple[ToLearner, list[memoryview]]:
    """A message from an actor and its payload frames; raises `BadMessage`."""
    return _decode(frames, ToLearner, MAX_HEADER_BYTES_TO_LEARNER)


def decode_to_actor(frames: Sequence[Buffer]) -> tuple[ToActor, list[memoryview]]:
    """A message from the learner and its payload frames; raises `BadMessage`."""
    return _decode(frames, ToActor, MAX_HEADER_BYTES)


def _decode(
    frames: Sequence[Buffer], types: Any, max_header_bytes: int
) -> tuple[Any, list[memoryview]]:
    if not 1 <= len(frames) <= MAX_FRAMES:
        raise BadMessage(f"{len(frames)} frames; a message has 1 to {MAX_FRAMES}")
    header = _decode_header(frames[0], types, max_header_bytes)
    payloads = [memoryview(frame).toreadonly() for frame in frames[1:]]
    actual = tuple(payload.nbytes for payload in payloads)
    if actual != header.sizes:
        raise BadMessage(f"payload frames have {actual} bytes, the header declares {header.sizes}")
    if actual and max(actual) > MAX_PAYLOAD_BYTES:
        raise BadMessage(f"a payload frame of {max(actual)} bytes exceeds {MAX_PAYLOAD_BYTES}")
    return header, payloads


def _decode_header(frame: Buffer, types: Any, max_bytes: int) -> Any:
    if memoryview(frame).nbytes > max_bytes:
        raise BadMessage(f"header frame exceeds {max_bytes} bytes")
    try:
        # This stops at the first wrong value, before a header of empty lists becomes fifty times
        # its size in memory. But it accepts a field given twice, and any depth.
        msgspec.msgpack.decode(frame, type=types)
        # This limits lengths to the size of the frame, and bounds the depth.
        untyped = msgpack.unpackb(
            frame, raw=False, strict_map_key=True, object_pairs_hook=_unique_keys
        )
        return msgspec.convert(untyped, types, strict=True)
    except (
        msgspec.MsgspecError,
        msgpack.exceptions.UnpackException,
        ValueError,
        OverflowError,
        RecursionError,
    ) as error:
        # The error quotes the message: names of unknown fields, for example.
        raise BadMessage(f"not a valid message: {brief(error)}") from error


def _unique_keys(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    """A map; one that names a key twice could mean two things."""
    result = dict(pairs)
    if len(result) < len(pairs):
        raise ValueError("a map with a key twice")
    return result
