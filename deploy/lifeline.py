"""Children that end when their parent does, however it ended."""

import sys
from collections.abc import Callable
from threading import Thread


def when_parent_dies(action: Callable[[], None]) -> None:
    """Call ``action`` (from another thread) when standard input closes.

    The parent holds the other end of a pipe and never writes: the kernel closes it when the
    parent is gone, also after kill -9.
    """

    def watch() -> None:
        while sys.stdin.buffer.read(4096):
            pass
        action()

    Thread(target=watch, name="lifeline", daemon=True).start()
