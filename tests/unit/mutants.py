"""Hostile frames without end, from a seed: good messages, changed where it may hurt.

Changed as bytes, as trees (right keys, wrong values), as payload words, and as lists of frames.
"""

import math
import struct
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

import msgpack

from protocol.framing import Buffer
from tests.unit.factories import VOCAB

Frames = list[bytes]

_WORDS = (
    *(struct.pack("<i", n) for n in (0, 1, 2, 3, -1, 7, 8, 9, VOCAB - 1, VOCAB)),
    *(struct.pack("<i", n) for n in (2**31 - 1, -(2**31), 1 << 16)),
    *(struct.pack("<f", x) for x in (0.0, -0.0, -1.0, 1.0, 1e-7, -3e38, 3e38, 1e-45)),
    *(struct.pack("<f", x) for x in (math.nan, math.inf, -math.inf)),
    b"\x01\x00\xc0\xff",
)
"""Of payloads: edges of int32, of the vocabulary, and the numbers that are none."""
_VALUES: tuple[Any, ...] = (
    None,
    True,
    False,
    *(0, 1, -1, 2, 5, 100, 65_535, 65_536, 2**31 - 1, 2**31, 2**53, 2**63 - 1, 2**64 - 1, -(2**63)),
    *(0.0, -0.0, -1.0, 0.5, 1e12, 1e300, math.nan, math.inf, -math.inf),
    *("", "a", "b", "stop", "length", "stream", "x" * 300),
    *("a\nb", "\x1b[2J", "\u202e", "é", "\x00", "../evil.json", "a/b.json", "b.json"),
    *(b"", b"\xff", [], {}, [1], ["stop", "stop"], {"a": 1}, [[["w"]]]),
    msgpack.ExtType(5, b"ab"),
    msgpack.Timestamp(1, 2),
)
_BYTES = b"\x00\x01\x7f\x80\x8f\x90\x9f\xa0\xbf\xc0\xc1\xc4\xc7\xca\xcb\xcf\xd3\xd9\xdb\xdd\xdf\xff"


class Mutants:
    """Mutants of the examples given; ``next`` starts from any of them, or from what is given."""

    def __init__(self, random: Random, examples: Sequence[Sequence[Buffer]]) -> None:
        self._random = random
        self._examples = [list(map(bytes, frames)) for frames in examples]
        self._ways: tuple[Callable[[Frames], Frames], ...] = (
            self._change_bytes,
            self._change_tree,
            self._change_tree,
            self._change_payload,
            self._change_frames,
            self._splice,
        )

    def next(self, frames: Sequence[Buffer] | None = None) -> Frames:
        """One or several changes of one message."""
        mutant = list(map(bytes, self._random.choice(self._examples) if frames is None else frames))
        for _ in range(self._random.choice((1, 1, 1, 2, 3))):
            mutant = self._random.choice(self._ways)(mutant)
        return mutant

    def valid_header(self, frames: Sequence[Buffer]) -> Frames:
        """Only payload words change, and the header tells their true sizes: it goes deepest."""
        mutant = list(map(bytes, frames))
        for _ in range(self._random.choice((1, 1, 2))):
            mutant = self._change_payload(mutant)
        return _with_header(mutant, {"sizes": [len(frame) for frame in mutant[1:]]})

    # --- ways to change a message ---------------------------------------------------------------

    def _change_bytes(self, frames: Frames) -> Frames:
        """A few bytes of one frame changed, left out or put in, or the frame cut."""
        if not frames:
            return frames
        index = self._random.randrange(len(frames))
        mutant = bytearray(frames[index])
        for _ in range(self._random.randint(1, 4)):
            at = self._random.randrange(len(mutant) + 1)
            put_in = self._random.choice(
                (b"", self._random.randbytes(2), self._random.choice(_BYTES).to_bytes())
            )
            mutant[at : at + self._random.randint(0, 3)] = put_in
        if self._random.random() < 0.2:
            del mutant[self._random.randrange(len(mutant) + 1) :]
        return [*frames[:index], bytes(mutant), *frames[index + 1 :]]

    def _change_tree(self, frames: Frames) -> Frames:
        """Fields of the header with other values, of other messages, too many or too few."""
        fields = _fields(frames)
        if not fields:
            return frames
        name = self._random.choice(list(fields))
        kind = self._random.random()
        if kind < 0.7:
            fields[name] = self._value(fields[name])
        elif kind < 0.8:
            del fields[name]
        elif kind < 0.9:
            fields |= _fields(self._random.choice(self._examples)) or {}
        else:
            fields[str(self._value("extra"))] = self._value(None)
        return [pack_tree(fields), *frames[1:]]

    def _change_payload(self, frames: Frames) -> Frames:
        """Words of one payload changed, taken out, or more of them; the header does not know."""
        if len(frames) < 2:
            return frames
        index = self._random.randrange(1, len(frames))
        mutant = bytearray(frames[index])
        at = self._random.randrange(len(mutant) // 4 + 1) * 4
        kind = self._random.random()
        if kind < 0.2:
            # A row once more: of version spans, for example.
            mutant[at:at] = mutant[max(0, at - 12) : at]
        if kind < 0.4 and len(mutant) >= 4:
            at = min(at + 4 * self._random.randrange(3), len(mutant) // 4 * 4 - 4)
            number = int.from_bytes(mutant[at : at + 4], "little") + self._random.choice((-1, 1))
            mutant[at : at + 4] = (number % 2**32).to_bytes(4, "little")
            return [*frames[:index], bytes(mutant), *frames[index + 1 :]]
        words = b"".join(self._random.choices(_WORDS, k=self._random.choice((1, 1, 1, 2, 0))))
        mutant[at : at + self._random.choice((len(words), len(words), 0, 4))] = words
        return [*frames[:index], bytes(mutant), *frames[index + 1 :]]

    def _change_frames(self, frames: Frames) -> Frames:
        """Frames left out, doubled, in another order, or a great many."""
        mutant = list(frames)
        kind = self._random.randrange(5)
        if kind == 0:
            return mutant[: self._random.randrange(len(mutant) + 1)]
        if kind == 1:
            self._random.shuffle(mutant)
        elif kind == 2:
            mutant += [b""] * self._random.choice((1, 1, 63, 200))
        elif kind == 3 and mutant:
            mutant.append(self._random.choice(mutant))
        else:
            mutant.insert(0, self._random.randbytes(self._random.randint(0, 40)))
        return mutant

    def _splice(self, frames: Frames) -> Frames:
        """The beginning of one header and the end of another."""
        other = self._random.choice(self._examples)
        if not frames:
            return list(other)
        head, tail = frames[0], other[0]
        cut, resume = self._random.randrange(len(head) + 1), self._random.randrange(len(tail) + 1)
        return [head[:cut] + tail[resume:], *self._random.choice((frames, other))[1:]]

    def _value(self, old: Any) -> Any:
        """Another value: any, one near the old one, or one that contains it."""
        kind = self._random.random()
        if kind < 0.15 and isinstance(old, int):
            return old + self._random.choice((-1, 1, 2**31, 2**32))
        if kind < 0.25:
            # Lists of lists of lists would fill all memory of their own accord.
            return [old] * self._random.choice((1, 2) if isinstance(old, list) else (1, 100, 2000))
        if kind < 0.3:
            return {"a": old}
        if kind < 0.6 and isinstance(old, list) and old:
            at = self._random.randrange(len(old))
            new = self._random.choice(([], [old[at]] * 2, [self._value(old[at])]))
            return [*old[:at], *new, *old[at + 1 :]]
        if kind < 0.42:
            return "x" * self._random.choice((10_000, 200_000))
        if kind < 0.45:
            value: Any = None
            for _ in range(self._random.choice((10, 300))):
                value = [value]
            return value
        return self._random.choice(_VALUES)


def _fields(frames: Frames) -> dict[str, Any] | None:
    """The header as a map, as long as it is still one."""
    try:
        fields = msgpack.unpackb(frames[0])
    except (ValueError, msgpack.exceptions.UnpackException, IndexError):
        return None
    return fields if isinstance(fields, dict) else None


def pack_tree(fields: dict[str, Any]) -> bytes:
    try:
        packed: bytes = msgpack.packb(fields)
    except (ValueError, OverflowError):
        # A number that msgpack has no room for.
        return b"\xc1"
    return packed


def _with_header(frames: Frames, changes: dict[str, Any]) -> Frames:
    return [pack_tree((_fields(frames) or {}) | changes), *frames[1:]]
