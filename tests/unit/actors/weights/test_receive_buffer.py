"""The buffer that weights arrive in: whose turn it is, and which bytes are of which version."""

import socket
import threading
import time
from contextlib import suppress
from typing import Any

import pytest
import torch

from actors.weights.receive_buffer import ReceiveBuffer, Superseded
from protocol.weights import CHUNK_BYTES, layout
from tests.packed import packed_digests
from transfer.shared_memory import SharedMemory

# Chunks 0 to 2, the last one of 4 bytes; the second tensor begins in the middle of chunk 1.
SPECS = layout(
    [
        ("first", "float32", (3 * CHUNK_BYTES // 8,)),
        ("second", "float32", (CHUNK_BYTES // 8 + 1,)),
    ]
)
SIZE = 2 * CHUNK_BYTES + 4


def make_buffer() -> ReceiveBuffer:
    return ReceiveBuffer(SharedMemory(SIZE), SPECS)


def filled(num_bytes: int, value: int) -> torch.Tensor:
    return torch.full((num_bytes,), value, dtype=torch.uint8)


def content(buffer: ReceiveBuffer) -> set[int]:
    return set(buffer.memory.tensor.tolist())


def test_nothing_is_held_before_anything_is_written():
    assert make_buffer().missing(0) == [0, 1, 2]


def test_every_chunk_knows_its_version():
    buffer = make_buffer()
    buffer.begin(3).write(0, filled(SIZE, 3))
    buffer.begin(4).write(CHUNK_BYTES, filled(CHUNK_BYTES, 4))
    assert [buffer.version_of(chunk) for chunk in range(3)] == [3, 4, 3]
    assert (buffer.missing(3), buffer.missing(4), buffer.missing(5)) == ([1], [0, 2], [0, 1, 2])
    assert set(bytes(buffer.read(1))) == {4}
    assert bytes(buffer.read(2)) == b"\3\3\3\3"


def test_a_writer_whose_turn_is_over_changes_nothing():
    buffer = make_buffer()
    old, new = buffer.begin(0), buffer.begin(1)
    new.write(0, filled(SIZE, 1))
    for call in (
        lambda: old.write(0, filled(SIZE, 9)),
        lambda: old.lend(0, SIZE),
        lambda: old.filled(0, SIZE),
    ):
        with pytest.raises(Superseded):
            call()
    assert buffer.missing(1) == []
    assert content(buffer) == {1}


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
    turn = buffer.begin(1)
    with pytest.raises(ValueError, match="are no chunks"):
        turn.write(offset, filled(num_bytes, 1))
    with pytest.raises(ValueError, match="are no chunks"):
        turn.lend(offset, num_bytes)
    assert content(buffer) == {0}


def test_what_is_lent_is_of_no_version_until_it_is_filled():
    buffer = make_buffer()
    buffer.begin(1).write(0, filled(SIZE, 1))
    turn = buffer.begin(2)
    lent = turn.lend(CHUNK_BYTES, CHUNK_BYTES + 4)
    assert [buffer.version_of(chunk) for chunk in range(3)] == [1, None, None]
    lent.fill_(2)
    turn.filled(CHUNK_BYTES, CHUNK_BYTES + 4)
    assert [buffer.version_of(chunk) for chunk in range(3)] == [1, 2, 2]
    expected = torch.cat([filled(CHUNK_BYTES, 1), filled(CHUNK_BYTES + 4, 2)])
    assert torch.equal(buffer.memory.tensor, expected)
    assert buffer.digests() == packed_digests(expected, SPECS)


def test_only_what_was_lent_can_be_filled():
    turn = make_buffer().begin(1)
    turn.lend(0, CHUNK_BYTES)
    for offset, num_bytes in ((CHUNK_BYTES, CHUNK_BYTES), (0, 2 * CHUNK_BYTES)):
        with pytest.raises(ValueError, match="were not lent"):
            turn.filled(offset, num_bytes)


def test_what_is_written_to_lent_memory_after_the_turn_is_lost():
    """Whoever has it reads what was there; what others write does not reach it either."""
    buffer = make_buffer()
    turn = buffer.begin(1)
    first, rest = turn.lend(0, CHUNK_BYTES), turn.lend(CHUNK_BYTES, CHUNK_BYTES + 4)
    first.fill_(1)
    turn.filled(0, CHUNK_BYTES)
    rest.fill_(7)
    buffer.begin(2).write(CHUNK_BYTES, filled(CHUNK_BYTES + 4, 2))
    assert set(rest.tolist()) == {7}
    rest.fill_(9)
    assert [buffer.version_of(chunk) for chunk in range(3)] == [1, 2, 2]
    expected = torch.cat([filled(CHUNK_BYTES, 1), filled(CHUNK_BYTES + 4, 2)])
    assert torch.equal(buffer.memory.tensor, expected)
    assert buffer.digests() == packed_digests(expected, SPECS)


def test_a_system_call_in_the_middle_of_writing_does_not_reach_it_either():
    """As a broadcast does, which the kernel writes for."""
    buffer = make_buffer()
    source, sink = socket.socketpair()
    stop = threading.Event()

    def send() -> None:
        with suppress(OSError):
            while not stop.is_set():
                source.sendall(bytes([9]) * CHUNK_BYTES)

    def receive(lent: torch.Tensor) -> None:
        while sink.recv_into(lent.numpy().data):
            pass

    lent = buffer.begin(1).lend(0, SIZE)
    sender = threading.Thread(target=send, daemon=True)
    receiver = threading.Thread(target=receive, args=(lent,), daemon=True)
    for thread in (sender, receiver):
        thread.start()
    while lent[0] == 0:
        time.sleep(0.001)
    buffer.begin(2).write(0, filled(SIZE, 2))
    for _ in range(100):
        lent[0] = 0
        while lent[0] == 0:
            time.sleep(0)
        assert torch.equal(buffer.memory.tensor, filled(SIZE, 2))
    stop.set()
    sender.join()
    source.close()
    receiver.join()
    sink.close()


def test_nothing_of_what_is_written_while_it_is_taken_away_is_lost():
    """It is passed on from there to others, who are not to blame."""
    for _ in range(10):
        buffer = make_buffer()
        lent = buffer.begin(1).lend(0, SIZE)
        # In pieces: one could go before the turn ends, or after it.
        pieces = lent.split(4096)
        begun = threading.Event()

        def write(pieces: tuple[torch.Tensor, ...] = pieces, begun: Any = begun) -> None:
            for number, piece in enumerate(pieces):
                piece.fill_(7)
                if number == 8:
                    begun.set()

        writer = threading.Thread(target=write, daemon=True)
        writer.start()
        begun.wait()
        turn = buffer.begin(2)
        turn.write(0, filled(SIZE, 2))
        writer.join()
        assert set(lent.tolist()) == {7}
        assert content(buffer) == {2}


def test_what_is_lent_after_a_turn_that_was_broken_off_arrives():
    buffer = make_buffer()
    buffer.begin(1).lend(0, SIZE).fill_(1)
    turn = buffer.begin(2)
    turn.lend(0, SIZE).fill_(2)
    turn.filled(0, SIZE)
    assert buffer.missing(2) == []
    assert content(buffer) == {2}


def test_a_damaged_tensor_costs_all_chunks_that_it_reaches_into_and_no_other():
    buffer = make_buffer()
    buffer.begin(1).write(0, filled(SIZE, 1))
    buffer.forget(["second"])
    assert buffer.missing(1) == [1, 2]
    buffer.forget()
    assert buffer.missing(1) == [0, 1, 2]
