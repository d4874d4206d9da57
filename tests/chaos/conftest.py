"""Every chaos test gets a system of its own; nothing of it outlives the test."""

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.chaos.system import Chaos


@pytest.fixture
def chaos(tmp_path: Path) -> Iterator[Chaos]:
    chaos = Chaos(tmp_path)
    yield chaos
    chaos.close()


@pytest.fixture
def figures(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Print what was measured, and append it to the file of results as a line of JSON."""
    path = Path(request.config.getoption("--chaos-results"))

    def report(**values: Any) -> None:
        shown = {k: round(v, 3) if isinstance(v, float) else v for k, v in values.items()}
        print(f"\n    {', '.join(f'{key} {value}' for key, value in shown.items())}")
        path.parent.mkdir(parents=True, exist_ok=True)
        line = {"test": request.node.name, "time": time.strftime("%Y-%m-%dT%H:%M:%S"), **shown}
        with path.open("a") as file:
            file.write(json.dumps(line) + "\n")

    return report
