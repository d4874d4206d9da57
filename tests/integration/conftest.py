"""Every system that a test starts is gone after it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.processes import System


@pytest.fixture
def system(tmp_path: Path) -> Iterator[System]:
    system = System(tmp_path)
    yield system
    system.close()
