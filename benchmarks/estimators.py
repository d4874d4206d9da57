"""Time of `gdpo.compute_advantages`, by estimator and size, on one core.

    python -m benchmarks.estimators [--repeats 30]

Every time also stands as a multiple of a plain torch normalisation, (r - mean_G r) / (std_G r +
eps), of the same tensor in the same run: on a busy machine the ratio says more than the time.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import gdpo

SIZES = ((512, 4, 2), (512, 16, 3), (4096, 16, 2), (4096, 16, 8))
MISSING_SHARE = 0.1


@dataclass(frozen=True)
class Timing:
    """Time of one function, in milliseconds."""

    best: float
    median: float


def timings(functions: list[Callable[[], object]], repeats: int) -> list[Timing]:
    """Time the functions in turn, so that what disturbs the machine disturbs them alike."""
    for function in functions:
        function()
    times: list[list[float]] = [[] for _ in functions]
    for _ in range(repeats):
        for function, taken in zip(functions, times, strict=True):
            start = time.perf_counter()
            function()
            taken.append(1000 * (time.perf_counter() - start))
    return [Timing(min(taken), statistics.median(taken)) for taken in times]


def some_rewards(size: tuple[int, int, int], missing_share: float) -> Tensor:
    """Scores of 0 to 4, as graders give them, some of them missing."""
    generator = torch.Generator().manual_seed(0)
    rewards = torch.randint(0, 5, size, generator=generator).float()
    missing = torch.rand(size, generator=generator) < missing_share
    return rewards.masked_fill_(missing, torch.nan)


def plain(rewards: Tensor) -> Tensor:
    return (rewards - rewards.mean(dim=1, keepdim=True)) / (rewards.std(dim=1, keepdim=True) + 1e-6)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=30)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)

    table = Table(title="compute_advantages, milliseconds, one core")
    for column in ("P x G x K", "missing", "estimator", "best", "median", "x plain torch"):
        table.add_column(column, justify="left" if column == "estimator" else "right")
    for size in SIZES:
        for missing_share in (0.0, MISSING_SHARE):
            rewards = some_rewards(size, missing_share)
            functions: list[Callable[[], object]] = [lambda r=rewards: plain(r)]  # type: ignore[misc]
            for name in gdpo.ESTIMATORS:
                functions.append(
                    lambda r=rewards, n=name: gdpo.compute_advantages(r, estimator=n)  # type: ignore[misc]
                )
            found = timings(functions, repeats)
            for name, timing in zip(["plain torch", *gdpo.ESTIMATORS], found, strict=True):
                table.add_row(
                    " x ".join(map(str, size)),
                    f"{missing_share:.0%}",
                    name,
                    f"{timing.best:.2f}",
                    f"{timing.median:.2f}",
                    f"{timing.median / found[0].median:.2f}",
                )
            table.add_section()
    Console().print(table)


if __name__ == "__main__":
    main()
