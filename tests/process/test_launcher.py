"""How the launcher ends its children."""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from deploy.launch import local as module
from deploy.launch.local import Launcher
from learner.run_folder import RunFolder
from tests.unit.factories import make_config

STUBBORN = (
    "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); input()"
)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[str, str], module._Child]]:
    with ExitStack() as processes:

        def start(name: str, code: str) -> module._Child:
            command = [sys.executable, "-c", code]
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            # Its end, and that of its pipes.
            processes.enter_context(process)
            return module._Child(name, process, tmp_path / f"{name}.log", 0)

        yield start


@pytest.mark.parametrize(
    ("seconds_since_the_request", "expected_s"),
    [(0.0, 2.0), (1.5, 0.5), (60.0, 0.5), (None, 2.0)],
)
def test_an_actor_that_does_not_end_is_killed_in_time(
    tmp_path, monkeypatch, start, seconds_since_the_request, expected_s
):
    """The time runs from the request to stop, of which the learner may have used most."""
    monkeypatch.setattr(module, "STOP_TIMEOUT_S", 2.0)
    monkeypatch.setattr(module, "GRACE_S", 0.5)
    launcher = Launcher(make_config(), RunFolder(tmp_path), tmp_path, ())
    launcher._learner = start("learner", "")
    launcher._learner.process.wait()
    hung = start("actor-0", STUBBORN)
    assert hung.process.stdout is not None
    hung.process.stdout.readline()
    launcher._actors["actor-0"] = hung
    started = time.monotonic()
    if seconds_since_the_request is not None:
        launcher._stop_requested_at = started - seconds_since_the_request
    launcher._stop_children()
    assert time.monotonic() - started == pytest.approx(expected_s, abs=0.4)
    assert hung.process.returncode == -9
