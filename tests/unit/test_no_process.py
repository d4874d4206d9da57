"""No unit test gets a process started, whatever it asks."""

import asyncio
import multiprocessing
import os
import subprocess
from collections.abc import Callable

import pytest


@pytest.mark.parametrize(
    "start",
    [
        lambda: subprocess.run(["true"], check=True),
        lambda: asyncio.run(asyncio.create_subprocess_exec("true")),
        lambda: multiprocessing.get_context("spawn").Process(target=print).start(),
        lambda: os.fork(),
        lambda: os.kill(os.getpid(), 0),
    ],
)
def test_a_unit_test_that_starts_or_kills_a_process_fails(start: Callable[[], object]) -> None:
    with pytest.raises(pytest.fail.Exception, match="move it to tests/process"):
        start()
