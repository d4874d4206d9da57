"""What `gdpo top` shows of a learner's status: the run, its actors, and how weights get there."""

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, groupby, islice

from rich import filesize
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from deploy.watch.display import add_row, duration, facts, render_panel
from learner.status import ActorStatus, EpochStatus, PushStatus, Status, WeightsStatus

MIN_ROWS = 2
"""Rows of each table however low the terminal: what is below its edge cannot be seen."""
MAX_PHASES = 6
_FRAME_LINES = 3
"""Lines of a table besides its rows."""


@dataclass(frozen=True, slots=True)
class Picture:
    """All of a status, or as much of its tables as there is room for.

    Actors that stay are those furthest behind. Pushes and epochs come newest first.
    """

    status: Status
    note: str = ""
    """What to say above it."""
    height: int | None = None
    """Lines on the screen; what is below its edge nevertheless is cut off. None: no screen."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        head: list[RenderableType] = [render_panel(self.status, width=None)]
        if self.note:
            head.insert(0, Text(self.note, style="bold red"))
        actors, weights = self.status.actors, self.status.weights
        about = Panel(_weights(weights), title="weights")
        pushes, epochs = weights.last_pushes, weights.epochs
        if self.height is not None:
            used = sum(len(console.render_lines(part, options)) for part in (*head, about))
            rows = self.height - used - 3 * _FRAME_LINES
            few = max(MIN_ROWS, rows // 4)
            pushes, epochs = pushes[-few:], epochs[-few:]
            actors = _furthest_behind(actors, max(MIN_ROWS, rows - len(pushes) - len(epochs)))
        yield from head
        yield Panel(_actors(actors, self.status.step), title=_title(actors, self.status.actors))
        yield about
        if pushes:
            yield Panel(_pushes(pushes), title="last pushes")
        if epochs:
            yield Panel(_epochs(epochs), title="epochs")


def _furthest_behind(actors: Sequence[ActorStatus], number: int) -> list[ActorStatus]:
    """The ``number`` of actors with the oldest versions, in the order of ``actors``."""
    places = sorted(range(len(actors)), key=lambda place: actors[place].version)[:number]
    return [actors[place] for place in sorted(places)]


def _title(shown: Sequence[ActorStatus], actors: Sequence[ActorStatus]) -> str:
    if len(shown) < len(actors):
        return f"actors: the {len(shown)} furthest behind of {len(actors)}"
    return "actors"


def _actors(actors: Sequence[ActorStatus], step: int) -> RenderableType:
    if not actors:
        return Text("none")
    columns = ("actor", "host", "version", "behind", "route", "leases", "groups")
    table = _table((*columns, "idle", "stalled", "silent"), words={"host", "route"})
    for actor in actors:
        has_weights = actor.version >= 0
        _add_line(
            table,
            str(actor.number),
            actor.host,
            str(actor.version) if has_weights else "none",
            _behind(actor, step) if has_weights else "",
            actor.route,
            str(actor.leases),
            str(actor.groups),
            _share(actor.idle_share),
            _share(actor.stalled_share),
            _time(actor.silent_s),
        )
    return table


def _behind(actor: ActorStatus, step: int) -> str:
    versions = str(max(0, step - actor.version))
    return f"{versions}, evaluates" if actor.evaluates else versions


def _weights(weights: WeightsStatus) -> Table:
    table = facts()
    add_row(table, "backend", weights.backend)
    if weights.epochs:
        add_row(table, "epoch", _epoch(weights.epochs[-1]))
    steps = "every step" if weights.push_every == 1 else f"every {weights.push_every} steps"
    size = filesize.decimal(weights.num_bytes)
    add_row(table, "pushes", f"{weights.pushes}, of {size} each, {steps}")
    streamed = "nothing"
    if weights.stream_bytes:
        streamed = (
            f"{filesize.decimal(weights.stream_bytes)} for "
            f"{filesize.decimal(weights.stream_plain_bytes)} of weights, in "
            f"{weights.stream_share:.1%} of the learner's time"
        )
    add_row(table, "streamed", streamed)
    add_row(table, "evicted", _tally(weights.evictions) or "nobody")
    return table


def _epoch(epoch: EpochStatus) -> str:
    if epoch.ended:
        return f"none; the last one, {epoch.epoch}, ended: {epoch.ended}"
    return f"{epoch.epoch}: actors {_numbers(epoch.members)}, since version {epoch.first_version}"


def _pushes(pushes: Sequence[PushStatus]) -> Table:
    # In the order in which they first come up: that of the phases.
    names = dict.fromkeys(chain.from_iterable(push.phases for push in pushes))
    phases = list(islice(names, MAX_PHASES))
    table = _table(
        ("version", "epoch", "routes", "took", *phases, "evicted", "behind"),
        words={"routes", "evicted", "behind"},
    )
    for push in reversed(pushes):
        _add_line(
            table,
            str(push.version),
            str(push.epoch),
            _tally(push.routes),
            _time(push.seconds),
            *(_time(push.phases[name]) if name in push.phases else "" for name in phases),
            ", ".join(f"{actor} {cause}" for actor, cause in push.evicted.items()),
            _numbers(push.behind),
        )
    return table


def _epochs(epochs: Sequence[EpochStatus]) -> Table:
    columns = ("epoch", "backend", "members", "since version", "pushes", "formed in", "ended")
    table = _table(columns, words={"backend", "members", "ended"})
    for epoch in reversed(epochs):
        _add_line(
            table,
            str(epoch.epoch),
            epoch.backend,
            _numbers(epoch.members),
            str(epoch.first_version),
            str(epoch.pushes),
            _time(epoch.form_seconds),
            epoch.ended,
        )
    return table


def _table(columns: Iterable[str], words: Container[str]) -> Table:
    """An empty table of numbers and ``words``; where it is too narrow, words are cut first."""
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for name in columns:
        is_word = name in words
        table.add_column(
            Text(name, no_wrap=True, overflow="ellipsis"),
            justify="left" if is_word else "right",
            no_wrap=not is_word,
            overflow="ellipsis",
        )
    return table


def _add_line(table: Table, *cells: str) -> None:
    table.add_row(*(Text(cell, no_wrap=True, overflow="ellipsis") for cell in cells))


def _numbers(numbers: Iterable[int]) -> str:
    """``1-3, 7`` for 1, 2, 3, 7."""
    ordered = enumerate(sorted(set(numbers)))
    runs = [[n for _, n in run] for _, run in groupby(ordered, key=lambda pair: pair[1] - pair[0])]
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)


def _tally(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items() if count)


def _share(share: float | None) -> str:
    return "" if share is None else f"{share:.0%}"


def _time(seconds: float) -> str:
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    return f"{seconds:.1f} s" if seconds < 100 else duration(seconds)
