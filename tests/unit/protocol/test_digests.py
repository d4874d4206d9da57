"""Digests of weights: of one parameter, of a version, and what they name."""

import hashlib
import struct
import sys
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.weights import (
    DIGEST_BYTES,
    differing,
    layout,
    tensor_digest,
    total_bytes,
    whole_digest,
)
from tests.packed import packed_digests

SPECS = layout([("a", "float32", (2,)), ("empty", "float32", (0,)), ("b", "bfloat16", (3,))])
PACKED = bytes(range(total_bytes(SPECS)))


def test_a_tensors_digest_is_xxh3_128_in_its_canonical_form():
    # The empty input's XXH3-128 with seed 0, as xxHash's own sanity test has it:
    # low 0x6001C324468D497F, high 0x99AA06D3014798D8; canonical is high before low, big-endian.
    expected = struct.pack(">QQ", 0x99AA06D3014798D8, 0x6001C324468D497F)
    assert tensor_digest(b"") == expected
    assert len(expected) == DIGEST_BYTES


def test_the_whole_digest_is_of_names_and_digests():
    a, empty, b = (tensor_digest(data) for data in (PACKED[:8], b"", PACKED[8:]))
    content = b"a\0" + a + b"empty\0" + empty + b"b\0" + b
    expected = hashlib.blake2b(content, digest_size=16).hexdigest()
    assert whole_digest(a + empty + b, SPECS) == expected


@given(st.integers(0, 13), st.integers(0, 7))
def test_any_bit_changes_the_digest_of_its_tensor_and_of_the_whole(byte, bit):
    damaged = bytearray(PACKED)
    damaged[byte] ^= 1 << bit
    ours, theirs = packed_digests(PACKED, SPECS), packed_digests(bytes(damaged), SPECS)
    assert differing(SPECS, ours, theirs) == ["a" if byte < 8 else "b"]
    assert whole_digest(ours, SPECS) != whole_digest(theirs, SPECS)


def test_all_tensors_that_differ_are_named_in_order():
    ours, theirs = packed_digests(PACKED, SPECS), packed_digests(bytes(len(PACKED)), SPECS)
    assert differing(SPECS, ours, ours) == []
    assert differing(SPECS, ours, theirs) == ["a", "b"]


@pytest.mark.parametrize("length", [0, DIGEST_BYTES, 3 * DIGEST_BYTES - 1, 4 * DIGEST_BYTES])
def test_too_few_or_too_many_digests_are_refused(length):
    right, wrong = packed_digests(PACKED, SPECS), bytes(length)
    for call in (
        lambda: differing(SPECS, right, wrong),
        lambda: differing(SPECS, wrong, right),
        lambda: whole_digest(wrong, SPECS),
    ):
        with pytest.raises(ValueError, match=f"^{length} bytes of digests for 3 parameters"):
            call()


def test_other_threads_run_while_a_large_tensor_is_hashed():
    """An actor's event loop, a learner's intake: a large tensor takes longer than they may stop."""
    data = bytes(256 << 20)
    begun = ended = False

    def hash_it() -> None:
        nonlocal begun, ended
        begun = True
        tensor_digest(data)
        ended = True

    thread, steps = threading.Thread(target=hash_it), 0
    interval = sys.getswitchinterval()
    # So that nothing takes the GIL from the thread: if this one gets it, then it was given up.
    sys.setswitchinterval(60.0)
    try:
        thread.start()
        while not ended:
            steps += begun
            time.sleep(0)
    finally:
        sys.setswitchinterval(interval)
    thread.join()
    assert steps > 0
