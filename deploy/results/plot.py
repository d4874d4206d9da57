"""The curves of a run: rewards, staleness, throughput, from its metrics.jsonl."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

from protocol.errors import ConfigError

_DRAWN = {
    "step",
    "rewards",
    "reward_settings",
    "staleness_max",
    "staleness_mean",
    "tokens_generated_per_s",
    "tokens_trained_per_s",
}


def plot_run(folder: Path) -> Path:
    """Draw ``plots/curves.png`` in a run folder; returns its path. Raises `ConfigError`.

    Dotted lines are where weights or conditions of the rewards changed.
    """
    lines = _read(folder / "metrics.jsonl")
    # Without a display, and only now: matplotlib takes a second to import.
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(lines[0]["rewards"])
    figure, axes = pyplot.subplots(
        len(names) + 2, 1, sharex=True, figsize=(8, 2.2 * (len(names) + 2)), layout="constrained"
    )
    steps = [line["step"] for line in lines]
    for axis, name in zip(axes, names, strict=False):
        axis.plot(steps, [line["rewards"][name] for line in lines], color="tab:blue")
        axis.set_ylabel(name)
        for step in _changes(lines):
            axis.axvline(step, color="gray", linestyle=":")
    staleness, throughput = axes[-2:]
    staleness.plot(steps, [line["staleness_max"] for line in lines], label="largest")
    staleness.plot(steps, [line["staleness_mean"] for line in lines], label="mean")
    staleness.set_ylabel("staleness\n(versions)")
    throughput.plot(steps, [line["tokens_generated_per_s"] for line in lines], label="generated")
    throughput.plot(steps, [line["tokens_trained_per_s"] for line in lines], label="trained")
    throughput.set_ylabel("tokens/s")
    throughput.set_xlabel("step")
    for axis in (staleness, throughput):
        axis.legend(loc="best", fontsize="small")
        axis.set_ylim(bottom=0)
    for axis in axes:
        axis.grid(alpha=0.3)
    axes[0].set_title(folder.resolve().name)
    path = folder / "plots" / "curves.png"
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path


def _changes(lines: list[dict[str, Any]]) -> list[int]:
    """Steps from which on the rewards counted otherwise than before."""
    return [
        line["step"]
        for before, line in pairwise(lines)
        if line["reward_settings"] != before["reward_settings"]
    ]


def _read(path: Path) -> list[dict[str, Any]]:
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines()]
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}; is it a run folder?") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is damaged: {error}") from error
    if not lines:
        raise ConfigError(f"{path} holds no step yet")
    if not all(isinstance(line, dict) and line.keys() >= _DRAWN for line in lines):
        raise ConfigError(f"{path} is damaged: a line lacks one of {', '.join(sorted(_DRAWN))}")
    return lines
