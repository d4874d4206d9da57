"""The deterministic run: shows that a change changes no number.

    python -m tools.same_numbers [--toy] [--config FILE] [key.sub=value ...]

Trains the demo's recipe with one actor and a lag of 0, so that generation and training take turns,
and prints every step's loss with all its digits, and a digest of these lines. Two commits that
compute the same print the same digest; the first line that differs says where they part. Digits
depend on the machine: run both commits on the same one. Overrides take the place of `OVERRIDES`, so
that a commit whose keys have other names can be given those.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent
STEPS = 40
OVERRIDES = (
    f"training.steps={STEPS}",
    "training.threads=1",
    "training.batch_groups=8",
    "endpoints.bind=tcp://127.0.0.1:0",
    "endpoints.metrics_port=0",
)
"""What makes it short, and lets it run beside others."""
TURNS = (
    "buffer.lag=0",
    "eval.prompts=2",
    "eval.num_rollouts=1",
    # One group at a time: how many are decoded together changes the last digits.
    "actor.max_leases=1",
)
TIMEOUT_S = 580.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, and print steps and digest; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tools.same_numbers")
    parser.add_argument("--config", type=Path, default=ROOT / "examples/tool_calling_tiny.toml")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help=" ".join(OVERRIDES))
    options = parser.parse_args(arguments)
    overrides = [*TURNS, *(options.overrides or OVERRIDES)]
    with tempfile.TemporaryDirectory() as folder:
        run = train(options.config.resolve(), Path(folder), overrides)
        lines = step_lines(run)
    print("\n".join(lines))
    print(f"{len(lines)} steps, digest {digest(lines)}")
    return 0


def train(config: Path, folder: Path, overrides: Sequence[str]) -> Path:
    """Train to the end with one actor; returns the run folder.

    Raises RuntimeError, with what the processes printed, if a process fails.
    """
    learner = _start(folder, "learner", "-m", "deploy", "learner", str(config), *overrides)
    actor = None
    try:
        while not (found := list(folder.glob("runs/*/endpoints.json"))):
            if learner.poll() is not None:
                raise RuntimeError((folder / "learner.log").read_text())
            time.sleep(0.05)
        url = json.loads(found[0].read_text())["learner"]
        actor = _start(folder, "actor", "-m", "deploy", "actor", "--learner", url)
        if learner.wait(TIMEOUT_S) != 0:
            raise RuntimeError((folder / "learner.log").read_text())
    finally:
        for process in (learner, actor):
            if process is not None and process.poll() is None:
                process.terminate()
                process.wait()
    return found[0].parent


def step_lines(run: Path) -> list[str]:
    """A line per step: its number, and its loss with all digits."""
    lines = []
    for text in (run / "metrics.jsonl").read_text().splitlines():
        step = json.loads(text)
        lines.append(f"{step['step']:>4}  {step['loss']!r}")
    return lines


def digest(lines: Sequence[str]) -> str:
    """BLAKE2b of the lines, 16 hex digits."""
    return hashlib.blake2b("\n".join(lines).encode(), digest_size=8).hexdigest()


def _start(folder: Path, name: str, *arguments: str) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with (folder / f"{name}.log").open("wb") as output:
        return subprocess.Popen(
            [sys.executable, *arguments],
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )


if __name__ == "__main__":
    sys.exit(main())
