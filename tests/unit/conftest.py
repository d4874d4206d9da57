"""A unit test starts no process: those that do lie in tests/process, and this says so."""

import multiprocessing.process
import os
import subprocess
from collections.abc import Iterator
from typing import Any, NoReturn

import pytest


def refuse(*_: Any, **__: Any) -> NoReturn:
    """Fail the test; no subclass of Exception, so that no handler of the product swallows it."""
    pytest.fail("a test in tests/unit starts or kills a process: move it to tests/process")


@pytest.fixture(scope="package", autouse=True)
def no_processes() -> Iterator[None]:
    """For all of tests/unit, fixtures of modules and of the session included."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subprocess.Popen, "__init__", refuse)
        patch.setattr(multiprocessing.process.BaseProcess, "start", refuse)
        for name in ("fork", "forkpty", "posix_spawn", "posix_spawnp", "system", "kill", "killpg"):
            patch.setattr(os, name, refuse)
        yield
