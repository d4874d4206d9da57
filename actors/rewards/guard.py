"""The process that an actor starts for reward functions, and that keeps them in bounds.

    actor ──channel── guard ── worker ── whatever the reward functions start
                        │        │
                        └─ kills ┴────────────┘

The worker runs what users wrote, so nothing in it can be relied on: it may hold the interpreter's
lock, or have changed its session. The guard runs nothing of theirs. When the actor hangs up
(because a call took too long, or because it is dead, however it died) or when the worker ends, the
guard kills the worker and all that came from it, and ends as the worker ended.
"""

import contextlib
import ctypes
import os
import resource
import select
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import Any, NoReturn

from actors.rewards.worker import serve

_CHANNEL = 0
"""The guard's standard input is its end of the channel to the actor."""
_SET_PARENT_DEATH_SIGNAL = 1
_SET_CHILD_SUBREAPER = 36


def main() -> NoReturn:
    """Start the worker and watch over it."""
    # Children that lose their parent become the guard's, so that none is out of its reach.
    _prctl(_SET_CHILD_SUBREAPER, 1)
    guard = os.getpid()
    worker = os.fork()
    if worker == 0:
        _work(guard)
    _watch(worker)


# --- the worker ---------------------------------------------------------------------------------


def _work(guard: int) -> NoReturn:
    os.setsid()
    _prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
    if os.getppid() != guard:
        os._exit(1)
    with contextlib.suppress(OSError):
        # When memory runs out the kernel takes this process, not the actor.
        Path("/proc/self/oom_score_adj").write_text("1000")
    channel = socket.socket(fileno=os.dup(_CHANNEL))
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, _CHANNEL)
    os.close(nothing)
    # The actor may hang up while it is answered; then the guard is about to end this anyway.
    with contextlib.suppress(OSError):
        serve(channel.makefile("rb"), channel.makefile("wb"))
    os._exit(0)


# --- the guard ----------------------------------------------------------------------------------


def _watch(worker: int) -> NoReturn:
    def kill(*_: Any) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(worker, signal.SIGKILL)

    # A process that the actor forked may still hold the channel when the actor is dead.
    signal.signal(signal.SIGTERM, kill)
    _prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGTERM)
    Thread(target=_when_hung_up, args=(kill,), name="hang-up", daemon=True).start()
    pid = status = 0
    while pid != worker:
        pid, status = os.waitpid(-1, 0)
    _kill_what_it_started(worker)
    _end_like(os.waitstatus_to_exitcode(status))


def _when_hung_up(action: Callable[[], None]) -> None:
    poll = select.poll()
    # What the actor sends is for the worker; a hang-up is reported without being asked for.
    poll.register(_CHANNEL, 0)
    poll.poll()
    action()


def _kill_what_it_started(worker: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(worker, signal.SIGKILL)
    while children := _children():
        for child in children:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(child, signal.SIGKILL)
        for _ in children:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(-1, 0)


def _children() -> list[int]:
    """Children of this process, on Linux; elsewhere the worker's process group has to do."""
    found = []
    for path in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found += [int(child) for child in path.read_text().split()]
    return found


def _end_like(code: int) -> NoReturn:
    """End with an exit code, or by the signal -code, so that the actor can say how it ended."""
    if code >= 0:
        os._exit(code)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(OSError):
        signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
    while True:
        signal.pause()


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)
