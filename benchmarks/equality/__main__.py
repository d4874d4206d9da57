"""The program of `benchmarks.equality`."""

import argparse
import logging
import warnings
from collections.abc import Sequence

import torch
import transformers
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks import equality
from benchmarks.equality.families import FAMILIES, Family
from benchmarks.equality.steps import Steps, compare_steps
from benchmarks.equality.ways import Ways, compare_ways
from learner.packing.forward import Way


def main() -> int:
    parser = argparse.ArgumentParser(
        description=equality.__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--families", nargs="*", default=[""], help="those whose names have these")
    wanted = parser.parse_args().families
    families = [f for f in FAMILIES if any(part.lower() in f.name.lower() for part in wanted)]
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    logging.getLogger("learner").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    console = Console(width=150, highlight=False)
    found = [
        (compare_ways(family), compare_steps(family))
        for family in track(families, "", console=console, transient=True)
    ]
    console.print(make_table(families, found))
    console.print(f"torch {torch.__version__}, transformers {transformers.__version__}")
    return 0


def make_table(families: Sequence[Family], found: Sequence[tuple[Ways, Steps]]) -> Table:
    table = Table(title="largest differences: log-probability, gradient; of weights: mean, largest")
    for name in ("family", "way", "shared", "alone", "padded", "head", "checkpointed"):
        table.add_column(name)
    for name in ("5 steps, lr", "splits: metrics", "splits, lr"):
        table.add_column(name)
    for family, (ways, steps) in zip(families, found, strict=True):
        parts = (ways.shared, ways.alone, ways.padded, ways.head, ways.checkpointed)
        table.add_row(
            family.name,
            name_of(ways.way),
            *("-" if p is None else f"{short(p.logprobs)}, {short(p.gradients)}" for p in parts),
            f"{short(steps.textbook.mean)}, {short(steps.textbook.largest)}",
            short(steps.split_metrics),
            f"{short(steps.split_weights.mean)}, {short(steps.split_weights.largest)}",
        )
    return table


def name_of(way: Way) -> str:
    if way.packed:
        return "packed"
    return "padded" if way.max_sequences is None else "one by one"


def short(value: float) -> str:
    return f"{value:.0e}".replace("e-0", "e-").replace("0e+00", "0")


if __name__ == "__main__":
    raise SystemExit(main())
