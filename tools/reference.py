"""Pages of ``docs/reference`` that are made from the code: configuration, commands and metrics.

``python -m tools.reference`` writes them; with ``--check`` it compares them with the code.
"""

import argparse
import sys
from collections.abc import Iterable, Iterator, Sequence
from inspect import signature
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from actors.metrics import StatusCollector
from deploy.cli import make_parser
from learner.config.schema import Key, Section, sections
from learner.phases import Phases
from learner.run.metrics import StateCollector, StepMetrics
from learner.weights.push_metrics import PushMetrics

FOLDER = Path(__file__).parents[1] / "docs" / "reference"
COMMAND = "python -m tools.reference"


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the pages or compare them; returns the exit code."""
    parser = argparse.ArgumentParser(prog=COMMAND, description="Make pages of docs/reference.")
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if one differs")
    check = parser.parse_args(arguments).check
    different = []
    for name, text in pages().items():
        page = FOLDER / name
        if page.exists() and page.read_text() == text:
            continue
        different.append(name)
        if not check:
            FOLDER.mkdir(parents=True, exist_ok=True)
            page.write_text(text)
    if not check or not different:
        return 0
    print(
        f"{', '.join(different)} in docs/reference: not what the code says; run {COMMAND}",
        file=sys.stderr,
    )
    return 1


def pages() -> dict[str, str]:
    """Make every page; returns its text by file name."""
    made = {"configuration": _configuration(), "commands": _commands(), "metrics": _metrics()}
    return {
        f"{name}.md": "\n".join(
            (f"# {name.capitalize()}", "", f"Made from the code by `{COMMAND}`.", "", *lines)
        )
        for name, lines in made.items()
    }


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    yield "| " + " | ".join(columns) + " |"
    yield "|" + "---|" * len(columns)
    for row in rows:
        yield "| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |"
    yield ""


# ---- Configuration -----------------------------------------------------------------------------


def _configuration() -> Iterator[str]:
    yield "A configuration is a TOML file of these sections. Every key may also be given behind the"
    yield "file's name, as in `optimizer.lr=1e-6`; for a reward it is `rewards.NAME.weight=0.5`."
    yield "`gdpo check --explain KEY` prints what stands here. `none` and None mean that the key is"
    yield "left out: TOML has no word for it."
    yield ""
    for section in sections():
        yield f"## `{section.header}`" if section.header else "## Before the first section"
        yield ""
        yield section.meaning
        yield ""
        if section.keys:
            yield from _table(("key", "type and range", "default", "meaning"), _rows(section))


def _rows(section: Section) -> Iterator[tuple[str, str, str, str]]:
    for key in section.keys:
        has_value = key.default not in ("none", "required", "the file's name")
        default = f"`{key.default}`" if has_value else key.default
        yield f"`{key.name}`", _type(key), default, key.meaning


def _type(key: Key) -> str:
    if key.range.startswith("matches "):
        return f"{key.type}, matches `{key.range.removeprefix('matches ')}`"
    return f"{key.type}, {key.range}" if key.range else key.type


# ---- Commands ----------------------------------------------------------------------------------


def _commands() -> Iterator[str]:
    parser = make_parser()
    [commands] = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    summaries = {action.dest: action.help or "" for action in commands._choices_actions}
    yield "`gdpo --help` lists these commands, `gdpo COMMAND --help` the options of one."
    yield ""
    for name, command in commands.choices.items():
        actions = [
            action
            for action in command._actions
            if action.help is not argparse.SUPPRESS and action.dest != "help"
        ]
        yield from (f"## gdpo {name}", "", f"{_sentence(summaries[name])}", "")
        yield from ("```sh", " ".join([f"gdpo {name}", *_usage(actions)]), "```", "")
        rows = ((f"`{_invocation(action)}`", _help(action)) for action in actions)
        yield from _table(("argument", "meaning"), rows)


def _usage(actions: list[argparse.Action]) -> Iterator[str]:
    options = [action for action in actions if action.option_strings]
    yield from (_invocation(action) for action in options if action.required)
    if not all(action.required for action in options):
        yield "[OPTION ...]"
    forms = {None: "{}", "?": "[{}]", "*": "[{} ...]"}
    for action in actions:
        if not action.option_strings:
            yield forms[action.nargs].format(_invocation(action))  # type: ignore[index]


def _invocation(action: argparse.Action) -> str:
    value = str(action.metavar or action.dest.upper())
    if not action.option_strings:
        return value
    return action.option_strings[0] + ("" if action.nargs == 0 else f" {value}")


def _help(action: argparse.Action) -> str:
    return (action.help or "") % vars(action)


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


# ---- Metrics -----------------------------------------------------------------------------------


class _Nothing:
    """A run in which nothing has happened: it has every attribute, and every count is 0."""

    def __getattr__(self, name: str) -> "_Nothing":
        return self

    def __call__(self, *_: Any, **__: Any) -> "_Nothing":
        return self

    def __iter__(self) -> Iterator[Any]:
        return iter(())

    def __len__(self) -> int:
        return 0

    def __float__(self) -> float:
        return 0.0


def _metrics() -> Iterator[str]:
    yield "Served at `/metrics` in the format of Prometheus. A counter ends in `_total`; a"
    yield "histogram has `_bucket`, `_sum` and `_count`."
    yield ""
    yield from ("## Learner", "", "On `endpoints.metrics_port` of the learner.", "")
    yield from _metric_table(
        [*_registered(StepMetrics, Phases, PushMetrics), *_collected(StateCollector)]
    )
    yield from ("## Actor", "", "On `--metrics-port` of every actor.", "")
    yield from _metric_table(_collected(StatusCollector))


def _metric_table(metrics: Iterable[tuple[Metric, Sequence[str]]]) -> Iterator[str]:
    rows = (
        (
            f"`{metric.name}{'_total' if metric.type == 'counter' else ''}`",
            metric.type,
            ", ".join(f"`{label}`" for label in labels),
            metric.documentation,
        )
        for metric, labels in sorted(metrics, key=lambda found: found[0].name)
    )
    return _table(("metric", "type", "labels", "meaning"), rows)


def _registered(*kinds: type[object]) -> Iterator[tuple[Metric, Sequence[str]]]:
    """Read the metrics that these classes register and update as things happen."""
    registry, nothing = CollectorRegistry(), _Nothing()
    for kind in kinds:
        kind(
            **{
                name: registry if name == "registry" else nothing
                for name in signature(kind).parameters
            }
        )
    for collector in registry._collector_to_names:
        for metric in collector.collect():
            yield metric, getattr(collector, "_labelnames", ())


def _collected(kind: type[Collector]) -> Iterator[tuple[Metric, Sequence[str]]]:
    """Read the metrics that are made at every scrape."""
    nothing: Any = _Nothing()
    collector = kind(*[nothing] * len(signature(kind).parameters))
    for metric in collector.collect():
        yield metric, getattr(metric, "_labelnames", ())


if __name__ == "__main__":
    sys.exit(main())
