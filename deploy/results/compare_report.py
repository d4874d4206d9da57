"""The results of a comparison: collected from its runs, and printed as tables.

compare.json is the list of runs, each with its setting, its seed and its curves; tables and plots
are made from that alone.
"""

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

from rich.console import Console
from rich.table import Table

from learner.run_folder import RunFolder
from protocol.errors import ConfigError

WINDOW = 10
"""Steps over which a curve is averaged before it is said to have reached something."""
REACHED = 0.9
"""Share of the way from the lowest to the highest level that any run of the comparison came to."""

RUN_KEYS = {"estimator", "correction", "lag", "seed", "before", "after", "curves", "ess"}

Run = dict[str, Any]
Result = dict[str, list[Run]]


def collect(runs: list[tuple[dict[str, Any], RunFolder]]) -> Result:
    """Gather what (setting, run folder) came to: held-out means, training curves, ESS.

    A setting has the keys of `deploy.results.compare.Cell`. Raises `ConfigError`.
    """
    result: Result = {"runs": []}
    for setting, folder in runs:
        steps, summary = folder.read_steps(), folder.read_summary()
        result["runs"].append(
            {
                **setting,
                "before": summary.before.first.means if summary.before else {},
                "after": summary.after.first.means if summary.after else {},
                "curves": {
                    name: [step.rewards.get(name, math.nan) for step in steps]
                    for name in steps[0].rewards
                },
                "ess": [step.metrics.get("ess", math.nan) for step in steps],
            }
        )
    return result


def read_result(folder: Path) -> Result:
    """compare.json of a comparison; raises `ConfigError`."""
    path = folder / "compare.json"
    try:
        result: Result = json.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is damaged: {error}") from error
    runs = result.get("runs") if isinstance(result, dict) else None
    if not isinstance(runs, list) or not runs:
        raise ConfigError(f"{path} holds no runs")
    if not all(isinstance(run, dict) and run.keys() >= RUN_KEYS for run in runs):
        raise ConfigError(f"{path} is damaged: a run lacks one of {', '.join(sorted(RUN_KEYS))}")
    return result


# --- statistics ---------------------------------------------------------------------------------


def reward_names(result: Result) -> list[str]:
    """Return the names of the rewards, in the order of the configuration."""
    return list(result["runs"][0]["curves"])


def lags(result: Result) -> list[int | None]:
    """Return the lags from the smallest on; [None] if staleness was not fixed."""
    return sorted({run["lag"] for run in result["runs"]}, key=lambda lag: lag or 0)


def by_setting(result: Result) -> dict[str, list[Run]]:
    """The runs of each estimator and correction, under a name that says only what differs."""
    runs = result["runs"]
    varying = [key for key in ("estimator", "correction") if len({run[key] for run in runs}) > 1]
    settings: dict[str, list[Run]] = {}
    for run in runs:
        name = " ".join(run[key] for key in varying or ["estimator"])
        settings.setdefault(name, []).append(run)
    return settings


def levels(result: Result) -> dict[str, float]:
    """Find the level of each reward that counts as reached: `REACHED` of the whole range."""
    found = {}
    for name in reward_names(result):
        values = [value for run in result["runs"] for value in smooth(run["curves"][name])]
        known = [value for value in values if not math.isnan(value)]
        low, high = min(known, default=math.nan), max(known, default=math.nan)
        found[name] = low + REACHED * (high - low)
    return found


def final(runs: list[Run], name: str) -> list[float]:
    """Held-out means after training, of the runs that have one."""
    return [value for run in runs if (value := run["after"].get(name)) is not None]


def steps_to(curve: list[float], level: float) -> int | None:
    """First step (from 1) at which the mean over the last `WINDOW` steps reaches ``level``."""
    return next(
        (
            index + min(WINDOW, len(curve))
            for index, value in enumerate(smooth(curve))
            if value >= level
        ),
        None,
    )


def median_steps(runs: list[Run], name: str, level: float) -> float | None:
    """Median over seeds; one that never got there counts as infinitely late. None for never."""
    steps = [steps_to(run["curves"][name], level) for run in runs]
    middle = median(math.inf if step is None else step for step in steps)
    return None if math.isinf(middle) else middle


def converged(runs: list[Run], name: str, level: float) -> float:
    """Share of seeds that reached the level."""
    return fmean(steps_to(run["curves"][name], level) is not None for run in runs)


def area(runs: list[Run], name: str) -> float:
    """Mean height of the training curves: the area under them over their length."""
    return fmean(_mean(run["curves"][name]) for run in runs)


def mean_ess(runs: list[Run]) -> float:
    """Effective sample size of the importance weights, over seeds and steps.

    A lag is not complete before step lag + 1: the steps up to it do not count.
    """
    return fmean(_mean(run["ess"][run["lag"] or 0 :]) for run in runs)


def smooth(curve: list[float]) -> list[float]:
    """Means over windows of `WINDOW` steps, or over the whole curve if it is shorter."""
    window = min(WINDOW, len(curve))
    return [_mean(curve[i : i + window]) for i in range(len(curve) - window + 1)]


def half_width(values: list[float]) -> float | None:
    """Half of the 95 % confidence interval of the mean, by Student's t; None for one value."""
    if len(values) < 2:
        return None
    from scipy.stats import t

    quantile = float(t.ppf(0.975, len(values) - 1))
    return quantile * stdev(values) / math.sqrt(len(values))


def _mean(values: list[float]) -> float:
    """Mean of those that are not NaN: a reward may apply to nothing in a batch."""
    known = [value for value in values if not math.isnan(value)]
    return fmean(known) if known else math.nan


# --- tables -------------------------------------------------------------------------------------


def print_comparison(result: Result) -> None:
    """Tables over seeds: settings against figures, or against lags if staleness was fixed."""
    console = Console(highlight=False)
    by_lag = lags(result) != [None]
    for name, level in levels(result).items():
        if by_lag:
            title = f"{name}, held-out, after"
            console.print(_by_lag(result, title, partial(_final, name=name)))
            title = f"{name}, steps to reach {level:.2f}"
            console.print(_by_lag(result, title, partial(_steps, name=name, level=level)))
        else:
            console.print(_by_figure(result, name, level))
    if by_lag:
        console.print(_by_lag(result, "effective sample size, mean", _ess))


def _by_figure(result: Result, name: str, level: float) -> Table:
    table = Table(title=f"{name} (level to reach: {level:.2f})")
    table.add_column("setting", no_wrap=True)
    columns = ("seeds", "held-out, after", "area", "steps to reach", "ESS")
    for column in columns:
        table.add_column(column, justify="right")
    for setting, runs in by_setting(result).items():
        table.add_row(
            setting,
            str(len(runs)),
            _final(runs, name),
            f"{area(runs, name):.3f}",
            _steps(runs, name, level),
            _ess(runs),
        )
    return table


def _by_lag(result: Result, title: str, figure: Callable[[list[Run]], str]) -> Table:
    """Make a table of settings and lags; cells of fewer seeds say how many."""
    cells = {
        (setting, lag): [run for run in runs if run["lag"] == lag]
        for setting, runs in by_setting(result).items()
        for lag in lags(result)
    }
    most = max(map(len, cells.values()))
    table = Table(title=f"{title} ({most} seeds)")
    table.add_column("setting", no_wrap=True)
    for lag in lags(result):
        table.add_column(f"lag {lag}", justify="right")
    for setting in by_setting(result):
        row = [cells[setting, lag] for lag in lags(result)]
        table.add_row(
            setting,
            *(
                (figure(runs) + ("" if len(runs) == most else f" (of {len(runs)})")) if runs else ""
                for runs in row
            ),
        )
    return table


def _final(runs: list[Run], name: str) -> str:
    values = final(runs, name)
    if not values:
        return "-"
    width = half_width(values)
    return f"{fmean(values):.3f}" + ("" if width is None else f" ± {width:.3f}")


def _steps(runs: list[Run], name: str, level: float) -> str:
    """Median, and the share of seeds that got there where it is not all."""
    steps, share = median_steps(runs, name, level), converged(runs, name, level)
    text = "-" if steps is None else f"{steps:g}"
    return text if share in (0, 1) else f"{text} ({share:.0%})"


def _ess(runs: list[Run]) -> str:
    return f"{mean_ess(runs):.2f}"
