"""Children that end when their parent does, however it ended."""

import os
from collections.abc import Callable
from threading import Thread


def when_parent_dies(action: Callable[[], None]) -> None:
    """Call ``action`` (from another thread) when standard input closes.

    The parent holds the other end of a pipe and never writes: the kernel closes it when the
    parent is gone, also after kill -9.
    """

    def watch() -> None:
        # Not through sys.stdin: its lock, held here, would abort the interpreter at its exit.
        while os.read(0, 4096):
            pass
        action()

    Thread(target=watch, name="lifeline", daemon=True).start()
