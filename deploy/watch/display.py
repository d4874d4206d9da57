"""The live view of a run: one panel on a terminal, a line every few seconds elsewhere."""

from collections.abc import Callable, Mapping
from threading import Event, Thread
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from learner.status import EvaluatingStatus, Status, StepStatus

REFRESH_S = 0.5
LINE_EVERY_S = 5.0

_BOTTLENECKS = {
    "actors": "the actors (the learner waits for groups: add actors)",
    "learner": "the learner (the actors wait for it)",
    "balanced": "neither side",
}


class Display:
    """Shows what ``source`` returns (None: nothing yet) until the context ends."""

    def __init__(self, source: Callable[[], Status | None], console: Console | None = None) -> None:
        self._source = source
        self._console = console or Console(stderr=True)
        self._done = Event()
        self._thread = Thread(target=self._run, name="display", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _run(self) -> None:
        if self._console.is_terminal:
            self._show_panel()
        else:
            self._print_lines()

    def _show_panel(self) -> None:
        with Live(console=self._console, auto_refresh=False, transient=True) as live:
            while not self._done.wait(REFRESH_S):
                if status := self._source():
                    live.update(render_panel(status), refresh=True)

    def _print_lines(self) -> None:
        last = ""
        while not self._done.wait(LINE_EVERY_S):
            status = self._source()
            line = render_line(status) if status else ""
            if line and line != last:
                self._console.print(line, highlight=False, markup=False, soft_wrap=True)
                last = line


def render_line(status: Status) -> str:
    """Return the status as one plain line."""
    parts = [status.phase, f"step {status.step}/{status.steps}"]
    if status.staleness_mean is not None:
        parts += [f"{name} {value:.3f}" for name, value in status.rewards.items()]
        parts += [
            f"generated {status.tokens_generated_per_s:.0f} tok/s",
            f"trained {status.tokens_trained_per_s:.0f} tok/s",
            f"staleness {status.staleness_mean:.1f} (max {status.staleness_max})",
            f"buffer {status.buffer_groups}",
        ]
    if (last := status.last_step) is not None:
        parts += [f"length {last.mean_length:.0f}", f"cut off {last.clipped_ratio:.0%}"]
        parts.append(f"dead groups {last.frac_reward_zero_std:.0%}")
        if last.entropy is not None:
            parts.append(f"entropy {last.entropy:.2f}")
    if status.evaluation is not None:
        parts += [
            f"{name} at {status.evaluation.version}: {figures(found)}"
            for name, found in status.evaluation.sets.items()
        ]
    if status.evaluating is not None:
        parts.append(f"evaluating {_evaluating(status.evaluating)}")
    if status.groups_refilled:
        parts.append(f"without signal {status.groups_refilled}")
    parts.append(f"actors {status.actors_live}")
    if status.bottleneck:
        parts.append(f"bottleneck {status.bottleneck}")
    if status.seconds_left is not None and status.phase == "training":
        parts.append(f"{duration(status.seconds_left)} left")
    return " | ".join(parts)


def render_panel(status: Status, width: int | None = 76) -> Panel:
    """Return the status as a panel for a terminal; ``width`` None: as wide as that is."""
    table = facts()
    steps = f"{status.step} of {status.steps}"
    if status.seconds_left is not None and status.phase == "training":
        steps += f", {duration(status.seconds_left)} left"
    add_row(table, "phase", status.phase)
    add_row(table, "step", steps)
    table.add_row("", ProgressBar(total=status.steps, completed=status.step, width=40))
    if status.staleness_mean is not None:
        for name, value in status.rewards.items():
            add_row(table, name, f"{value:.3f}")
        add_row(
            table,
            "tokens",
            f"{status.tokens_generated_per_s:,.0f} generated, "
            f"{status.tokens_trained_per_s:,.0f} trained a second",
        )
        add_row(
            table,
            "staleness",
            f"{status.staleness_mean:.1f} on average, {status.staleness_max} at most "
            f"(limit {status.max_staleness})",
        )
    if status.last_step is not None:
        _add_last_step(table, status.last_step)
    if status.evaluation is not None:
        for name, found in status.evaluation.sets.items():
            add_row(table, name, f"version {status.evaluation.version}: {figures(found)}")
    if status.evaluating is not None:
        add_row(table, "evaluating", _evaluating(status.evaluating))
    add_row(
        table,
        "buffer",
        f"{status.buffer_groups} groups, {status.buffer_bytes / 1e6:.1f} MB "
        f"(a batch takes {status.batch_groups})",
    )
    if status.groups_refilled:
        add_row(table, "no signal", f"{status.groups_refilled} groups, others in their place")
    wanted = f", {status.actors_wanted} would do" if status.actors_wanted else ""
    add_row(table, "actors", f"{status.actors_live} live{wanted}")
    if status.bottleneck:
        add_row(
            table,
            "idle",
            f"actors {status.actor_idle_share:.0%}, learner {status.learner_wait_share:.0%}",
        )
        add_row(table, "bottleneck", _BOTTLENECKS[status.bottleneck])
    return Panel(table, title=Text(f"gdpo · {status.run}"), width=width)


def _add_last_step(table: Table, last: StepStatus) -> None:
    add_row(
        table,
        "length",
        f"{last.mean_length:,.1f} tokens on average, {last.min_length:,.0f} to "
        f"{last.max_length:,.0f}; {last.clipped_ratio:.1%} cut off",
    )
    policy = f"learning rate {last.learning_rate:.2g}"
    if last.entropy is not None:
        policy = f"entropy {last.entropy:.3f}, {policy}"
    add_row(table, "policy", policy)
    add_row(table, "dead groups", f"{last.frac_reward_zero_std:.1%}, without any signal")


def _evaluating(evaluating: EvaluatingStatus) -> str:
    done = f"{evaluating.prompts_done} of {evaluating.prompts} prompts"
    return f"version {evaluating.version}: {done}" if evaluating.version >= 0 else done


def figures(found: Mapping[str, float | None]) -> str:
    """Return what an evaluation found on one set, on one line."""
    shown = ("-" if value is None else f"{value:.3f}" for value in found.values())
    return ", ".join(f"{name} {value}" for name, value in zip(found, shown, strict=True))


def facts() -> Table:
    """Return an empty table of names and what is to be said about them."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column()
    return table


def add_row(table: Table, *cells: str) -> None:
    """Add a row of plain text, never of the markup that a name from the network may hold."""
    table.add_row(*map(Text, cells))


def duration(seconds: float) -> str:
    """Return a time in hours, minutes and seconds."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
