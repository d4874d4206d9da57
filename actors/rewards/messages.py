"""The messages between an actor and its reward processes.

    actor -> process   Load  Call
    process -> actor   Reply, one to each

A frame is the length of a msgpack message (4 bytes, little-endian) and the message. Neither side
ever decodes anything but these types.
"""

from typing import Any, Literal

import msgspec

from protocol.messages import FinishReason

LENGTH_BYTES = 4
MAX_REPLY_BYTES = 1 << 20
"""The scores of the largest group, 65,536 rollouts, take 576 KiB."""


class Load(msgspec.Struct, frozen=True, tag="load"):
    """Import a reward function, by the rules of `actors.rewards.functions.load_reward`."""

    reward: str
    function: str
    allowed_modules: tuple[str, ...]
    folder: str


class Call(msgspec.Struct, frozen=True, tag="call"):
    """Score the G completions of one data row."""

    reward: str
    row: dict[str, Any]
    completions: list[str]
    """[G]"""
    completion_ids: list[list[int]]
    """[G][tokens]"""
    finish: list[FinishReason]
    """[G]"""
    arguments: dict[str, Any] = {}
    """What the configuration passes besides, by name."""


class Reply(msgspec.Struct, frozen=True, omit_defaults=True):
    """``scores`` [G], or what went wrong in one line."""

    scores: list[float | None] = []
    problem: str = ""
    kind: Literal["raised", "invalid"] = "raised"
    """Kind of the problem: the function raised, or returned something other than scores."""


def frame(message: msgspec.Struct) -> bytes:
    """The bytes of a message, its length first."""
    body = msgspec.msgpack.encode(message)
    return len(body).to_bytes(LENGTH_BYTES, "little") + body


decode_request = msgspec.msgpack.Decoder(Load | Call).decode
decode_reply = msgspec.msgpack.Decoder(Reply).decode
