"""The end of a run: rewards before and after, the books, and where things are."""

import os
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.table import Table

from learner.records import Books, EvaluationResult, Summary


def print_summary(summary: Summary, plot: Path | None) -> None:
    """Print a summary for people; ``plot`` is the path of the curves, None without any."""
    console = Console(highlight=False)
    if not summary.completed:
        console.print(
            f"The run ended early after {summary.steps} steps: {summary.ended_because}",
            soft_wrap=True,
            markup=False,
        )
    for name in summary.evaluations[-1].sets if summary.evaluations else ():
        console.print(_evaluated(name, summary))
    console.print(_books(summary.books), soft_wrap=True, markup=False)
    console.print(_figures(summary), soft_wrap=True)
    for name, path in (("checkpoint", summary.checkpoint), ("curves", plot)):
        if path:
            console.print(f"{name}: {os.path.relpath(path)}", soft_wrap=True, markup=False)


def _evaluated(name: str, summary: Summary) -> Table:
    """What became of the figures of one set of prompts: first, best where there are more, last."""
    evaluations = [e for e in summary.evaluations if name in e.sets]
    first, last = evaluations[0], evaluations[-1]
    found = last.sets[name]
    sampled = "greedy" if found.temperature == 0 else "sampled"
    table = Table(title=f"{name}: {found.prompts} prompts x {found.num_rollouts} {sampled}")
    table.add_column("reward")
    heads = (_when(first, summary), "best (version)", _when(last, summary), "change")
    for head in _that_many(len(evaluations), heads):
        table.add_column(head, justify="right")
    for what, end in found.figures.items():
        figures = {e.version: e.sets[name].figures.get(what) for e in evaluations}
        start = figures[first.version]
        change = "" if start is None or end is None else f"{end - start:+.3f}"
        cells = (_number(start), _best(figures), _number(end), change)
        table.add_row(what, *_that_many(len(evaluations), cells))
    lengths = [f"{e.sets[name].completion_tokens_mean:.1f}" for e in (first, last)]
    table.add_row("tokens", *_that_many(len(evaluations), (lengths[0], "", lengths[1], "")))
    return table


def _that_many(evaluations: int, cells: tuple[str, ...]) -> tuple[str, ...]:
    """Leave out of first, best, last and change what so few evaluations say nothing about."""
    if evaluations == 1:
        return cells[:1]
    return cells if evaluations > 2 else (cells[0], *cells[2:])


def _when(evaluation: EvaluationResult, summary: Summary) -> str:
    if evaluation is summary.before:
        return "before"
    return "after" if evaluation is summary.after else f"version {evaluation.version}"


def _best(figures: Mapping[int, float | None]) -> str:
    known = {version: value for version, value in figures.items() if value is not None}
    if not known:
        return "-"
    version = max(known, key=lambda version: known[version])
    return f"{known[version]:.3f} ({version})"


def _books(books: Books) -> str:
    lines = []
    for purpose, leases in books.leases.items():
        lines.append(
            f"leases ({purpose}): {leases.leased} leased = {leases.received} received + "
            f"{_by_cause(leases.failed, 'failed')} + {leases.outstanding} outstanding"
            f"{_verdict(leases.balanced)}"
        )
    groups = books.groups
    lines.append(
        f"groups: {groups.accepted} accepted = {groups.trained} trained + "
        f"{_by_cause(groups.evicted, 'evicted')} + {groups.buffered} buffered"
        f"{_verdict(groups.balanced)}"
    )
    return "\n".join(lines)


def _figures(summary: Summary) -> str:
    throughput, staleness = summary.throughput, summary.staleness
    text = (
        f"{summary.steps} steps in {summary.seconds_training:.0f} s, "
        f"{throughput.tokens_trained_per_s:,.0f} tokens trained a second; "
        f"largest staleness {staleness.largest} (limit {staleness.limit})"
    )
    if summary.lag0_logprob_difference is not None:
        text += (
            "\nlargest difference of actors' and learner's log-probabilities at lag 0: "
            f"{summary.lag0_logprob_difference:.1e}"
        )
    if failures := summary.rewards.failures:
        by_name = ", ".join(f"{name} {count}" for name, count in failures.items())
        text += f"\ngroups that a reward function failed on: {by_name}"
    return text


def _by_cause(counts: dict[str, int], what: str) -> str:
    total = sum(counts.values())
    if not total:
        return f"0 {what}"
    return f"{total} {what} ({', '.join(f'{n} {cause}' for cause, n in counts.items())})"


def _verdict(balanced: bool) -> str:
    return "  [balanced]" if balanced else "  [NOT BALANCED]"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
