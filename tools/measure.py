"""Measure the code: sizes, types, docstrings, parameters, attributes, circles of imports.

`python -m tools.measure` prints a table, a column per package and one for all together, and names
what is large. With `--check` it exits with 1 if anything exceeds the aims of the project.
"""

import argparse
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tools.source import Class, Function, Package, circles, data_names, read_modules

ROOT = Path(__file__).parents[1]
PACKAGES = ["protocol", "gdpo", "transfer", "actors", "learner", "deploy"]

LONG_FUNCTION_LINES = 60
MANY_PARAMETERS, MOST_PARAMETERS = 8, 12
MANY_ATTRIBUTES, MOST_ATTRIBUTES = 12, 15
TABULAR_FUNCTIONS: dict[str, str] = {}
"""Functions that may be longer than the aim, and why: a table or a list that reads from the top."""


@dataclass(frozen=True)
class Measured:
    """A project: its packages, all of them together, and the circles among its modules."""

    packages: list[Package]
    together: Package
    circles: list[list[str]]


def measure(root: Path, packages: Sequence[str]) -> Measured:
    """Measure the packages in the folder ``root``, which must be the first of `sys.path`."""
    modules = {name: read_modules(root, name) for name in packages}
    everything = [module for read in modules.values() for module in read]
    data = data_names(everything)
    return Measured(
        [Package(name, read, data) for name, read in modules.items()],
        Package("together", everything, data),
        circles(root, list(packages)),
    )


def table(measured: Measured) -> str:
    """Draw the figures as a table in Markdown, and name what is large below it."""
    columns = [*measured.packages, measured.together]
    lines = [
        f"| | {' | '.join(column.name for column in columns)} |",
        f"|---|{'---|' * len(columns)}",
    ]
    rows: dict[str, Callable[[Package], str]] = {
        "files / lines": lambda p: f"{len(p.modules)} / {sum(m.lines for m in p.modules)}",
        "file median / p90 / max": lambda p: _spread([m.lines for m in p.modules], 0.5, 0.9),
        "function p50 / p95 / max": lambda p: _spread([f.lines for f in p.functions], 0.5, 0.95),
        f"functions over {LONG_FUNCTION_LINES} lines": lambda p: str(len(long_functions(p))),
        "fully annotated": lambda p: _share([f.annotated for f in p.functions]),
        "public names documented": lambda p: _share(list(p.documented.values())),
        f"functions with more than {MANY_PARAMETERS} / {MOST_PARAMETERS} parameters, most": (
            lambda p: _counts([f.parameters for f in p.functions], MANY_PARAMETERS, MOST_PARAMETERS)
        ),
        f"non-data classes with more than {MANY_ATTRIBUTES} / {MOST_ATTRIBUTES} attributes, most": (
            lambda p: _counts(
                [len(c.attributes) for c in p.behaving_classes], MANY_ATTRIBUTES, MOST_ATTRIBUTES
            )
        ),
        "circles": lambda p: str(len(_circles_in(p, measured))),
    }
    lines += [f"| {name} | {' | '.join(map(cell, columns))} |" for name, cell in rows.items()]
    return "\n".join([*lines, "", *_named(measured)])


def excesses(measured: Measured) -> Iterator[str]:
    """Yield a line for each thing that exceeds the aims; nothing if all are met."""
    for circle in measured.circles:
        yield f"circle of imports: {', '.join(circle)}"
    for function in long_functions(measured.together):
        if function.name not in TABULAR_FUNCTIONS:
            yield f"{function.name} has {function.lines} lines"
    for function in _over_parameters(measured.together, MOST_PARAMETERS):
        yield f"{function.name} has {function.parameters} parameters"
    for found in _over_attributes(measured.together, MOST_ATTRIBUTES):
        yield f"{found.name} has {len(found.attributes)} attributes"
    for name, told in measured.together.documented.items():
        if not told:
            yield f"{name} has no docstring"
    long = {function.name for function in long_functions(measured.together)}
    for name in sorted(TABULAR_FUNCTIONS.keys() - long):
        yield f"{name} is excused in {__name__} and need not be"


def long_functions(package: Package) -> list[Function]:
    """Functions with more lines than the aim, the longest first."""
    found = [f for f in package.functions if f.lines > LONG_FUNCTION_LINES]
    return sorted(found, key=lambda f: -f.lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; with `--check` also what exceeds the aims, and return 1 if anything does."""
    parser = argparse.ArgumentParser(prog="tools.measure", description="Measure the code.")
    parser.add_argument("--check", action="store_true", help="exit with 1 if an aim is missed")
    parser.add_argument("--root", type=Path, default=ROOT, help="another checkout")
    parser.add_argument("--packages", nargs="+", default=PACKAGES, help="what is measured of it")
    options = parser.parse_args(arguments)
    sys.path.insert(0, str(options.root.resolve()))
    measured = measure(options.root, options.packages)
    print(table(measured))
    if not options.check:
        return 0
    found = list(excesses(measured))
    print(*(f"too much: {line}" for line in found), sep="\n")
    return 1 if found else 0


def _named(measured: Measured) -> Iterator[str]:
    """What the table counts, by name, the largest first."""
    whole = measured.together
    yield _list("lines", ((f.name, f.lines) for f in long_functions(whole)))
    found = _over_parameters(whole, MANY_PARAMETERS)
    yield _list("parameters", ((f.name, f.parameters) for f in found))
    classes = _over_attributes(whole, MANY_ATTRIBUTES)
    yield _list("attributes", ((c.name, len(c.attributes)) for c in classes))
    for circle in measured.circles:
        yield f"- circle: {', '.join(circle)}"


def _list(what: str, found: Iterator[tuple[str, int]]) -> str:
    return f"- {what}: {', '.join(f'{name} {count}' for name, count in found) or 'none'}"


def _over_parameters(package: Package, limit: int) -> list[Function]:
    found = [f for f in package.functions if f.parameters > limit]
    return sorted(found, key=lambda f: -f.parameters)


def _over_attributes(package: Package, limit: int) -> list[Class]:
    found = [c for c in package.behaving_classes if len(c.attributes) > limit]
    return sorted(found, key=lambda c: -len(c.attributes))


def _circles_in(package: Package, measured: Measured) -> list[list[str]]:
    names = {module.name for module in package.modules}
    return [circle for circle in measured.circles if names & set(circle)]


def _spread(values: list[int], *shares: float) -> str:
    """Percentiles by the nearest rank, and the maximum."""
    ranked = sorted(values) or [0]
    cuts = [ranked[max(0, math.ceil(share * len(ranked)) - 1)] for share in shares]
    return " / ".join(map(str, [*cuts, ranked[-1]]))


def _counts(values: list[int], *limits: int) -> str:
    above = " / ".join(str(sum(value > limit for value in values)) for limit in limits)
    return f"{above}, {max(values, default=0)}"


def _share(flags: list[bool]) -> str:
    """A percentage; 100 % only if all are true."""
    return f"{math.floor(100 * sum(flags) / len(flags)) if flags else 100} %"


if __name__ == "__main__":
    sys.exit(main())
