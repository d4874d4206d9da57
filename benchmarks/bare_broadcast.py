"""The yardstick of `benchmarks.push`: a broadcast by plain gloo, and nothing else.

    python -m benchmarks.bare_broadcast RANK

One of its processes. Each line on its standard input asks for one broadcast: a file for the
processes to meet by, how many they are, bytes, and bytes a bucket. Rank 0 answers with the seconds
until everybody had everything. Group and memory are kept for as long as the file is the same one.
"""

import sys
import time
from datetime import timedelta
from typing import Any

import torch
from torch.distributed import FileStore
from torch.distributed.distributed_c10d import ProcessGroupGloo

TIMEOUT = timedelta(seconds=600)


def main() -> None:
    # Its stub lacks what it has from its base.
    gloo: Any = ProcessGroupGloo
    rank = int(sys.argv[1])
    torch.set_num_threads(1)
    met_by = ""
    for line in sys.stdin:
        path, world_size, num_bytes, bucket_bytes = line.split()
        if path != met_by:
            met_by = path
            group = gloo(FileStore(path, int(world_size)), rank, int(world_size))
            memory = torch.ones(int(num_bytes), dtype=torch.uint8)
        group.barrier().wait(TIMEOUT)
        started = time.perf_counter()
        for bucket in memory.split(int(bucket_bytes)):
            group.broadcast(bucket, 0, TIMEOUT).wait(TIMEOUT)
        group.barrier().wait(TIMEOUT)
        if rank == 0:
            print(time.perf_counter() - started, flush=True)


if __name__ == "__main__":
    main()
