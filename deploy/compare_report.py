"""The results of a comparison: collected from its runs, as a table and as curves."""

import json
import math
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

from rich.console import Console
from rich.table import Table

from protocol.errors import ConfigError

WINDOW = 10
"""Steps over which a curve is averaged before it is said to have reached something."""
REACHED = 0.9
"""Of the way from the lowest to the highest level that any run of the comparison came to."""

Result = dict[str, Any]


def collect(runs: list[tuple[str, int, Path]]) -> Result:
    """Held-out means and training curves of (label, seed, run folder), by label and seed."""
    result: Result = {"labels": {}}
    for label, seed, folder in runs:
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        summary = json.loads((folder / "summary.json").read_text())
        result["labels"].setdefault(label, {})[str(seed)] = {
            "before": (summary["rewards"]["before"] or {}).get("means"),
            "after": (summary["rewards"]["after"] or {}).get("means"),
            "curves": {
                name: [line["rewards"][name] for line in lines] for name in lines[0]["rewards"]
            },
            "ess": [line["ess"] for line in lines],
        }
    return result


def levels(result: Result) -> dict[str, float]:
    """For each reward, the level that counts as reached: `REACHED` of the whole range."""
    found = {}
    for name in _rewards(result):
        smooth = [_smooth(run["curves"][name]) for run in _runs(result)]
        low = min(min(curve) for curve in smooth)
        high = max(max(curve) for curve in smooth)
        found[name] = low + REACHED * (high - low)
    return found


def statistics(seeds: dict[str, Any], name: str, level: float) -> dict[str, Any]:
    """One reward of one label, over its seeds.

    ``final`` is the held-out mean after training with half the width of its 95 % confidence
    interval over seeds (None for one seed), ``area`` the mean of the training curve, ``steps`` the
    median step at which its mean over `WINDOW` steps reached ``level`` (a seed that never did
    counts as infinitely late), ``converged`` the share of seeds that did.
    """
    finals = [run["after"][name] for run in seeds.values() if run["after"]]
    steps = [steps_to(run["curves"][name], level) for run in seeds.values()]
    middle = median(math.inf if step is None else step for step in steps)
    return {
        "final": fmean(finals) if finals else None,
        "half_width": _half_width(finals),
        "area": fmean(fmean(run["curves"][name]) for run in seeds.values()),
        "steps": None if math.isinf(middle) else middle,
        "converged": sum(step is not None for step in steps) / len(steps),
    }


def steps_to(curve: list[float], level: float) -> int | None:
    """First step (from 1) at which the mean over the last `WINDOW` steps reaches ``level``."""
    return next(
        (
            index + min(WINDOW, len(curve))
            for index, value in enumerate(_smooth(curve))
            if value >= level
        ),
        None,
    )


def print_comparison(result: Result) -> None:
    """A table for each reward."""
    console = Console(highlight=False)
    for name, level in levels(result).items():
        table = Table(title=f"{name} (reached: {level:.2f})")
        table.add_column("setting", no_wrap=True)
        for column in ("seeds", "held-out, after", "area", "steps to reach", "seeds that did"):
            table.add_column(column, justify="right")
        for label, seeds in result["labels"].items():
            row = statistics(seeds, name, level)
            width = "" if row["half_width"] is None else f" ± {row['half_width']:.3f}"
            table.add_row(
                label,
                str(len(seeds)),
                "-" if row["final"] is None else f"{row['final']:.3f}{width}",
                f"{row['area']:.3f}",
                "-" if row["steps"] is None else f"{row['steps']:g}",
                f"{row['converged']:.0%}",
            )
        console.print(table)


def plot_comparison(folder: Path) -> Path:
    """Draw ``compare.png`` from compare.json: median and range over seeds, per reward."""
    try:
        result: Result = json.loads((folder / "compare.json").read_text())
    except OSError as error:
        raise ConfigError(f"cannot read {folder}/compare.json: {error.strerror}") from error
    except json.JSONDecodeError as error:
        raise ConfigError(f"{folder}/compare.json is damaged: {error}") from error
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = _rewards(result)
    figure, axes = pyplot.subplots(
        1, len(names), figsize=(5.5 * len(names), 4), layout="constrained", squeeze=False
    )
    for axis, name in zip(axes[0], names, strict=True):
        for label, seeds in result["labels"].items():
            curves = [_smooth(run["curves"][name]) for run in seeds.values()]
            points = list(zip(*curves, strict=False))
            steps = range(WINDOW, WINDOW + len(points))
            [line] = axis.plot(steps, [median(point) for point in points], label=label)
            axis.fill_between(
                steps,
                list(map(min, points)),
                list(map(max, points)),
                color=line.get_color(),
                alpha=0.15,
            )
        axis.set_title(name)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel(f"mean over {WINDOW} steps: median and range over seeds")
    axes[0][-1].legend(fontsize="small")
    path = folder / "compare.png"
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path


def _runs(result: Result) -> list[dict[str, Any]]:
    return [run for seeds in result["labels"].values() for run in seeds.values()]


def _rewards(result: Result) -> list[str]:
    return list(_runs(result)[0]["curves"])


def _smooth(curve: list[float]) -> list[float]:
    """Means over windows of `WINDOW` steps, or over the whole curve if it is shorter."""
    window = min(WINDOW, len(curve))
    return [fmean(curve[i : i + window]) for i in range(len(curve) - window + 1)]


def _half_width(values: list[float]) -> float | None:
    """Half of the 95 % confidence interval of the mean, by Student's t."""
    if len(values) < 2:
        return None
    from scipy.stats import t

    quantile = float(t.ppf(0.975, len(values) - 1))
    return quantile * stdev(values) / math.sqrt(len(values))
