"""Chunks of weights on the wire: bit for bit what went in, or `BadMessage`; never more memory."""

import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from random import Random
from typing import Any

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.chunk_codec import (
    apply_patches,
    checksum,
    decode_full,
    encode_full,
    encode_patch,
)
from protocol.errors import BadMessage
from protocol.framing import Buffer
from protocol.weights import CHUNK_BYTES

widths = st.sampled_from([1, 2, 4])
SPECIAL_BF16 = (0x0000, 0x8000, 0x0001, 0x8001, 0x007F, 0x7F80, 0xFF80, 0x7FC0, 0xFFC1, 0x7F81)
"""0, -0, smallest and largest denormals, infinities, and three NaNs, one of them signalling."""
SPECIAL_FP32 = tuple(pattern << 16 | low for pattern in SPECIAL_BF16 for low in (0, 1, 0xFFFF))


def compressed(content: bytes, **settings_: Any) -> bytes:
    return zstandard.ZstdCompressor(level=1, **settings_).compress(content)


def content_of(patch: bytes) -> bytes:
    return zstandard.ZstdDecompressor().decompress(patch)


def patched(base: bytes, patches: list[bytes], width: int) -> bytes:
    target = bytearray(base)
    apply_patches(target, patches, width)
    return bytes(target)


def decoded(encoding: Any, payload: Buffer, length: int, width: int) -> bytes:
    target = bytearray(length)
    decode_full(encoding, payload, target, width)
    return bytes(target)


def random_weights(num_bytes: int = CHUNK_BYTES, seed: int = 0) -> bytes:
    """Of bfloat16: the upper halves of normally distributed float32 numbers."""
    values = np.random.default_rng(seed).normal(0, 0.02, num_bytes // 2).astype("<f4")
    return (values.view("<u4") >> 16).astype("<u2").tobytes()


def moved(weights: bytes, share: float, seed: int = 0) -> bytes:
    """Some of the bfloat16 weights one unit in the last place up or down."""
    random = np.random.default_rng(seed)
    words = np.frombuffer(weights, "<u2").copy()
    chosen = random.random(len(words)) < share
    words[chosen] += random.choice(np.array([1, 0xFFFF], "<u2"), chosen.sum())
    return words.tobytes()


@st.composite
def versions(draw: st.DrawFn) -> list[bytes]:
    """Two to five chunks of one length, from unrelated to nearly equal."""
    length = draw(st.integers(0, 70))
    chunk = st.binary(min_size=length, max_size=length)
    result = [draw(chunk)]
    for _ in range(draw(st.integers(1, 4))):
        if draw(st.booleans()) and length:
            changed = bytearray(result[-1])
            changed[draw(st.integers(0, length - 1))] ^= draw(st.integers(0, 255))
            result.append(bytes(changed))
        else:
            result.append(draw(chunk))
    return result


# ---- What goes in comes out --------------------------------------------------------------------


@settings(deadline=None)
@given(st.binary(max_size=200), widths, st.booleans())
def test_a_whole_chunk_of_any_bytes_survives(data, width, compress):
    encoding, payload = encode_full(data, width, compress=compress)
    assert len(payload) <= len(data)
    assert decoded(encoding, payload, len(data), width) == data


@settings(max_examples=300, deadline=None)
@given(versions(), widths)
def test_patches_between_consecutive_versions_compose(chunks, width):
    patches = [encode_patch(a, b, width) for a, b in pairwise(chunks)]
    for start in range(len(chunks)):
        for stop in range(start, len(chunks)):
            assert patched(chunks[start], patches[start:stop], width) == chunks[stop]


@pytest.mark.parametrize("length", [1, 2, 3, 5, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 3])
@pytest.mark.parametrize("width", [1, 2, 4])
def test_any_length_does_also_one_that_is_no_multiple_of_the_width(length, width):
    random = Random(length)
    base, data = random.randbytes(length), random.randbytes(length)
    assert patched(base, [encode_patch(base, data, width)], width) == data
    # Zeros but for the tail, so that it is smaller compressed where it is long.
    ends = bytes(length - 1) + b"\x01"
    assert decoded(*encode_full(ends, width, compress=True), length, width) == ends


@pytest.mark.parametrize(("patterns", "width"), [(SPECIAL_BF16, 2), (SPECIAL_FP32, 4)])
def test_every_special_float_becomes_every_other_bit_for_bit(patterns, width):
    pairs = [(a, b) for a in patterns for b in patterns]
    base, data = (np.array(column, f"<u{width}").tobytes() for column in zip(*pairs, strict=True))
    assert patched(base, [encode_patch(base, data, width)], width) == data
    assert decoded(*encode_full(data, width, compress=True), len(data), width) == data


def test_memory_of_any_kind_and_alignment_does():
    memory = bytearray(b"\xff" + random_weights(4096) + b"\xff")
    base, data = bytes(memory[1:-1]), moved(bytes(memory[1:-1]), 0.1)
    patch = encode_patch(memoryview(memory)[1:-1], np.frombuffer(data, np.int16).data, 2)
    apply_patches(memoryview(memory)[1:-1], [memoryview(patch)], 2)
    assert memory == b"\xff" + data + b"\xff"
    decode_full("raw", memoryview(base), memoryview(memory)[1:-1], 2)
    assert memory == b"\xff" + base + b"\xff"
    array = np.frombuffer(base, np.uint8).copy()
    apply_patches(array.data, [patch], 2)
    assert array.tobytes() == data


def test_a_raw_chunk_is_sent_without_a_copy():
    data = random_weights(64)
    assert encode_full(data, 2, compress=False) == ("raw", data)
    assert encode_full(data, 2, compress=False)[1] is data


def test_threads_do_not_disturb_each_other():
    def work(seed: int) -> bool:
        base = random_weights(seed=seed)
        chunks = [base, moved(base, 0.1, seed), moved(base, 0.5, seed)]
        patches = [encode_patch(chunks[i], chunks[i + 1], 2) for i in (0, 1)]
        return patched(base, patches, 2) == chunks[2]

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(24)))


# ---- Size --------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1, 2, 4])
def test_a_chunk_that_did_not_change_takes_a_few_bytes(width):
    data = random_weights()
    assert len(encode_patch(data, data, width)) < 64


@pytest.mark.parametrize(("share", "limit"), [(0.01, 0.02), (0.1, 0.09), (0.5, 0.2)])
def test_a_patch_is_as_small_as_the_change(share, limit):
    # The entropy of (unchanged, up, down) is 0.09, 0.57 and 1.5 of a weight's 16 bits, which is
    # 0.6 %, 3.6 % and 9.4 %.
    data = random_weights()
    assert len(encode_patch(data, moved(data, share), 2)) < limit * len(data)


def test_a_patch_between_unrelated_chunks_is_hardly_longer_than_a_chunk():
    random = Random(0)
    base, data = random.randbytes(CHUNK_BYTES), random.randbytes(CHUNK_BYTES)
    patch = encode_patch(base, data, 2)
    assert len(patch) < CHUNK_BYTES + 128
    assert patched(base, [patch], 2) == data


def test_planes_make_whole_chunks_smaller_and_are_only_used_where_they_do():
    weights = random_weights()
    encoding, payload = encode_full(weights, 2, compress=True)
    # Seven bits of mantissa and the sign are random, of the exponent's eight some three are.
    assert encoding == "zstd"
    assert len(payload) < 0.72 * len(weights)
    noise = Random(0).randbytes(CHUNK_BYTES)
    assert encode_full(noise, 2, compress=True) == ("raw", noise)


# ---- Our own mistakes --------------------------------------------------------------------------


def test_a_patch_needs_two_chunks_of_one_length():
    with pytest.raises(ValueError, match="from 3 bytes to 4"):
        encode_patch(b"abc", b"abcd", 2)


def test_a_width_that_no_weights_have_is_refused():
    with pytest.raises(ValueError, match="words of 3 bytes"):
        encode_patch(b"abc", b"abc", 3)


def test_memory_that_cannot_be_written_is_no_target():
    with pytest.raises(ValueError, match="read-only"):
        apply_patches(b"ab", [encode_patch(b"ab", b"cd", 2)], 2)


# ---- What a peer may send ----------------------------------------------------------------------


@contextmanager
def refused(target: bytearray, limit: int = 1 << 16) -> Iterator[None]:
    """`BadMessage`, the target stays as it was, and nothing larger than ``limit`` is allocated."""
    before = bytes(target)
    tracemalloc.start()
    try:
        with pytest.raises(BadMessage):
            yield
        assert tracemalloc.get_traced_memory()[1] < limit
    finally:
        tracemalloc.stop()
    assert target == before


def frame(content_bytes: int, *blocks: bytes, window_log: int | None = None) -> bytes:
    """A zstd frame by hand: a single segment if no window is given."""
    single = window_log is None
    descriptor = bytes([0xC0 | (0x20 if single else 0)])
    window = b"" if window_log is None else bytes([(window_log - 10) << 3])
    size = content_bytes.to_bytes(8, "little")
    return b"\x28\xb5\x2f\xfd" + descriptor + window + size + b"".join(blocks)


def block(kind: int, size: int, content: bytes, *, last: bool) -> bytes:
    return (last | kind << 1 | size << 3).to_bytes(3, "little") + content


RAW, RLE = 0, 1
LENGTH = 64
GOOD = compressed(bytes(range(LENGTH)))
HOSTILE = {
    "nothing": b"",
    "no frame": b"hello, I am no frame of zstd at all",
    "half a frame": GOOD[: len(GOOD) // 2],
    "a frame without its last byte": GOOD[:-1],
    "only its header": GOOD[:6],
    "bytes after the frame": GOOD + b"\x00",
    "two frames": GOOD + GOOD,
    "a shorter chunk": compressed(bytes(LENGTH - 1)),
    "a longer chunk": compressed(bytes(LENGTH + 1)),
    "an empty chunk": compressed(b""),
    "a bomb": compressed(bytes(CHUNK_BYTES)),
    "no content size": compressed(bytes(LENGTH), write_content_size=False),
    "a skippable frame": b"\x50\x2a\x4d\x18" + LENGTH.to_bytes(4, "little") + bytes(LENGTH),
    "more than it says": frame(LENGTH, block(RLE, 1 << 17, b"x", last=True)),
    "far more than it says": frame(
        LENGTH, *[block(RLE, 1 << 17, b"x", last=False)] * 10, block(RAW, 0, b"", last=True)
    ),
    "less than it says": frame(LENGTH, block(RLE, LENGTH - 1, b"x", last=True)),
    "no end": frame(LENGTH, block(RLE, LENGTH, b"x", last=False)),
    "a size beyond all memory": frame((1 << 63) - 1, block(RLE, LENGTH, b"x", last=True)),
    "an unfinished frame with a large window": frame(
        LENGTH, block(RLE, LENGTH, b"x", last=False), window_log=27
    ),
    "a larger window than the chunk": frame(
        LENGTH, block(RLE, LENGTH, b"x", last=True), window_log=10
    ),
    "a million empty blocks": frame(
        LENGTH, *[block(RAW, 0, b"", last=False)] * 1_000_000, block(RLE, LENGTH, b"x", last=True)
    ),
    "a dictionary": b"\x28\xb5\x2f\xfd\x21\x07" + bytes([LENGTH]) + b"\x05\x00\x00",
    "a reserved bit": b"\x28\xb5\x2f\xfd\x28" + bytes([LENGTH]) + b"\x03\x02\x00x",
}


def test_the_frames_by_hand_are_frames():
    # Without this, the hostile ones could be refused for another reason than is meant.
    good = frame(LENGTH, block(RLE, LENGTH, b"x", last=True))
    assert decoded("zstd", good, LENGTH, 1) == b"x" * LENGTH
    assert decoded("zstd", GOOD, LENGTH, 1) == bytes(range(LENGTH))


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_payload_is_refused_and_changes_nothing(name):
    target = bytearray(range(100, 100 + LENGTH))
    with refused(target):
        apply_patches(target, [HOSTILE[name]], 2)
    with refused(target):
        apply_patches(target, [GOOD, HOSTILE[name]], 2)
    with refused(target):
        decode_full("zstd", HOSTILE[name], target, 2)


def test_many_patches_take_no_more_memory_than_one():
    base = random_weights()
    patch, target = encode_patch(base, moved(base, 0.5), 2), bytearray(base)

    def peak(count: int) -> int:
        tracemalloc.start()
        try:
            # A new thread, which has no workspace yet.
            with ThreadPoolExecutor(1) as pool:
                pool.submit(apply_patches, target, [patch] * count, 2).result()
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    assert peak(1) < 2.1 * CHUNK_BYTES
    assert peak(40) < 3.1 * CHUNK_BYTES
    # 41 is odd: applied an odd number of times, it leads to the new version.
    assert target == moved(base, 0.5)


@pytest.mark.parametrize("payload", [b"", bytes(LENGTH - 1), bytes(LENGTH + 1)])
def test_a_raw_chunk_of_another_length_is_refused(payload):
    target = bytearray(range(LENGTH))
    with refused(target):
        decode_full("raw", payload, target, 2)


@pytest.mark.parametrize("encoding", ["", "patch", "RAW", "lzma\n\x1b[2J" * 10_000])
def test_an_unknown_encoding_is_refused_in_one_short_printable_line(encoding):
    with pytest.raises(BadMessage) as caught:
        decode_full(encoding, b"", bytearray(), 2)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 200


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=300), st.integers(0, 64), widths)
def test_any_bytes_at_all_are_a_patch_or_a_bad_message(payload, length, width):
    target = bytearray(length)
    try:
        apply_patches(target, [payload], width)
    except BadMessage:
        assert target == bytearray(length)
    assert len(target) == length


def test_a_damaged_patch_is_refused_or_found_by_the_checksum():
    random = Random(0)
    base = random_weights(4096)
    data = moved(base, 0.1)
    patch = encode_patch(base, data, 2)
    refusals = silent = 0
    for _ in range(2000):
        damaged = bytearray(patch)
        for _ in range(random.randint(1, 3)):
            damaged[random.randrange(len(patch))] ^= 1 << random.randrange(8)
        target = bytearray(base)
        try:
            apply_patches(target, [damaged], 2)
        except BadMessage:
            assert target == base
            refusals += 1
        else:
            assert target == data or checksum(target) != checksum(data)
            silent += target != data
    # zstd itself notices only some: that is what the checksum is for.
    assert refusals > 100
    assert silent > 100


# ---- For another language ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "digest"),
    [
        # With seed 0; short, middling and long inputs are hashed in different ways.
        (b"", "2d06800538d394c2"),
        (b"abc", "78af5f94892f3950"),
        (bytes(range(256)) * 4, "a870f92984398d22"),
    ],
)
def test_the_checksum_is_xxh3_64(data, digest):
    assert checksum(data) == digest
    assert checksum(memoryview(bytearray(data))) == digest


BASE = bytes.fromhex("a03c 80bc 0000 ff7f 01")
DATA = bytes.fromhex("a13c 7fbc 0080 ff7f 03")


@pytest.mark.parametrize(
    ("width", "planes"),
    [
        # 3ca0 -> 3ca1, bc80 -> bc7f, 0000 -> 8000, 7fff -> 7fff, and a byte that is no word.
        (1, "01 00 ff 00 00 80 00 00 02"),
        (2, "01 ff 00 00 00 00 80 00 02"),
        (4, "01 00 00 80 ff 00 00 00 02"),
    ],
)
def test_the_planes_of_a_patch_are_these(width, planes):
    assert content_of(encode_patch(BASE, DATA, width)) == bytes.fromhex(planes)


@pytest.mark.parametrize("width", [1, 2, 4])
def test_a_compressed_whole_chunk_is_a_patch_of_zeros(width):
    data = random_weights(8192)
    encoding, payload = encode_full(data, width, compress=True)
    assert encoding == "zstd"
    assert payload == encode_patch(bytes(len(data)), data, width)


GOLDEN = {
    2: (
        "28b52ffd60580115030022c4070ac0a5c5bf6bd317713b058b81a049f1a4a0016d6b3043b7269ebcf49cfb011e"
        "00293915807c2061c0c9c34c003402c2600c84000842c6c8b4171c020a02c2600c840008828c9bed800e9dbc04"
        "77008bd0c483a81c553502d42be080eace31"
    ),
    4: (
        "28b52ffd6058010d040054030000000000010003000001000000070103000f000100070003011f00030f073f07"
        "0f0000001f00030100013f0100010000071f0f0726203023a16d0787a1906080f90a3609d425bf78dbe0c2053f"
        "8c86c7c235ae0d0dbfecda9111d6ec8db1046f946e8391025428509f8339e4ce254a0c7058c3167c6f3450700e"
        "93962d01"
    ),
}


@pytest.mark.parametrize("width", GOLDEN)
def test_golden_patches_are_applied(width):
    # Encoders may differ in the bytes that they make, decoders may not. Word i is 7919 i; every
    # fifth goes up by one, every seventh down.
    base = (np.arange(300) * 7919 % 65536).astype("<u2")
    data = base.copy()
    data[::5] += 1
    data[::7] -= 1
    assert (checksum(base.data), checksum(data.data)) == ("0fd12ec5e90acea7", "3e132b2935632c51")
    assert patched(base.tobytes(), [bytes.fromhex(GOLDEN[width])], width) == data.tobytes()
