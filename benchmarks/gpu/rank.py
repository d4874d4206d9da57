"""One of two ranks on one GPU: python -m benchmarks.gpu.rank BACKEND RANK FILE.

They meet by the file. Both broadcast what rank 0 has; rank 1 prints the library's version and GB/s.
"""

import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist

REPEATS = 5
TIMEOUT = timedelta(seconds=30)


def main() -> None:
    backend, rank, file = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    gpu = backend == "nccl"
    store = dist.FileStore(file, 2)
    dist.init_process_group(backend, store=store, rank=rank, world_size=2, timeout=TIMEOUT)
    device = torch.device("cuda:0" if gpu else "cpu")
    size = 1 << (30 if gpu else 20)
    bucket = torch.full((size,), 7 if rank == 0 else 0, dtype=torch.uint8, device=device)
    dist.broadcast(bucket, 0)
    if not bool((bucket == 7).all()):
        raise SystemExit("the broadcast brought other bytes")
    started = time.perf_counter()
    for _ in range(REPEATS):
        dist.broadcast(bucket, 0)
    if gpu:
        torch.cuda.synchronize()
    seconds = (time.perf_counter() - started) / REPEATS
    if rank == 1:
        version = ".".join(map(str, torch.cuda.nccl.version())) if gpu else "gloo"
        print(version, f"{size / seconds / 1e9:.1f}")
    # Nobody leaves while the other has something to read.
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
