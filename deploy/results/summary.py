"""The end of a run: rewards before and after, the books, and where things are."""

import os
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
    if summary.rewards.before and summary.rewards.after:
        console.print(_rewards(summary.rewards.before, summary.rewards.after))
    console.print(_books(summary.books), soft_wrap=True, markup=False)
    console.print(_figures(summary), soft_wrap=True)
    for name, path in (("checkpoint", summary.checkpoint), ("curves", plot)):
        if path:
            console.print(f"{name}: {os.path.relpath(path)}", soft_wrap=True, markup=False)


def _rewards(before: EvaluationResult, after: EvaluationResult) -> Table:
    table = Table(title=f"mean reward on {after.prompts} held-out prompts")
    for column in ("reward", "before", "after", "change"):
        table.add_column(column, justify="left" if column == "reward" else "right")
    for name, end in after.means.items():
        start = before.means[name]
        change = "" if start is None or end is None else f"{end - start:+.3f}"
        table.add_row(name, _number(start), _number(end), change)
    lengths = (before.completion_tokens_mean, after.completion_tokens_mean)
    table.add_row("tokens", f"{lengths[0]:.1f}", f"{lengths[1]:.1f}", "")
    return table


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
