"""Digests that are made while bytes arrive are those of the bytes that are there."""

from hypothesis import given, settings
from hypothesis import strategies as st

from actors.weights.running_digests import RunningDigests
from protocol.weights import layout, total_bytes
from tests.packed import packed_digests

SPECS = layout(
    [
        ("a", "bfloat16", (5,)),
        ("none", "float32", (0,)),
        ("b", "float32", (7,)),
        ("c", "float16", ()),
    ]
)
SIZE = total_bytes(SPECS)


def in_order(digests: RunningDigests, memory: bytearray, piece: int, value: int) -> None:
    for begin in range(0, SIZE, piece):
        end = min(begin + piece, SIZE)
        memory[begin:end] = bytes((value + i) % 256 for i in range(begin, end))
        digests.written(begin, end)


@given(st.integers(1, SIZE + 1))
def test_bytes_that_come_in_order_leave_nothing_to_be_hashed(piece):
    memory = bytearray(SIZE)
    digests = RunningDigests(memoryview(memory), SPECS)
    for value in (1, 2):
        in_order(digests, memory, piece, value)
        assert digests.complete
        assert digests.digests() == packed_digests(bytes(memory), SPECS)


@settings(max_examples=300)
@given(
    st.lists(
        st.tuples(
            st.integers(0, SIZE - 1), st.integers(1, SIZE), st.integers(0, 255), st.booleans()
        )
    )
)
def test_in_whatever_order_they_come_the_digests_are_those_of_the_memory(writes):
    memory = bytearray(SIZE)
    digests = RunningDigests(memoryview(memory), SPECS)
    for begin, length, value, asked in writes:
        end = min(begin + length, SIZE)
        memory[begin:end] = bytes([value]) * (end - begin)
        digests.written(begin, end)
        if asked:
            assert digests.digests() == packed_digests(bytes(memory), SPECS)
    assert digests.digests() == packed_digests(bytes(memory), SPECS)
    in_order(digests, memory, 4, 9)
    assert digests.digests() == packed_digests(bytes(memory), SPECS)


def test_what_is_to_be_forgotten_is_computed_again():
    memory = bytearray(SIZE)
    digests = RunningDigests(memoryview(memory), SPECS)
    in_order(digests, memory, 8, 1)
    memory[SPECS[2].offset] ^= 1  # nobody told
    assert digests.digests() != packed_digests(bytes(memory), SPECS)
    digests.forget(SPECS[2].offset, SPECS[2].offset + SPECS[2].num_bytes)
    assert digests.digests() == packed_digests(bytes(memory), SPECS)
