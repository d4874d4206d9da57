"""Weights from the memory of a learner on the same machine.

An actor on the learner's own GPU, where NCCL refuses a second rank, gets them this way through the
host's memory.
"""

import os
import stat

from actors.weights.receive_buffer import WriteTurn

BLOCK_BYTES = 16 << 20


def read_shared(path: str, num_bytes: int, turn: WriteTurn) -> None:
    """Write all of a learner's snapshot in ``turn``.

    Raises OSError, ValueError, or what ``turn`` raises. The learner may replace the bytes
    meanwhile: their digests tell.
    """
    # The learner chose the path: a pipe must not block.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_size != num_bytes:
            raise ValueError(f"{path} is no memory of {num_bytes} bytes")
        # Read and not mapped: a file that becomes shorter would end the process.
        for offset in range(0, num_bytes, BLOCK_BYTES):
            block = turn.lend(offset, min(BLOCK_BYTES, num_bytes - offset))
            if os.preadv(descriptor, [block.numpy().data], offset) != len(block):
                raise ValueError(f"{path} became shorter")
            turn.filled(offset, len(block))
    finally:
        os.close(descriptor)
