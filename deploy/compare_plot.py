"""The pictures of a comparison, drawn from its compare.json."""

from collections.abc import Iterable
from pathlib import Path
from statistics import median
from typing import Any

from deploy.compare_report import (
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
            for setting, runs in by_setting(result).items():
                at_lag = [run for run in runs if run["lag"] == lag]
                if at_lag:
                    _draw_runs(axis, [smooth(run["curves"][name]) for run in at_lag], setting)
            axis.grid(alpha=0.3)
        row[0].set_ylabel("" if lag is None else f"lag {lag}")
    for name, axis in zip(names, axes[0], strict=True):
        axis.set_title(name)
    for axis in axes[-1]:
        axis.set_xlabel("step")
    axes[0][-1].legend(fontsize="small")
    figure.supylabel(f"mean over {WINDOW} steps: median and range over seeds", fontsize="medium")
    return figure


def _draw_runs(axis: Any, curves: Iterable[list[float]], setting: str) -> None:
    points = list(zip(*curves, strict=False))
    steps = range(WINDOW, WINDOW + len(points))
    [line] = axis.plot(steps, [median(point) for point in points], label=setting)
    axis.fill_between(
        steps, list(map(min, points)), list(map(max, points)), color=line.get_color(), alpha=0.15
    )


def _draw_lags(result: Result) -> Any:
    """Held-out rewards after training, and ESS, against the lag."""
    from matplotlib import pyplot

    names = reward_names(result)
    figure, axes = pyplot.subplots(
        1, len(names) + 1, figsize=(4.5 * (len(names) + 1), 4), layout="constrained"
    )
    for setting, runs in by_setting(result).items():
        at_lags = {
            str(lag): [run for run in runs if run["lag"] == lag]
            for lag in lags(result)
            if any(run["lag"] == lag for run in runs)
        }
        for name, axis in zip(names, axes, strict=False):
            _draw_final(axis, at_lags, name, setting)
        axes[-1].plot(list(at_lags), [mean_ess(some) for some in at_lags.values()], marker="o")
    for name, axis in zip([*names, "effective sample size"], axes, strict=True):
        axis.set_title(name)
        axis.set_xlabel("lag (policy versions)")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("held-out, after: median and range over seeds")
    axes[0].legend(fontsize="small")
    return figure


def _draw_final(axis: Any, at_lags: dict[str, list[Run]], name: str, setting: str) -> None:
    finals = {lag: values for lag, runs in at_lags.items() if (values := final(runs, name))}
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
