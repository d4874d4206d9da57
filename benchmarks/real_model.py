"""A real model trained by real processes: this version, and an earlier one, in one table.

    .venv-peers/bin/python -m benchmarks.real_model [--earlier 9527f60] [--steps 12] [--actors 1]

SmolLM2-135M-Instruct, which `make bench-peers` fetches, learns one-digit sums by ``gdpo run``: 8
prompts of 8 completions a step in float32, rewards for format and correctness, a checkpoint after
every third step. Settings are defaults; each version has the machine for itself. The earlier one
comes from this repository's history and runs with today's packages.

The floor of the learner's memory is the least that it had between two checkpoints: what is never
given back. The stall is the time that an actor's generation stood still, divided by the pushes.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import tomli_w
import torch
import transformers
from rich.console import Console
from rich.table import Table

from benchmarks import digit_sums
from benchmarks.learner import ROOT, unpack
from benchmarks.peers.smollm2 import NotThereError, smollm2
from benchmarks.peers.watch import Watch, command_line, family, role, status

PROMPTS, ROLLOUTS = 8, 8
CHECKPOINT_EVERY = 3
REWARDS = ("format", "correctness")
SIDES = ("earlier", "ours")
LOOK_S = 0.25
END_S = 60.0


@dataclass
class Run:
    """What was seen of one version."""

    name: str
    steps: list[dict[str, Any]]
    summary: dict[str, Any]
    peaks: dict[str, list[int]]
    """Bytes of each process, by role."""
    resident: list[tuple[int, int]] = field(default_factory=list)
    """Steps done, and bytes of the learner then."""

    @property
    def floors(self) -> list[int]:
        """The least that the learner held before the first checkpoint, and after each."""
        parts: dict[int, int] = {}
        for done, size in self.resident:
            if done:
                part = done // CHECKPOINT_EVERY
                parts[part] = min(size, parts.get(part, size))
        return [parts[part] for part in sorted(parts)]


def main() -> int:
    options = parse()
    console = Console(width=130, highlight=False)
    try:
        model = options.model or smollm2()
    except NotThereError as error:
        print(f"real_model: {error}", file=sys.stderr)
        return 2
    runs = []
    for side in options.sides:
        with tempfile.TemporaryDirectory(prefix="real-model-") as made:
            folder, source = Path(made), ROOT
            if side == "earlier":
                source = folder / "source"
                source.mkdir()
                unpack(options.earlier, source)
            recipe = (earlier_recipe if side == "earlier" else recipe_of)(folder, model, options)
            runs.append(train(side, source, folder, recipe, options.limit))
        console.print(f"{side}: {len(runs[-1].steps)} steps")
    console.print(make_table(runs))
    console.print(
        f"{os.cpu_count()} CPU cores, {options.actors} actors, Python {platform.python_version()}, "
        f"torch {torch.__version__}, transformers {transformers.__version__}; "
        f"earlier: {options.earlier}",
        soft_wrap=True,
    )
    return 0 if all(len(run.steps) == options.steps for run in runs) else 1


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--earlier", default="9527f60", help="commit of the earlier version")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--model", type=Path, help="folder of another model, or of this one")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--actors", type=int, default=1)
    parser.add_argument("--limit", type=float, default=1200, help="seconds for one version")
    return parser.parse_args()


# --- recipes --------------------------------------------------------------------------------------


def recipe_of(folder: Path, model: Path, options: argparse.Namespace) -> dict[str, Any]:
    """This version's recipe."""
    return common(folder, model, options) | {
        "training": {"steps": options.steps, "batch_groups": PROMPTS, "minibatches": 4},
        "optimizer": {"lr": 1e-5},
        "endpoints": {"bind": "tcp://127.0.0.1:0", "metrics_port": 0},
    }


def earlier_recipe(folder: Path, model: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The same as it was written then."""
    return common(folder, model, options) | {
        "learner": {
            "steps": options.steps,
            "batch_groups": PROMPTS,
            "minibatches": 4,
            "lr": 1e-5,
            "bind": "tcp://127.0.0.1:0",
            "metrics_port": 0,
        }
    }


def common(folder: Path, model: Path, options: argparse.Namespace) -> dict[str, Any]:
    rows = [digit_sums.row(i, j) for i in range(10) for j in range(10)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    return {
        "name": "real",
        "runs_folder": str(folder / "runs"),
        "model": {"path": str(model), "dtype": "float32", "device": "cpu"},
        "data": {"train": str(folder / "rows.jsonl")},
        "rewards": [{"name": name, "function": f"digit_sums:{name}_reward"} for name in REWARDS],
        "sampling": {"num_rollouts": ROLLOUTS, "max_prompt_tokens": 96, "max_tokens": 32},
        "checkpoints": {"every_steps": CHECKPOINT_EVERY},
        "launch": {"actors": options.actors},
        "actor": {"engine": "transformers", "device": "cpu"},
    }


# --- a run ----------------------------------------------------------------------------------------


def train(name: str, source: Path, folder: Path, recipe: dict[str, Any], limit: float) -> Run:
    """Run a version that lies in ``source`` to its end, or until its time is up."""
    (folder / "recipe.toml").write_text(tomli_w.dumps(recipe))
    shutil.copy(Path(digit_sums.__file__), folder)
    # Nothing of this machine's habits: it finds the threads that it finds.
    unset = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
    environment = {key: value for key, value in os.environ.items() if key not in unset}
    environment |= {"PYTHONPATH": f"{source}:{folder}", "HF_HUB_OFFLINE": "1"}
    log = folder / "output.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "deploy", "run", "recipe.toml"],
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
    watch, resident = Watch(process.pid), []
    lines = folder / "runs" / "real" / "metrics.jsonl"
    deadline = time.monotonic() + limit
    try:
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(LOOK_S)
            watch.look()
            done = len(complete_lines(lines))
            resident += [(done, size) for size in learner_bytes(process.pid)]
    finally:
        end(process)
    if process.returncode:
        print(f"{name}: exit code {process.returncode}\n{log.read_text()[-2000:]}", file=sys.stderr)
    summary = lines.with_name("summary.json")
    return Run(
        name,
        [json.loads(line) for line in complete_lines(lines)],
        json.loads(summary.read_text()) if summary.exists() else {},
        watch.peaks,
        resident,
    )


def learner_bytes(root: int) -> list[int]:
    """Resident memory of the learner below a process, now."""
    found = [status(pid, "VmRSS") for pid in family(root) if role(command_line(pid)) == "learner"]
    return [1024 * int(size.split()[0]) for size in found if size]


def complete_lines(path: Path) -> list[str]:
    try:
        text = path.read_text()
    except OSError:
        return []
    return text[: text.rfind("\n") + 1].splitlines()


def end(process: "subprocess.Popen[bytes]") -> None:
    """Let it save; kill it if it does not end."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


# --- the table ------------------------------------------------------------------------------------


def make_table(runs: Sequence[Run]) -> Table:
    table = Table(title=f"{PROMPTS} x {ROLLOUTS} one-digit sums a step")
    table.add_column("")
    for run in runs:
        table.add_column(run.name)
    figures = [figures_of(run) for run in runs]
    for name in dict.fromkeys(name for each in figures for name in each):
        table.add_row(name, *(each.get(name, "-") for each in figures))
    return table


def _mean_length(step: dict[str, Any]) -> float:
    """Mean tokens of a step's completions; the earlier version has another name for them."""
    for name in ("completions/mean_length", "completion_tokens_mean"):
        if name in step:
            return float(step[name])
    raise ValueError(f"step {step.get('step')} has no mean length of its completions")


def figures_of(run: Run) -> dict[str, str]:
    """The rows of a column, by name."""
    if not run.steps:
        return {"steps": "0"}
    last = run.steps[-1]
    pushes, stalled = 0, 0.0
    if weights := run.summary.get("weights"):
        pushes = weights["pushes"]
        stalled = weights["actors_stalled_share"] * last["seconds"] / max(1, pushes)
    tokens = [_mean_length(step) * PROMPTS * ROLLOUTS for step in run.steps]
    whole = last["seconds"]
    return {
        "steps": f"{len(run.steps)} in {whole:.0f} s",
        "a step of the trainer, median": f"{median(s['step_seconds'] for s in run.steps):.2f} s",
        "from step to step": f"{whole / len(run.steps):.2f} s",
        "tokens trained a second, trainer": (
            f"{sum(tokens) / sum(s['step_seconds'] for s in run.steps):,.0f}"
        ),
        "tokens trained a second, run": f"{sum(tokens) / whole:,.0f}",
        **{f"peak memory, {name}": of_processes(sizes) for name, sizes in run.peaks.items()},
        "learner's floor, before and after each checkpoint": in_mb(run.floors),
        "staleness, mean and largest": (
            f"{sum(s['staleness_mean'] for s in run.steps) / len(run.steps):.2f}, "
            f"{max(s['staleness_max'] for s in run.steps)}"
        ),
        "actors idle": f"{sum(s['actor_idle_share'] for s in run.steps) / len(run.steps):.0%}",
        "stall a push": f"{1000 * stalled:.0f} ms, {pushes} pushes",
        **{
            name: f"{run.steps[0]['rewards'][name]:.2f} to {last['rewards'][name]:.2f}"
            for name in REWARDS
        },
    }


def of_processes(sizes: Sequence[int]) -> str:
    """Each of a few, or the sum of many."""
    if len(sizes) <= 4:
        return in_mb(sizes)
    return f"{in_mb([sum(sizes)])} in {len(sizes)} processes"


def in_mb(sizes: Sequence[int]) -> str:
    return ", ".join(f"{size / 1e6:,.0f}" for size in sizes) + " MB"


if __name__ == "__main__":
    raise SystemExit(main())
