"""A learner's step, against the step of an earlier version and against a bare training step.

    python -m benchmarks.learner [--earlier 9527f60] [--rounds 2] [--threads 2] [--quick]

Random weights of Qwen2's shape, random tokens, one optimiser step on each batch, float32, on a CPU.
A round measures all sides once, each in a process of its own; the best of the rounds counts. "bare"
sends the distinct tokens of the batch, prompts once, through the model as pretraining would: no
groups, no advantages, no correction, no metrics, logits in memory. The earlier version comes from
this repository's history; how many sequences its passes have is set so that its logits fit.

Memory is the growth of the process's peak by the measured step, after a small one has made
gradients and moments. The last two rows are the same tokens with vocabularies of different size.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

ROOT = Path(__file__).parents[1]
SIDE = Path(__file__).with_name("learner_side.py")


@dataclass(frozen=True)
class Work:
    """A batch of one minibatch, and the model that it goes through."""

    prompt: int
    """Tokens of each prompt."""
    completion: int
    """Median tokens of a completion; they are lognormal with a sigma of 0.5."""
    rollouts: int
    groups: int
    vocab_size: int = 32_000
    hidden: int = 384
    layers: int = 8

    @property
    def name(self) -> str:
        return f"{self.prompt}, {self.completion}, {self.rollouts}"

    @property
    def longest(self) -> int:
        """Tokens of the longest completion there may be."""
        return 4 * self.completion


LAYOUTS = (
    Work(512, 200, 4, groups=4),
    Work(256, 1000, 8, groups=1),
    Work(64, 2000, 16, groups=1, hidden=256, layers=6),
)
MODELS = (
    replace(LAYOUTS[0], hidden=256, layers=4),
    replace(LAYOUTS[0], hidden=768, layers=12, groups=1),
)
VOCABULARIES = (
    replace(LAYOUTS[0], vocab_size=32_000, hidden=128, layers=4),
    replace(LAYOUTS[0], vocab_size=151_936, hidden=128, layers=4),
)
QUICK = (Work(128, 32, 4, groups=2, vocab_size=4000, hidden=128, layers=2),)
SIDES = ("earlier", "ours", "bare")
Figures = dict[str, float]


def main() -> int:
    options = parse()
    console = Console(width=130, highlight=False)
    works = QUICK if options.quick else (*LAYOUTS, *MODELS, *VOCABULARIES)
    results: list[dict[str, Figures]] = []
    with tempfile.TemporaryDirectory(prefix="learner-") as folder:
        unpack(options.earlier, Path(folder))
        columns = TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn()
        with Progress(*columns, console=console, transient=True) as progress:
            task = progress.add_task("", total=len(works) * options.rounds * len(SIDES))
            for work in works:
                best: dict[str, Figures] = {}
                for _ in range(options.rounds):
                    for side in SIDES:
                        progress.update(task, description=f"{describe(work)}: {side}")
                        path = Path(folder) if side == "earlier" else ROOT
                        figures = measure(side, work, path, options.threads)
                        if side not in best or figures["seconds"] < best[side]["seconds"]:
                            best[side] = figures
                        progress.advance(task)
                results.append(best)
                # What is there stays if a later one fails.
                console.print(
                    describe(work), *(f"{name} {best[name]['seconds']:.2f} s" for name in SIDES)
                )
    console.print(make_table(works, results))
    console.print(
        f"{os.cpu_count()} CPU cores, {options.threads} threads, "
        f"Python {platform.python_version()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}; "
        f"earlier: {options.earlier}",
        soft_wrap=True,
    )
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--earlier", default="9527f60", help="commit of the earlier version")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="one small batch, to try it")
    return parser.parse_args()


def unpack(commit: str, folder: Path) -> None:
    """Write the files of a commit into a folder."""
    archive = subprocess.run(
        [tool("git"), "archive", commit], cwd=ROOT, capture_output=True, check=False
    )
    if archive.returncode:
        sys.exit(f"learner: git has no commit {commit}: {archive.stderr.decode().strip()}")
    subprocess.run([tool("tar"), "x", "-C", str(folder)], input=archive.stdout, check=True)


def tool(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        sys.exit(f"learner: {name} is not installed")
    return path


def measure(side: str, work: Work, path: Path, threads: int) -> Figures:
    """One side in a process of its own, with the packages that are in ``path``."""
    run = subprocess.run(
        [sys.executable, "-P", str(SIDE), side, str(threads), json.dumps(asdict(work))],
        env=os.environ | {"PYTHONPATH": str(path), "OMP_NUM_THREADS": str(threads)},
        cwd=path,
        capture_output=True,
        text=True,
        check=False,
    )
    if run.returncode:
        sys.exit(f"learner: {side}, {describe(work)} failed:\n{run.stderr[-2000:]}")
    figures: Figures = json.loads(run.stdout.strip().splitlines()[-1])
    return figures


def describe(work: Work) -> str:
    return f"({work.name}) x {work.groups}, {work.layers} x {work.hidden}, {work.vocab_size:,}"


def make_table(works: tuple[Work, ...], results: list[dict[str, Figures]]) -> Table:
    table = Table(title="a step on (prompt, completion, rollouts) x groups")
    for name in (
        "batch, layers x hidden, vocabulary",
        "seconds: earlier / ours / bare",
        "earlier/ours",
        "bare/ours",
        "tokens computed: earlier / ours",
        "memory, MB: earlier / ours / bare",
    ):
        table.add_column(name)
    for work, sides in zip(works, results, strict=True):
        seconds, tokens, size = (
            [sides[side][field] for side in SIDES] for field in ("seconds", "tokens", "bytes")
        )
        table.add_row(
            describe(work),
            " / ".join(f"{value:.2f}" for value in seconds),
            f"{seconds[0] / seconds[1]:.2f}",
            f"{seconds[2] / seconds[1]:.0%}",
            " / ".join(f"{value:,.0f}" for value in tokens[:2]),
            " / ".join(f"{value / 1e6:,.0f}" for value in size),
        )
    return table


if __name__ == "__main__":
    raise SystemExit(main())
