"""The shell of every thread of the learner: a name, a stop, and a failure that ends the run.

    with worker.adding(): ... ──► take(): which item is next ──► handle(item)
                                                                   │ raises
    close() ──► the thread ends, with or without what waits        ▼
                                                  fail(TrainingError("NAME died: ..."))

Each user keeps its own rule of queueing, which is its ``take``: the newest item only, sessions in
turns, everything at once. Nothing here refers to an item any more while the next one is awaited: a
copy of the model must not stay in memory that long.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Condition, Thread
from typing import Generic, TypeVar

from protocol.errors import AsyncGdpoError, TrainingError, brief

log = logging.getLogger("learner")

ItemT = TypeVar("ItemT")
Fail = Callable[[AsyncGdpoError], None]


def _nothing() -> None:
    pass


class GuardedThread:
    """A daemon thread around a function, the failure of which ends the run."""

    def __init__(self, name: str, run: Callable[[], None]) -> None:
        """``run`` returns when the thread is to end."""
        self._name = name
        self._run = run
        self._thread: Thread | None = None

    def start(self, fail: Fail) -> None:
        """Begin, once.

        ``fail`` is called on the thread with the error that ``run`` raised, if it is a
        `TrainingError`, or else with one that names the thread and the cause.
        """
        self._thread = Thread(target=self._guarded, args=(fail,), name=self._name, daemon=True)
        self._thread.start()

    def join(self, timeout_s: float | None = None) -> None:
        """Wait for its end; returns at once if it never began."""
        if self._thread is not None:
            self._thread.join(timeout_s)

    def _guarded(self, fail: Fail) -> None:
        try:
            self._run()
        except TrainingError as error:
            # The frames that it came through hold what was being handled.
            error.__traceback__ = error.__cause__ = error.__context__ = None
            fail(error)
        except Exception as error:
            log.exception("%s died", self._name)
            fail(TrainingError(f"{self._name} died: {brief(error)}"))


class Worker(Generic[ItemT]):
    """A thread that handles one item after the other."""

    def __init__(
        self,
        name: str,
        take: Callable[[], ItemT | None],
        handle: Callable[[ItemT], None],
        *,
        drains: bool,
        before: Callable[[], None] = _nothing,
        after: Callable[[], None] = _nothing,
    ) -> None:
        """Name the thread and say what it does; it begins with `start`.

        ``take`` removes and returns the next item, or returns None while nothing waits; it is
        called with the lock of `adding` held. Once closed, the worker handles what waits if it
        ``drains``, and otherwise only ends the item at hand. ``before`` and ``after`` run on the
        thread, the latter unless something failed.
        """
        self._take = take
        self._handle = handle
        self._drains = drains
        self._before = before
        self._after = after
        self._changed = Condition()
        self._closing = False
        self._thread = GuardedThread(name, self._run)

    @property
    def closing(self) -> bool:
        """Whether `close` was called."""
        return self._closing

    def start(self, fail: Fail) -> None:
        """Begin to handle items, once, and also those that were added before.

        ``fail`` is as in `GuardedThread.start`.
        """
        self._thread.start(fail)

    @contextmanager
    def adding(self) -> Iterator[None]:
        """Hold the lock to change what waits; the thread looks at it afterwards."""
        with self._changed:
            yield
            self._changed.notify_all()

    def close(self, timeout_s: float | None = None) -> None:
        """End the thread and wait for it, at most ``timeout_s``; twice does no harm."""
        with self.adding():
            self._closing = True
        self._thread.join(timeout_s)

    def _run(self) -> None:
        self._before()
        while self._handle_next():
            pass
        self._after()

    def _handle_next(self) -> bool:
        """Wait for one item and handle it, in a frame of its own: no item outlives it."""
        with self._changed:
            while True:
                if self._closing and not self._drains:
                    return False
                if (item := self._take()) is not None:
                    break
                if self._closing:
                    return False
                self._changed.wait()
        self._handle(item)
        return True
