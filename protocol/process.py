"""The place of a process among others, and its end."""

import atexit
import contextlib
import os
import sys
from typing import NoReturn


def torchrun_rank() -> tuple[int, int]:
    """Which of the processes that torchrun started this one is, and how many there are; 0 of 1."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    return (int(os.environ["RANK"]), size) if size > 1 else (0, 1)


def leave(code: int) -> NoReturn:
    """End this process now, with everything written that it has printed.

    A collective cannot be interrupted, so a thread may still be in one. On the usual way out the
    interpreter is gone when that thread returns from C++, which then aborts the whole process
    ("terminate called without an active exception") and spoils its exit code.
    """
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        # Whoever read it may be gone.
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)
