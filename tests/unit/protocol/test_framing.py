"""Messages to frames and back, and what becomes of frames that are no message."""

import math
from random import Random
from typing import get_args

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol import framing, messages
from protocol.errors import BadMessage
from protocol.framing import decode_to_actor, decode_to_learner, encode
from protocol.messages import ToActor, ToLearner
from tests.unit.wire_examples import DECODERS, EXAMPLES, STATUS, decoder_of

PAYLOADS = (b"", b"1234", bytearray(8), memoryview(b"abc"))


def tree(**changes):
    """A good Status as a plain map, with changes; None removes a field."""
    fields = msgpack.unpackb(encode(STATUS)[0]) | changes
    return {name: value for name, value in fields.items() if value is not None}


def pairs(*keys_and_values):
    """A msgpack map as it is not possible from a dict: with keys twice, or of any type."""
    packed = b"".join(msgpack.packb(item) for item in keys_and_values)
    return bytes([0x80 | len(keys_and_values) // 2]) + packed


def goodbye(packed_cause: bytes) -> bytes:
    """A Goodbye whose cause is any msgpack."""
    return b"\x82" + msgpack.packb("type") + msgpack.packb("goodbye") + b"\xa5cause" + packed_cause


# ---- Good messages -----------------------------------------------------------------------------


def test_every_type_of_message_has_an_example():
    types = {*get_args(ToLearner), *get_args(ToActor)}
    assert {type(example) for example in EXAMPLES} == types
    assert {t for t in messages.Header.__subclasses__()} == types


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda e: type(e).__name__)
def test_a_message_comes_back_as_it_was_with_its_payloads(example):
    header, payloads = decoder_of(example)(encode(example, PAYLOADS))
    assert header.sizes == (0, 4, 8, 3)
    assert [bytes(payload) for payload in payloads] == [bytes(p) for p in PAYLOADS]
    assert all(payload.readonly for payload in payloads)
    assert encode(header, payloads)[0] == encode(example, PAYLOADS)[0]


def test_sizes_count_bytes_of_payloads_not_their_elements():
    frames = encode(messages.Goodbye(cause="x"), [memoryview(bytearray(12)).cast("i")])
    assert decode_to_learner(frames)[0].sizes == (12,)


# ---- Bad messages ------------------------------------------------------------------------------

BAD_HEADERS = {
    "nothing": b"",
    "nil": msgpack.packb(None),
    "a list": msgpack.packb([1]),
    "a string": msgpack.packb("goodbye"),
    "an extension": msgpack.packb(msgpack.ExtType(5, b"ab")),
    "a reserved byte": b"\xc1",
    "an empty map": msgpack.packb({}),
    "half a map": msgpack.packb(tree())[:-4],
    "trailing bytes": msgpack.packb(tree()) + b"\x00",
    "two messages": msgpack.packb(tree()) * 2,
    "no type": msgpack.packb(tree(type=None)),
    "an unknown type": msgpack.packb(tree(type="statusx")),
    "a type that is bytes": msgpack.packb(tree(type=b"status")),
    "a type that is a list": msgpack.packb(tree(type=["status"])),
    "a missing field": msgpack.packb(tree(capacity=None)),
    "an unknown field": msgpack.packb(tree(extra=1)),
    "a string for a number": msgpack.packb(tree(capacity="4")),
    "a float for a whole number": msgpack.packb(tree(capacity=4.0)),
    "a bool for a whole number": msgpack.packb(tree(capacity=True)),
    "a string for seconds": msgpack.packb(tree(idle_seconds="1")),
    "a bytes key": pairs("type", "goodbye", b"cause", "x"),
    "a number as key": pairs("type", "goodbye", "cause", "x", 1, 2),
    "a nil key": pairs("type", "goodbye", "cause", "x", None, 2),
    "a list as key": pairs("type", "goodbye", "cause", "x", [1], 2),
    "a field twice": pairs("type", "goodbye", "cause", "x", "cause", "y"),
    "the type twice": pairs("type", "hello", "type", "goodbye", "cause", "x"),
    "invalid UTF-8": goodbye(b"\xa2\xed\xa0"),
    "bytes for a string": goodbye(msgpack.packb(b"x")),
    "an extension for a string": goodbye(msgpack.packb(msgpack.ExtType(5, b"ab"))),
    "a timestamp for a string": goodbye(msgpack.packb(msgpack.Timestamp(1, 2))),
    "a broken timestamp": goodbye(b"\xc7\x03\xff123"),
    "a string of 4 GiB": goodbye(b"\xdb\xff\xff\xff\xff"),
    "an extension of 4 GiB": goodbye(b"\xc9\xff\xff\xff\xff\x05"),
    "a list of 4 billion": goodbye(b"\xdd\xff\xff\xff\xff"),
    "a map of 4 billion": b"\xdf\xff\xff\xff\xff",
    "a header over the limit": goodbye(msgpack.packb("x" * framing.MAX_HEADER_BYTES)),
    "a thousand nested lists": goodbye(b"\x91" * 1000 + b"\xc0"),
    "a million nested lists": goodbye(b"\x91" * 1_000_000 + b"\xc0"),
    "a million nested maps": goodbye(b"\x81\xa1a" * 1_000_000 + b"\xc0"),
    "a size too many": msgpack.packb(tree(sizes=[0])),
    "a negative size": msgpack.packb(tree(sizes=[-1])),
    "sizes that are no list": msgpack.packb(tree(sizes=4)),
    "seconds that are NaN": msgpack.packb(tree(uptime_seconds=math.nan)),
    "seconds that are infinite": msgpack.packb(tree(idle_seconds=math.inf)),
    "seconds that are negative": msgpack.packb(tree(stall_seconds=-1.0)),
    "a negative capacity": msgpack.packb(tree(capacity=-1)),
}


@pytest.mark.parametrize("header", BAD_HEADERS.values(), ids=BAD_HEADERS.keys())
def test_a_malformed_header_is_a_bad_message(header):
    with pytest.raises(BadMessage):
        decode_to_learner([header])


def test_frames_that_disagree_with_the_header_are_a_bad_message():
    header, *payloads = encode(STATUS, [b"1234", b"12345678"])
    for wrong in ([], [b"1234"], [b"12345678", b"1234"], [*payloads, b""], [b"1234", b"1234567"]):
        with pytest.raises(BadMessage, match="the header declares"):
            decode_to_learner([header, *wrong])


def test_a_message_without_frames_or_with_too_many_is_a_bad_message():
    for frames in ([], encode(STATUS, [b""] * framing.MAX_FRAMES)):
        with pytest.raises(BadMessage, match="frames"):
            decode_to_learner(frames)
    assert decode_to_learner(encode(STATUS, [b""] * (framing.MAX_FRAMES - 1)))


def test_a_payload_over_the_limit_is_a_bad_message(monkeypatch):
    monkeypatch.setattr(framing, "MAX_PAYLOAD_BYTES", 8)
    assert decode_to_learner(encode(STATUS, [bytes(8)]))
    with pytest.raises(BadMessage, match="exceeds 8"):
        decode_to_learner(encode(STATUS, [bytes(9)]))


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda e: type(e).__name__)
def test_a_message_in_the_wrong_direction_is_a_bad_message(example):
    [other] = [decode for _, decode in DECODERS if decode is not decoder_of(example)]
    with pytest.raises(BadMessage):
        other(encode(example))


# ---- Anything at all ---------------------------------------------------------------------------


def decode_or_refuse(frames):
    for decode in (decode_to_learner, decode_to_actor):
        try:
            decode(frames)
        except BadMessage:
            continue
    assert decode_to_learner(encode(STATUS))[0] == STATUS


@settings(max_examples=1000, deadline=None)
@given(st.lists(st.binary(max_size=40), max_size=3))
def test_random_frames_raise_nothing_but_bad_message(frames):
    decode_or_refuse(frames)


def mutate(random: Random, frame: bytes) -> bytes:
    """A few bytes changed, left out or put in, half of the time with a cut at the end."""
    mutant = bytearray(frame)
    for _ in range(random.randint(1, 4)):
        at = random.randrange(len(mutant))
        new = random.randbytes(random.randint(0, 3))
        mutant[at : at + random.randint(0, 3)] = new
        mutant = mutant or bytearray(b"\x00")
    return bytes(mutant[: random.randint(0, len(mutant))] if random.random() < 0.5 else mutant)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(EXAMPLES), st.integers(0, 2**32))
def test_mutated_messages_raise_nothing_but_bad_message(example, seed):
    random = Random(seed)
    header, *payloads = encode(example, [b"1234"])
    for _ in range(20):
        decode_or_refuse([mutate(random, bytes(header)), *payloads])
