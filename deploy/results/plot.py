"""The curves of a run: rewards, staleness and throughput of its steps, and its evaluations."""

import math
from collections.abc import Callable, Mapping
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from learner.records import EvaluationResult, SetResult, Step
from learner.run_folder import RunFolder


def plot_run(folder: RunFolder) -> Path:
    """Draw the curves into a run folder; returns the picture's path. Raises `ConfigError`.

    Dotted lines are where weights or conditions of the rewards changed, points are evaluations.
    """
    lines, evaluations = folder.read_steps(), folder.read_evaluations()
    # Without a display, and only now: matplotlib takes a second to import.
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(lines[0].rewards)
    has_passes = any(found.pass_at for e in evaluations for found in e.sets.values())
    num_axes = len(names) + has_passes + 2
    figure, axes = pyplot.subplots(
        num_axes, 1, sharex=True, figsize=(8, 2.2 * num_axes), layout="constrained"
    )
    for axis, name in zip(axes, names, strict=False):
        _draw_reward(axis, lines, name)
        _draw_evaluations(axis, evaluations, partial(_mean_of, name))
    if has_passes:
        _draw_evaluations(axes[len(names)], evaluations, _passes)
        axes[len(names)].set_ylabel("pass@k")
    _draw_staleness(axes[-2], lines)
    _draw_throughput(axes[-1], lines)
    for axis in axes:
        axis.grid(alpha=0.3)
    axes[0].set_title(folder.path.resolve().name)
    folder.curves.parent.mkdir(exist_ok=True)
    figure.savefig(folder.curves, dpi=120)
    pyplot.close(figure)
    return folder.curves


def _draw_reward(axis: Any, lines: list[Step], name: str) -> None:
    steps = [line.step for line in lines]
    means = [line.rewards.get(name, math.nan) for line in lines]
    axis.plot(steps, means, label="training", color="C0")
    axis.set_ylabel(name)
    for step in _changes(lines):
        axis.axvline(step, color="gray", linestyle=":")


def _draw_evaluations(
    axis: Any,
    evaluations: list[EvaluationResult],
    figures: Callable[[SetResult], Mapping[str, float | None]],
) -> None:
    """Draw ``figures`` of each set against the version that was evaluated."""
    points: dict[str, list[tuple[int, float]]] = {}
    for evaluation in evaluations:
        for name, found in evaluation.sets.items():
            for what, value in figures(found).items():
                if value is not None:
                    label = f"{name} {what}".strip()
                    points.setdefault(label, []).append((evaluation.version, value))
    for number, (label, found_at) in enumerate(points.items(), start=1):
        # C0 is that of the training curve.
        color = f"C{number}"
        axis.plot(*zip(*found_at, strict=True), marker="o", markersize=3, label=label, color=color)
    if points:
        axis.legend(loc="best", fontsize="small")


def _mean_of(reward: str, found: SetResult) -> dict[str, float | None]:
    return {"": found.means.get(reward)}


def _passes(found: SetResult) -> dict[str, float | None]:
    return {f"pass@{k}": value for k, value in found.pass_at.items()}


def _draw_staleness(axis: Any, lines: list[Step]) -> None:
    steps = [line.step for line in lines]
    axis.plot(steps, [line.staleness_max for line in lines], label="largest")
    axis.plot(steps, [line.staleness_mean for line in lines], label="mean")
    axis.set_ylabel("staleness\n(versions)")
    axis.legend(loc="best", fontsize="small")
    axis.set_ylim(bottom=0)


def _draw_throughput(axis: Any, lines: list[Step]) -> None:
    steps = [line.step for line in lines]
    axis.plot(steps, [line.tokens_generated_per_s for line in lines], label="generated")
    axis.plot(steps, [line.tokens_trained_per_s for line in lines], label="trained")
    axis.set_ylabel("tokens/s")
    axis.set_xlabel("step")
    axis.legend(loc="best", fontsize="small")
    axis.set_ylim(bottom=0)


def _changes(lines: list[Step]) -> list[int]:
    """Steps from which on the rewards counted otherwise than before."""
    return [
        line.step
        for before, line in pairwise(lines)
        if line.reward_settings != before.reward_settings
    ]
