"""How long training stands still for a checkpoint.

    python -m benchmarks.checkpoint [--folder .] [--repeats 5]

Training waits for `Checkpoints.begin`, which copies weights and optimiser; a thread writes that.
Beside it stands what training would wait for if it wrote the same itself. The yardstick is a write
and fsync of the same number of bytes in the same folder, in the same run. "Work meanwhile" is the
speed of plain matrix products on this thread while the other one writes, of their speed before.
"Verified" is what a resumed run waits for before it reads a checkpoint: the digests of all files,
which are made once when it is written, too. "Of disk" is its speed in multiples of that of the
yardstick, with the files in the system's cache: above 1 the disk is what a run waits for.
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from threading import Event

import torch
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils.logging import disable_progress_bar

from learner.recovery.checkpoints import Checkpoints, newest
from learner.state import GroupState, OpenPrompts, RewardState, RunState
from learner.training.policy import Policy

SIZES = ((256, 8), (640, 14))
"""Hidden size and layers: 10 and 100 million parameters."""
CHUNK_BYTES = 1 << 20


def make_policy(hidden: int, layers: int) -> Policy:
    """A random model with everything that a policy needs to be written."""
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=4096,
            hidden_size=hidden,
            intermediate_size=4 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=8,
        )
    )
    return Policy(model, Path(), {}, "", [])


def optimizer_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Of the size of AdamW's state."""
    return {
        f"state.{name}.{moment}": torch.randn_like(parameter)
        for name, parameter in model.named_parameters()
        for moment in ("exp_avg", "exp_avg_sq")
    }


def make_state(version: int) -> RunState:
    return RunState(
        run_id="bench",
        version=version,
        prompts=OpenPrompts(),
        next_lease=1,
        leases={},
        groups=GroupState(),
        rewards=RewardState({}, 0, (), 0),
        batch_std=None,
        batch_std_setting=None,
        tokens_trained=0,
        tokens_generated=0,
        training_seconds=0.0,
        lag0_difference=None,
        counters={},
    )


def written_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def yardstick_seconds(folder: Path, num_bytes: int) -> float:
    """One file of so many bytes, written and flushed."""
    chunk = torch.randint(256, (CHUNK_BYTES,), dtype=torch.uint8).numpy().tobytes()
    started = time.perf_counter()
    with (folder / "yardstick").open("wb", buffering=0) as file:
        for _ in range(-(-num_bytes // CHUNK_BYTES)):
            file.write(chunk)
        os.fsync(file.fileno())
    seconds = time.perf_counter() - started
    (folder / "yardstick").unlink()
    return seconds


def work_rate(stop: Event | None = None, seconds: float = 0.0) -> float:
    """Matrix products a second until ``stop``, or for so long."""
    matrix = torch.randn(512, 512)
    started, done = time.perf_counter(), 0
    while not (stop.is_set() if stop else time.perf_counter() - started > seconds):
        matrix @ matrix
        done += 1
    return done / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path())
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    disable_progress_bar()
    table = Table(title="seconds, median of the repeats; one thread")
    for column in (
        "parameters",
        "checkpoint",
        "training waits",
        "written by itself",
        "ratio",
        "write + fsync",
        "work meanwhile",
        "verified",
        "of disk",
    ):
        table.add_column(column, justify="right")
    for hidden, layers in SIZES:
        policy = make_policy(hidden, layers)
        tensors = optimizer_tensors(policy.model)
        waits, totals, raw, rates, verified = [], [], [], [], []
        with tempfile.TemporaryDirectory(dir=options.folder) as name:
            folder = Path(name)
            done = Event()
            checkpoints = Checkpoints(folder / "c", policy, keep=2, on_written=done.set)
            for version in range(1, options.repeats + 1):
                alone = work_rate(seconds=0.5)
                done.clear()
                started = time.perf_counter()
                checkpoints.begin(make_state(version), tensors)
                waits.append(time.perf_counter() - started)
                rates.append(work_rate(stop=done) / alone)
                checkpoints.finish()
                started = time.perf_counter()
                checkpoints.begin(make_state(1000 + version), tensors)
                checkpoints.finish()
                totals.append(time.perf_counter() - started)
                size = written_bytes(checkpoints.path(1000 + version))
                started = time.perf_counter()
                newest(checkpoints.folder)
                verified.append(time.perf_counter() - started)
                raw.append(yardstick_seconds(folder, size))
        wait_s, total_s = statistics.median(waits), statistics.median(totals)
        count = sum(parameter.numel() for parameter in policy.model.parameters())
        table.add_row(
            f"{count / 1e6:.1f} M",
            f"{size / 1e6:,.0f} MB",
            f"{wait_s:.3f}",
            f"{total_s:.3f}",
            f"{total_s / wait_s:.0f}",
            f"{statistics.median(raw):.3f}",
            f"{statistics.median(rates):.0%}",
            f"{statistics.median(verified):.3f}",
            f"{statistics.median(raw) / statistics.median(verified):.1f}",
        )
    Console(width=130).print(table)


if __name__ == "__main__":
    main()
