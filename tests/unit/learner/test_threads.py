"""The shell of the learner's threads: what waits, what ends it, and what it holds on to."""

import time
import weakref
from collections import deque
from threading import Event
from typing import Any

import pytest

from learner.threads import GuardedThread, Worker
from protocol.errors import AsyncGdpoError, ConfigError, TrainingError

TIMEOUT_S = 20


class Line:
    """Items in the order in which they came."""

    def __init__(self, *, drains: bool = True, **hooks) -> None:
        self.waiting: deque[Any] = deque()
        self.handled: list[Any] = []
        self.failures: list[AsyncGdpoError] = []
        self.ended = Event()
        self.worker: Worker[Any] = Worker("line", self._take, self.handle, drains=drains, **hooks)

    def _take(self):
        return self.waiting.popleft() if self.waiting else None

    def handle(self, item) -> None:
        item(self)

    def fail(self, error: AsyncGdpoError) -> None:
        self.failures.append(error)
        self.ended.set()

    def start(self) -> "Line":
        self.worker.start(self.fail)
        return self

    def add(self, *items) -> None:
        with self.worker.adding():
            self.waiting.extend(items)


def note(number: int):
    return lambda line: line.handled.append(number)


def test_items_are_handled_in_the_order_that_their_queue_gives():
    line = Line()
    line.add(note(1), note(2))
    line.start()
    line.add(note(3))
    line.worker.close()
    assert (line.handled, line.failures) == ([1, 2, 3], [])


def test_a_worker_that_does_not_drain_ends_after_the_item_at_hand():
    line, begun, go = Line(drains=False).start(), Event(), Event()

    def slow(line: Line) -> None:
        begun.set()
        assert go.wait(TIMEOUT_S)
        line.handled.append(1)

    line.add(slow, note(2))
    assert begun.wait(TIMEOUT_S)
    line.worker.close(timeout_s=0.01)
    go.set()
    line.worker.close()
    assert (line.handled, list(line.waiting) != []) == ([1], True)


@pytest.mark.parametrize(
    ("raised", "told"),
    [
        (ValueError("what a pity"), "line died: what a pity"),
        (KeyError(), "line died: KeyError"),
        (TrainingError("known before"), "known before"),
        (ConfigError("of something else"), "line died: of something else"),
    ],
)
def test_a_handler_that_fails_ends_the_run_with_its_cause(raised, told):
    line = Line().start()

    def broken(line: Line) -> None:
        raise raised

    line.add(broken, note(2))
    assert line.ended.wait(TIMEOUT_S)
    line.worker.close()
    [failure] = line.failures
    assert str(failure) == told
    assert isinstance(failure, TrainingError)
    assert line.handled == []


def test_a_handler_that_fails_while_it_handles_its_error_ends_the_run_too():
    line = Line().start()

    def broken(line: Line) -> None:
        try:
            raise OSError("the disk is full")
        finally:
            raise RuntimeError("and so is the log")

    line.add(broken)
    assert line.ended.wait(TIMEOUT_S)
    assert [str(error) for error in line.failures] == ["line died: and so is the log"]


def test_a_queue_that_fails_ends_the_run():
    line = Line()
    line.worker = Worker("line", lambda: 1 // 0, line.handle, drains=True)
    line.start()
    assert line.ended.wait(TIMEOUT_S)
    assert "division" in str(line.failures[0])


class Handled:
    """An item that can be referred to weakly."""

    def __call__(self, line: Line) -> None:
        line.handled.append(1)


class Refused(Handled):
    def __call__(self, line: Line) -> None:
        try:
            raise OSError("the disk is full")
        except OSError as error:
            raise TrainingError("cannot write") from error


@pytest.mark.parametrize("kind", [Handled, Refused])
def test_no_item_is_held_while_the_next_one_is_awaited_nor_by_its_error(kind):
    """A copy of a model would stay in memory until the next checkpoint."""
    line = Line().start()
    item = kind()
    held = weakref.ref(item)
    line.add(item)
    del item
    deadline = time.monotonic() + TIMEOUT_S
    while held() is not None and time.monotonic() < deadline:
        time.sleep(0.002)
    assert (line.handled == [1]) == (kind is Handled)
    assert len(line.failures) == (kind is not Handled)
    assert held() is None
    line.worker.close()


def test_hooks_run_on_the_thread_before_the_first_item_and_after_the_last():
    seen: list[str] = []
    line = Line(before=lambda: seen.append("before"), after=lambda: seen.append("after"))
    line.add(lambda line: seen.append("item"))
    line.start().worker.close()
    assert seen == ["before", "item", "after"]


def test_closing_what_was_never_started_or_is_closed_does_no_harm():
    line = Line()
    line.worker.close()
    line = Line().start()
    line.worker.close()
    line.worker.close()
    GuardedThread("never", lambda: None).join()
    assert line.worker.closing
