"""The end of a process of the system."""

import atexit
import contextlib
import os
import sys
from typing import NoReturn


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
