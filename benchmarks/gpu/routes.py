"""Ways of the weights on one GPU: a broadcast between two ranks, and shared memory."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from benchmarks.gpu.report import Report, Skip

LIBRARY = "nvidia/nccl/lib/libnccl.so.2"
SHARING_SINCE = (2, 30)
"""The first NCCL that lets two ranks share a GPU."""
SHARING = {"NCCL_MULTI_RANK_GPU_ENABLE": "1", "NCCL_NVLS_ENABLE": "0", "NCCL_MAX_CTAS": "8"}
TIMEOUT_S = 45.0


def nccl(row: Report, _: str, dry: bool) -> None:
    """Broadcast between two processes on one GPU; dry, by gloo.

    ``GDPO_NCCL`` is a libnccl.so.2 to load in place of torch's, as nvidia-nccl-cu13 2.30.7 has it.
    """
    environment = {**os.environ, **SHARING}
    library = os.environ.get("GDPO_NCCL", "")
    if library and not Path(library).is_file():
        raise Skip(f"GDPO_NCCL = {library} is no file")
    if not dry and not library and torch.cuda.nccl.version() < SHARING_SINCE:
        version = ".".join(map(str, torch.cuda.nccl.version()))
        raise Skip(f"NCCL {version} refuses two ranks on one GPU: set GDPO_NCCL to a 2.30.7")
    if library:
        environment["LD_PRELOAD"] = library
    with TemporaryDirectory() as folder:
        command = ["-m", "benchmarks.gpu.rank", "gloo" if dry else "nccl"]
        processes = [
            subprocess.Popen(
                [sys.executable, *command, str(rank), f"{folder}/store"],
                env=environment,
                stdout=subprocess.PIPE,
            )
            for rank in range(2)
        ]
        try:
            outputs = [p.communicate(timeout=TIMEOUT_S)[0].decode() for p in processes]
        finally:
            for process in processes:
                process.kill()
                process.wait()
    if any(process.returncode for process in processes):
        codes = [process.returncode for process in processes]
        raise RuntimeError(f"ranks ended with {codes}")
    version, rate = outputs[1].split()
    row("two ranks, one GPU", library=version, GB_per_s=rate)


def shared_memory(row: Report, _: str, dry: bool) -> None:
    """Copy into memory that actors map, pinned and not, and from there to the device again."""
    from transfer.shared_memory import SharedMemory

    size = 1 << (20 if dry else 30)
    device = torch.device("cpu" if dry else "cuda")
    weights = torch.randint(256, (size,), dtype=torch.uint8, device=device)
    for pinned in (False,) if dry else (False, True):
        memory = SharedMemory(size, pinned=pinned)
        copied = memory.tensor
        out = rate(partial(copied.copy_, weights), size)
        right = bool((copied[:: 1 << 12] == weights.cpu()[:: 1 << 12]).all())
        back = rate(partial(weights.copy_, copied), size)
        name = "pinned" if pinned else "pageable"
        row(name, out_GB_per_s=f"{out:.1f}", back_GB_per_s=f"{back:.1f}", right=right)


def rate(copy: Callable[[], object], size: int) -> float:
    """Return GB/s of the second of two copies."""
    seconds = 0.0
    for _ in range(2):
        started = time.perf_counter()
        copy()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
    return size / seconds / 1e9
