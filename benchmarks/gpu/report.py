"""What a part says: rows of figures, or why there are none."""

import json
from typing import Any, Protocol


class Skip(Exception):
    """A part, or what is left of it, cannot run here; the text says what is missing."""


class Report(Protocol):
    """Prints one row."""

    def __call__(self, row: str, /, **figures: Any) -> None: ...


def print_row(row: str, /, **figures: Any) -> None:
    """Print a row for `benchmarks.gpu.__main__` to read."""
    print(json.dumps({"row": row, "figures": figures}), flush=True)
