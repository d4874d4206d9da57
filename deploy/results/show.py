"""``gdpo show``: completions of a run to read, with what they scored and what they taught."""

import heapq
import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from learner.completions.files import Completion, read_completions
from learner.run_folder import RunFolder
from protocol.errors import ConfigError

MAX_PROMPT, MAX_COMPLETION = 600, 2000
"""Characters that are shown of a text, unless all of it is asked for."""

Order = Literal["newest", "best", "worst"]


@dataclass(frozen=True, slots=True)
class Wish:
    """Which completions are to be shown, and in which order."""

    order: Order = "newest"
    reward: str | None = None
    """The reward that orders them, where they have a score; None: the advantage."""
    step: int | None = None
    """Those of this step only."""
    truncated: bool = False
    """Those only that were cut off."""
    count: int = 5

    def choose(self, completions: Iterable[Completion]) -> list[Completion]:
        """Return at most ``count`` of them; raises `ConfigError` for a reward they lack."""
        return heapq.nsmallest(self.count, filter(self._takes, completions), self._place())

    def _takes(self, completion: Completion) -> bool:
        if self.reward is not None and self.reward not in completion.scores:
            raise ConfigError(
                f"no reward is called {self.reward!r}; the rewards are "
                f"{', '.join(completion.scores)}"
            )
        return (
            not math.isnan(self._figure(completion))
            and self.step in (None, completion.step)
            and (completion.is_truncated or not self.truncated)
        )

    def _figure(self, completion: Completion) -> float:
        return completion.advantage if self.reward is None else completion.scores[self.reward]

    def _place(self) -> Callable[[Completion], tuple[float, int, int, int]]:
        """Newer ones come first among equals."""
        sign = {"newest": 0.0, "best": -1.0, "worst": 1.0}[self.order]

        def place(completion: Completion) -> tuple[float, int, int, int]:
            step, prompt_index, rollout = completion.key
            return sign * self._figure(completion), -step, prompt_index, rollout

        return place


def show(run: Path, wish: Wish, *, as_json: bool, whole: bool) -> None:
    """Print the completions of a run that are wished for; raises `ConfigError`.

    ``as_json`` prints an object in each line, with all of its text; ``whole`` all of the text for
    people.
    """
    folder = RunFolder(run)
    if not folder.config_file.is_file():
        raise ConfigError(f"{run} is no folder of a run: there is no {folder.config_file}")
    kept = _Kept()
    chosen = wish.choose(kept.counting(read_completions(folder.completions)))
    if as_json:
        for completion in chosen:
            print(_as_json(completion))
        return
    if not chosen:
        raise ConfigError(f"none of them is like that: {run} has {kept}")
    console = Console(highlight=False)
    prompt = None
    for completion in chosen:
        repeats = completion.prompt == prompt
        prompt = completion.prompt
        console.print(_picture(completion, wish.reward, whole=whole, repeats=repeats))
    console.print(Text(f"{len(chosen)} of {kept}", style="dim"))


@dataclass(slots=True)
class _Kept:
    """How many completions went by, and of which steps."""

    number: int = 0
    first: int | None = None
    last: int = 0

    def counting(self, completions: Iterable[Completion]) -> Iterator[Completion]:
        for completion in completions:
            self.number += 1
            self.first = completion.step if self.first is None else min(self.first, completion.step)
            self.last = max(self.last, completion.step)
            yield completion

    def __str__(self) -> str:
        return f"{self.number:,} completions, of steps {self.first} to {self.last}"


def _as_json(completion: Completion) -> str:
    """NaN is no JSON: a reward that does not apply is null."""
    scores = {k: None if math.isnan(v) else v for k, v in completion.scores.items()}
    return json.dumps(asdict(completion) | {"scores": scores})


def _picture(
    completion: Completion, reward: str | None, *, whole: bool, repeats: bool
) -> RenderableType:
    """``repeats``: its prompt is that of the completion above."""
    texts = Table.grid(padding=(0, 2))
    texts.add_column(style="dim", no_wrap=True)
    texts.add_column(overflow="fold")
    if not repeats:
        prompt = _shown(completion.prompt, None if whole else MAX_PROMPT)
        prompt.stylize("dim")
        texts.add_row(Text("prompt"), prompt)
    texts.add_row(
        Text("completion"), _shown(completion.completion, None if whole else MAX_COMPLETION)
    )
    return Group(
        Rule(_title(completion), align="left", characters="─"),
        Padding(_scores(completion, reward), (0, 0, 0, 2)),
        Padding(texts, (0, 0, 1, 2)),
    )


def _title(completion: Completion) -> Text:
    oldest, newest = completion.oldest_version, completion.newest_version
    versions = f"version {newest}" if oldest == newest else f"versions {oldest} to {newest}"
    title = Text(f"step {completion.step}", style="bold")
    title.append(
        f" · prompt {completion.prompt_index}, rollout {completion.rollout} · {versions} · "
        f"{completion.tokens:,} token{'' if completion.tokens == 1 else 's'}",
        style="not bold",
    )
    if completion.is_truncated:
        title.append(" · cut off", style="not bold yellow")
    return title


def _scores(completion: Completion, reward: str | None) -> Text:
    """The figure that orders them is bold."""
    line = Text()
    for name, score in completion.scores.items():
        value = "does not apply" if math.isnan(score) else f"{score:.3f}"
        line.append(f"{_printable(name)} ", style="dim")
        line.append(f"{value}   ", style="bold" if name == reward else "")
    advantage = completion.advantage
    line.append("advantage ", style="dim")
    line.append(f"{advantage:+.3f}", style=_style_of(advantage))
    return line


def _style_of(advantage: float) -> str:
    if advantage == 0:
        return "dim"
    return "green" if advantage > 0 else "red"


def _shown(text: str, limit: int | None) -> Text:
    """A text with its line breaks, cut in its middle where it is long: its end tells most."""
    if not text:
        return Text("nothing", style="dim italic")
    left_out = 0 if limit is None else len(text) - limit
    if left_out <= 0:
        return Text(_printable(text))
    assert limit is not None
    head, tail = text[: limit // 2], text[-(limit - limit // 2) :]
    shown = Text(_printable(head))
    shown.append(f" [... {left_out:,} characters, which --whole shows ...] ", style="yellow")
    return shown.append(_printable(tail))


def _printable(text: str) -> str:
    """A terminal would obey what does not print."""
    return "".join(
        c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text
    )
