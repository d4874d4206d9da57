"""Runs one case with one of the systems, in processes of its own and within a given time."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w

from benchmarks.peers.cases import REWARDS, Case
from benchmarks.peers.result import Result, of_ours, of_trl
from benchmarks.peers.watch import Watch
from learner.run_folder import RunFolder

ROOT = Path(__file__).parents[2]
LOOK_S = 0.5
"""Time between two looks at how far a run is, and at its memory."""
GRACE_S = 120.0
"""Time that a run has for its last batch and to save, once it was asked to end."""
KILL_S = 10.0

Progress = Callable[[int], None]
"""Called with the batches done so far."""


@dataclass(frozen=True)
class Limits:
    """How long a run may take, in seconds."""

    start: float
    """Until the first batch is done, loading included."""
    run: float
    """After that."""


def with_trl(case: Case, folder: Path, limits: Limits, progress: Progress) -> Result:
    """Train with TRL; ``folder`` is empty."""
    case.write(folder / "case.json")
    lines = folder / "batches.jsonl"
    command = ["-m", "benchmarks.peers.with_trl", str(folder / "case.json"), str(lines)]
    peaks, note = _follow(command, folder, lines, limits, progress)
    batches = [json.loads(line) for line in _complete_lines(lines)]
    return of_trl(case.samples, batches, peak_bytes=peaks, note=note)


def with_ours(case: Case, folder: Path, limits: Limits, progress: Progress) -> Result:
    """Train with this system: a learner and its default number of actors."""
    recipe = folder / "recipe.toml"
    recipe.write_text(tomli_w.dumps(settings(case, folder)))
    run = RunFolder(folder / "runs" / "peers")
    lines = run.path / "metrics.jsonl"
    peaks, note = _follow(["-m", "deploy", "run", str(recipe)], folder, lines, limits, progress)
    steps = run.read_steps() if run.num_steps else []
    summary = run.read_summary() if run.has_summary else None
    return of_ours(case.samples, steps, summary, peak_bytes=peaks, note=note)


SYSTEMS = {"trl": with_trl, "ours": with_ours}


def settings(case: Case, folder: Path) -> dict[str, Any]:
    """The recipe: the work itself, and where; the rest are defaults."""
    return {
        "name": "peers",
        "runs_folder": str(folder / "runs"),
        "model": {"path": case.model, "dtype": case.dtype, "device": "cpu"},
        "data": {"train": case.rows},
        "rewards": [{"name": name, "function": path} for name, path in REWARDS.items()],
        "sampling": {
            "num_rollouts": case.rollouts,
            "max_prompt_tokens": case.max_prompt_tokens,
            "max_tokens": case.max_tokens,
        },
        "algorithm": {"estimator": "gdpo"},
        "training": {
            "steps": case.batches,
            "batch_groups": case.prompts,
            "minibatches": case.optimizer_steps,
        },
        "optimizer": {"lr": case.lr},
        "actor": {"engine": "transformers", "device": "cpu"},
        "endpoints": {"bind": "tcp://127.0.0.1:0", "metrics_port": 0},
    }


def _follow(
    command: Sequence[str], folder: Path, lines: Path, limits: Limits, progress: Progress
) -> tuple[dict[str, list[int]], str]:
    """Run a program to its end, or until its time is up; ``lines`` gets one for every batch.

    Returns the peaks of memory, and a note if it failed or was ended.
    """
    log = folder / "output.log"
    # Nothing of this machine's habits: both find the threads that they find.
    unset = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
    environment = {key: value for key, value in os.environ.items() if key not in unset}
    environment |= {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, *command],
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
    watch = Watch(process.pid)
    try:
        note = _wait(process, lines, limits, progress, watch)
    finally:
        _end(process)
    if process.returncode and not note:
        last = log.read_text(errors="replace").strip().splitlines()[-1:]
        note = f"exit code {process.returncode}: {' '.join(last)}"
    return watch.peaks, note


def _wait(
    process: subprocess.Popen[bytes], lines: Path, limits: Limits, progress: Progress, watch: Watch
) -> str:
    """Watch it until it ends, or ask it to; returns why it was asked."""
    deadline = time.monotonic() + limits.start
    began = False
    while process.poll() is None:
        time.sleep(LOOK_S)
        watch.look()
        batches = len(_complete_lines(lines))
        progress(batches)
        if batches and not began:
            began, deadline = True, time.monotonic() + limits.run
        if time.monotonic() > deadline:
            return (
                f"ended: {limits.run:.0f} s over" if began else f"no batch in {limits.start:.0f} s"
            )
    return ""


def _end(process: subprocess.Popen[bytes]) -> None:
    """Let it save; kill it if it does not end."""
    for signum, patience in ((signal.SIGTERM, GRACE_S), (signal.SIGTERM, KILL_S)):
        if process.poll() is None:
            process.send_signal(signum)
            try:
                process.wait(patience)
            except subprocess.TimeoutExpired:
                continue
    if process.poll() is None:
        process.kill()
        process.wait()


def _complete_lines(path: Path) -> list[str]:
    try:
        text = path.read_text()
    except OSError:
        return []
    return text[: text.rfind("\n") + 1].splitlines()
