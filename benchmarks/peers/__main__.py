"""TRL's `GRPOTrainer` and this system, the same work on this machine, one after the other.

    make bench-peers                                      # all of it
    .venv-peers/bin/python -m benchmarks.peers --cases demo --limit 60

Samples a second count from the first prompt to the last optimiser step, the first batch included,
in which both are slower; loading is left out. Peak memory is what was resident, libraries that
several processes share counted in each. Writes everything to a JSON file too.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from datasets import disable_progress_bars
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.peers.cases import CASES, Case
from benchmarks.peers.report import make_table
from benchmarks.peers.result import Result
from benchmarks.peers.runs import SYSTEMS, Limits
from benchmarks.peers.smollm2 import NotThereError

PACKAGES = ("torch", "transformers", "trl", "datasets", "accelerate")


def main() -> int:
    options = parse()
    console = Console(width=150, highlight=False)
    if "trl" in options.systems and find_spec("trl") is None:
        print("bench-peers: TRL is not installed here: make bench-peers does it", file=sys.stderr)
        return 2
    disable_progress_bars()
    results, missing = [], False
    for name in options.cases:
        with tempfile.TemporaryDirectory(prefix="peers-") as folder:
            try:
                results.append(run_case(name, Path(folder), options, console))
            except NotThereError as error:
                missing = True
                console.print(f"{name}: skipped, {error}", soft_wrap=True)
    console.print(make_table(results))
    write_json(options.out, results)
    console.print(f"figures: {options.out}", soft_wrap=True)
    complete = all(result.ends for _, of_case in results for result in of_case)
    return 0 if complete and not missing else 1


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="in place of that of each case"
    )
    parser.add_argument("--batches", type=int, help="in place of the number of each case")
    parser.add_argument(
        "--limit", type=float, default=300, help="seconds for one case with one system"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/bench-peers.json"))
    return parser.parse_args()


def run_case(
    name: str, folder: Path, options: argparse.Namespace, console: Console
) -> tuple[Case, Sequence[Result]]:
    """Run one case with every system, one after the other, and say how it goes."""
    made = folder / "made"
    made.mkdir()
    case = CASES[name](made)
    if options.dtype:
        case = replace(case, dtype=options.dtype)
    if options.batches:
        case = replace(case, batches=options.batches)
    limits = Limits(start=options.limit, run=options.limit)
    results = []
    for system in options.systems:
        work = folder / system
        work.mkdir()
        with shown(f"{case.name}, {system}", case.batches, console) as progress:
            result = SYSTEMS[system](case, work, limits, progress)
        results.append(result)
        console.print(f"{case.name}, {system}: {result.samples_per_s:.2f} samples/s {result.note}")
    return case, results


@contextmanager
def shown(what: str, batches: int, console: Console) -> Iterator[Callable[[int], None]]:
    """Show how many batches are done, where there is a terminal."""
    columns = (TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn())
    hidden = not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=hidden) as progress:
        task = progress.add_task(what, total=batches)
        yield lambda done: progress.update(task, completed=done)


def write_json(path: Path, results: Sequence[tuple[Case, Sequence[Result]]]) -> None:
    """Write the machine, the versions, and every figure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    machine = {"cores": os.cpu_count(), "python": platform.python_version()}
    versions = {name: version(name) for name in PACKAGES if find_spec(name)}
    cases = [
        {"case": asdict(case), "results": [result.as_json() for result in of_case]}
        for case, of_case in results
    ]
    path.write_text(json.dumps({**machine, "versions": versions, "cases": cases}, indent=1))


if __name__ == "__main__":
    sys.exit(main())
