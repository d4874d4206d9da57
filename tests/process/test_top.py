"""`gdpo top` on a terminal, where it is a process of its own."""

import codecs
import fcntl
import json
import os
import pty
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.unit.status_examples import WATCHED, StatusServer, status_servers

ROOT = Path(__file__).parents[2]


class Terminal:
    """A `gdpo` command on a terminal of 60 lines and 100 columns."""

    def __init__(self, *arguments: str) -> None:
        self._leader, follower = pty.openpty()
        fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 60, 100, 0, 0))
        # A container often sets the last one: then Python itself does not buffer what is printed.
        environment = {**os.environ, "TERM": "xterm", "PYTHONPATH": str(ROOT)}
        environment["PYTHONUNBUFFERED"] = "1"
        for name in ("COLUMNS", "LINES"):
            environment.pop(name, None)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "deploy", *arguments],
            stdin=follower,
            stdout=follower,
            stderr=follower,
            env=environment,
            start_new_session=True,
        )
        os.close(follower)
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self.text = ""

    def read_until(self, expected: str) -> None:
        deadline = time.monotonic() + 20
        while expected not in self.text:
            assert time.monotonic() < deadline, f"no {expected!r} in {self.text}"
            self.text += self._decoder.decode(os.read(self._leader, 65536))

    def end(self) -> int:
        """Its exit code, with the rest of what it prints."""
        try:
            while part := os.read(self._leader, 65536):
                self.text += self._decoder.decode(part)
        except OSError:
            # Nobody has the other end open any more.
            pass
        os.close(self._leader)
        return self.process.wait(20)


@pytest.fixture
def start() -> Iterator[Callable[..., StatusServer]]:
    with status_servers() as start:
        yield start


@pytest.fixture
def open_terminal() -> Iterator[Callable[..., Terminal]]:
    terminals: list[Terminal] = []

    def open_terminal(*arguments: str) -> Terminal:
        terminals.append(Terminal(*arguments))
        return terminals[-1]

    yield open_terminal
    for terminal in terminals:
        terminal.process.kill()
        terminal.process.wait()


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_terminal_shows_it_live_and_is_left_as_it_was(start, open_terminal, signum):
    learner = start()
    terminal = open_terminal("top", learner.address, "--interval", "0.05")
    terminal.read_until("40 of 100")
    learner.body = json.dumps(WATCHED | {"step": 41}).encode()
    terminal.read_until("41 of 100")
    terminal.process.send_signal(signum)
    assert terminal.end() == 0
    assert "Traceback" not in terminal.text
    # The screen that was there before is back, and so is the cursor.
    assert "\x1b[?1049h" in terminal.text
    assert "\x1b[?25h" in terminal.text
    _, left, after = terminal.text.rpartition("\x1b[?1049l")
    assert left
    assert "41 of 100" in after


def test_a_terminal_is_told_that_the_learner_has_left(start, open_terminal):
    learner = start(WATCHED | {"phase": "leaving"})
    terminal = open_terminal("top", learner.address, "--interval", "0.05")
    terminal.read_until("leaving")
    learner.close()
    assert terminal.end() == 0
    assert terminal.text.rstrip().endswith("The learner has left, after step 40 of 100.")
