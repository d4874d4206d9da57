"""The buffer that weights arrive in: whose turn it is, and which bytes are of which version."""

import pytest
import torch

from actors.receive_buffer import ReceiveBuffer, Superseded
from protocol.weights import CHUNK_BYTES, layout

# Chunks 0 to 2, the last one of 4 bytes; the second tensor begins in the middle of chunk 1.
SPECS = layout(
    [
        ("first", "float32", (3 * CHUNK_BYTES // 8,)),
        ("second", "float32", (CHUNK_BYTES // 8 + 1,)),
    ]
)
SIZE = 2 * CHUNK_BYTES + 4


def make_buffer() -> ReceiveBuffer:
    return ReceiveBuffer(torch.zeros(SIZE, dtype=torch.uint8), SPECS)


def filled(num_bytes: int, value: int) -> torch.Tensor:
    return torch.full((num_bytes,), value, dtype=torch.uint8)


def test_nothing_is_held_before_anything_is_written():
    assert make_buffer().missing(0) == [0, 1, 2]


def test_every_chunk_knows_its_version():
    buffer = make_buffer()
    turn = buffer.begin()
    buffer.write(turn, 0, filled(SIZE, 3), 3)
    buffer.write(turn, CHUNK_BYTES, filled(CHUNK_BYTES, 4), 4)
    assert [buffer.held(chunk) for chunk in range(3)] == [3, 4, 3]
    assert (buffer.missing(3), buffer.missing(4), buffer.missing(5)) == ([1], [0, 2], [0, 1, 2])
    assert set(bytes(buffer.read(1))) == {4}
    assert bytes(buffer.read(2)) == b"\3\3\3\3"


def test_a_writer_whose_turn_is_over_changes_nothing():
    buffer = make_buffer()
    old, new = buffer.begin(), buffer.begin()
    buffer.write(new, 0, filled(SIZE, 1), 1)
    with pytest.raises(Superseded):
        buffer.write(old, 0, filled(SIZE, 9), 0)
    assert buffer.missing(1) == []
    assert set(buffer.memory.tolist()) == {1}


@pytest.mark.parametrize(
    ("offset", "num_bytes"),
    [
        (1, CHUNK_BYTES),
        (0, CHUNK_BYTES - 1),
        (CHUNK_BYTES, CHUNK_BYTES + 5),
        (-CHUNK_BYTES, CHUNK_BYTES),
        (3 * CHUNK_BYTES, 0),
    ],
)
def test_only_whole_chunks_of_this_memory_are_written(offset, num_bytes):
    buffer = make_buffer()
    with pytest.raises(ValueError, match="are no chunks"):
        buffer.write(buffer.begin(), offset, filled(num_bytes, 1), 1)
    assert set(buffer.memory.tolist()) == {0}


def test_a_damaged_tensor_costs_all_chunks_that_it_reaches_into_and_no_other():
    buffer = make_buffer()
    buffer.write(buffer.begin(), 0, filled(SIZE, 1), 1)
    buffer.forget(["second"])
    assert buffer.missing(1) == [1, 2]
    buffer.forget()
    assert buffer.missing(1) == [0, 1, 2]
