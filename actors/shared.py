"""Weights from the memory of a learner on the same machine.

For an actor on the learner's own GPU, where NCCL refuses a second rank, this is the way through
the host's memory.
"""

import os
import stat
from collections.abc import Callable

import torch

BLOCK_BYTES = 16 << 20


def read_shared(path: str, num_bytes: int, sink: Callable[[int, torch.Tensor], None]) -> None:
    """Give all of a learner's snapshot to ``sink``, as (offset, bytes) of whole chunks.

    Raises OSError, ValueError or what ``sink`` does. The learner may replace the bytes meanwhile:
    their digests tell.
    """
    # A path of a learner's choosing: a pipe must not block.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_size != num_bytes:
            raise ValueError(f"{path} is no memory of {num_bytes} bytes")
        # Read and not mapped: a file that becomes shorter would end the process.
        block = torch.empty(min(BLOCK_BYTES, num_bytes), dtype=torch.uint8)
        for offset in range(0, num_bytes, BLOCK_BYTES):
            part = block[: num_bytes - offset]
            if os.preadv(descriptor, [part.numpy().data], offset) != len(part):
                raise ValueError(f"{path} became shorter")
            sink(offset, part)
    finally:
        os.close(descriptor)
