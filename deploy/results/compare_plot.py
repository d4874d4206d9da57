"""The pictures of a comparison, drawn from its compare.json."""

import math
from collections.abc import Iterable
from pathlib import Path
from statistics import median
from typing import Any

from deploy.results.compare_report import (
    WINDOW,
    Result,
    Run,
    by_setting,
    final,
    lags,
    mean_ess,
    read_result,
    reward_names,
    smooth,
)


def plot_comparison(folder: Path) -> list[Path]:
    """Draw what compare.json holds; returns the pictures' paths. Raises `ConfigError`.

    ``compare.png`` has the training curves, one row for each lag; with several lags,
    ``compare-lags.png`` has the results against them.
    """
    result = read_result(folder)
    # Without a display, and only now: matplotlib takes a second to import.
    import matplotlib

    matplotlib.use("Agg")
    drawn = [_save(_draw_curves(result), folder / "compare.png")]
    if len(lags(result)) > 1:
        drawn.append(_save(_draw_lags(result), folder / "compare-lags.png"))
    return drawn


def _draw_curves(result: Result) -> Any:
    """Median and range over seeds, a column for each reward."""
    from matplotlib import pyplot

    names, rows = reward_names(result), lags(result)
    figure, axes = pyplot.subplots(
        len(rows),
        len(names),
        figsize=(5.5 * len(names), 4 if len(rows) == 1 else 2.6 * len(rows)),
        layout="constrained",
        squeeze=False,
        sharex=True,
        sharey="col",
    )
    for lag, row in zip(rows, axes, strict=True):
        for name, axis in zip(names, row, strict=True):
            for index, (setting, runs) in enumerate(by_setting(result).items()):
                curves = [smooth(run["curves"][name]) for run in runs if run["lag"] == lag]
                # Also without a run: the first row has the legend of all.
                _draw_runs(axis, curves, setting, f"C{index}")
            axis.grid(alpha=0.3)
        row[0].set_ylabel("" if lag is None else f"lag {lag}")
    for name, axis in zip(names, axes[0], strict=True):
        axis.set_title(name)
    for axis in axes[-1]:
        axis.set_xlabel("step")
    axes[0][-1].legend(fontsize="small")
    figure.supylabel(f"mean over {WINDOW} steps: median and range over seeds", fontsize="medium")
    return figure


def _draw_runs(axis: Any, curves: Iterable[list[float]], setting: str, color: str) -> None:
    # A reward may apply to nothing in a window of steps.
    known = [[v for v in point if not math.isnan(v)] for point in zip(*curves, strict=False)]
    points = [(step, point) for step, point in enumerate(known, start=WINDOW) if point]
    steps = [step for step, _ in points]
    axis.plot(steps, [median(point) for _, point in points], label=setting, color=color)
    axis.fill_between(
        steps,
        [min(point) for _, point in points],
        [max(point) for _, point in points],
        color=color,
        alpha=0.15,
    )


def _draw_lags(result: Result) -> Any:
    """Held-out rewards after training, and ESS, against the lag."""
    from matplotlib import pyplot

    names = reward_names(result)
    figure, axes = pyplot.subplots(
        1, len(names) + 1, figsize=(4.5 * (len(names) + 1), 4), layout="constrained"
    )
    places = {lag: place for place, lag in enumerate(lags(result))}
    for setting, runs in by_setting(result).items():
        at_places = {
            place: some
            for lag, place in places.items()
            if (some := [run for run in runs if run["lag"] == lag])
        }
        for name, axis in zip(names, axes, strict=False):
            _draw_final(axis, at_places, name, setting)
        axes[-1].plot(list(at_places), [mean_ess(some) for some in at_places.values()], marker="o")
    for name, axis in zip([*names, "effective sample size"], axes, strict=True):
        axis.set_title(name)
        axis.set_xticks(list(places.values()), [str(lag) for lag in places])
        axis.set_xlabel("lag (policy versions)")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("held-out, after: median and range over seeds")
    axes[0].legend(fontsize="small")
    return figure


def _draw_final(axis: Any, at_places: dict[int, list[Run]], name: str, setting: str) -> None:
    finals = {place: values for place, runs in at_places.items() if (values := final(runs, name))}
    middles = [median(values) for values in finals.values()]
    axis.errorbar(
        list(finals),
        middles,
        yerr=(
            [middle - min(values) for middle, values in zip(middles, finals.values(), strict=True)],
            [max(values) - middle for middle, values in zip(middles, finals.values(), strict=True)],
        ),
        marker="o",
        capsize=3,
        label=setting,
    )


def _save(figure: Any, path: Path) -> Path:
    from matplotlib import pyplot

    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path
