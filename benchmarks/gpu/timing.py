"""How long something takes on a device, and the memory that it needs there."""

import time
from collections.abc import Callable
from statistics import median

import torch


def measure(run: Callable[[], object], *, warm_up: int, repeats: int) -> tuple[float, float]:
    """Return median seconds, and GiB at the peak of the device's memory, 0 on a CPU."""
    for _ in range(warm_up):
        run()
    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        run()
        if gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return median(seconds), torch.cuda.max_memory_allocated() / 2**30 if gpu else 0.0
