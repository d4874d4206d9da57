"""Actors that are there at once: forked from a process that has imported everything they need.

To import torch takes seconds of a processor; a test in which actors come and go all the time would
consist of little else, and of less the slower the machine is. Forked, they are processes like any.

    {"log": FILE, "arguments": [...]} ──► nursery ──► {"pid": N}, at its end {"pid": N, "code": M}
"""

import importlib
import json
import os
import select
import signal
import subprocess
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from protocol.process import leave
from tests.chaos.entry import run
from tests.integration.processes import Process

MODULES = ("actors.actor", "deploy.launch.actor_process", "tests.chaos.toy")


class Nursery:
    """Starts processes with arguments for `tests.chaos.entry`."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self._folder = folder
        self._log = folder / "nursery.log"
        self._codes: dict[int, int] = {}
        with self._log.open("wb") as output:
            self._popen = subprocess.Popen(
                [sys.executable, "-m", "tests.chaos.nursery"],
                cwd=folder,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                # What is read ahead of a line would not be seen by select.
                bufsize=0,
                start_new_session=True,
            )

    def start(self, name: str, arguments: Sequence[str]) -> Process:
        log = self._folder / f"{name}.log"
        assert self._popen.stdin is not None
        self._popen.stdin.write(_line(log=str(log), arguments=arguments))
        # Of others that end meanwhile come codes.
        while "code" in (answer := self._answer()):
            pass
        return Forked(self, answer["pid"], log)

    def code(self, pid: int, timeout_s: float | None = 0.0) -> int | None:
        """Exit code of a process, as of `subprocess.Popen`; None if it runs on until then."""
        answers = self._popen.stdout
        assert answers is not None
        while pid not in self._codes and select.select([answers], [], [], timeout_s)[0]:
            self._answer()
        return self._codes.get(pid)

    def close(self) -> None:
        # Its end, and that of its pipes.
        with self._popen:
            self._popen.kill()

    def _answer(self) -> dict[str, int]:
        assert self._popen.stdout is not None
        line = self._popen.stdout.readline()
        assert line, self._log.read_text()
        answer: dict[str, int] = json.loads(line)
        if "code" in answer:
            self._codes[answer["pid"]] = answer["code"]
        return answer


class Forked(Process):
    """One of its children."""

    def __init__(self, nursery: Nursery, pid: int, log: Path) -> None:
        self.log = log
        self.popen: Any = _Handle(nursery, pid)


class _Handle:
    """What tests use of `subprocess.Popen`."""

    def __init__(self, nursery: Nursery, pid: int) -> None:
        self._nursery = nursery
        self.pid = pid

    @property
    def returncode(self) -> int | None:
        return self.poll()

    def poll(self) -> int | None:
        return self._nursery.code(self.pid)

    def wait(self, timeout: float | None = None) -> int:
        code = self._nursery.code(self.pid, timeout)
        assert code is not None, f"{self.pid} runs on after {timeout} s"
        return code

    def send_signal(self, signum: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, signum)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def serve() -> None:
    """Fork on request until the standard input is closed."""
    for module in MODULES:
        importlib.import_module(module)
    ended, wake_up = os.pipe()
    os.set_blocking(wake_up, False)
    signal.set_wakeup_fd(wake_up)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    while True:
        ready, _, _ = select.select([0, ended], [], [])
        if ended in ready:
            os.read(ended, 4096)
            _report_the_dead()
        if 0 in ready:
            line = sys.stdin.buffer.readline()
            if not line:
                return
            request = json.loads(line)
            pid = os.fork()
            if pid == 0:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                _be(request["log"], request["arguments"])
            _say(pid=pid)


def _be(log: str, arguments: list[str]) -> NoReturn:
    """In the child."""
    os.setsid()
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for target, source in ((0, os.open(os.devnull, os.O_RDONLY)), (1, output), (2, output)):
        os.dup2(source, target)
    try:
        code = run(arguments)
    except Exception:
        traceback.print_exc()
        code = 1
    leave(code)


def _report_the_dead() -> None:
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        _say(pid=pid, code=os.waitstatus_to_exitcode(status))


def _say(**fields: int) -> None:
    sys.stdout.buffer.write(_line(**fields))
    sys.stdout.buffer.flush()


def _line(**fields: Any) -> bytes:
    return json.dumps(fields).encode() + b"\n"


if __name__ == "__main__":
    serve()
