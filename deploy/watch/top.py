"""``gdpo top``: watch a learner that runs elsewhere, in another terminal or on another machine.

A thread asks for its /status again and again, so that the picture goes on, and says since when
there is no answer, whatever the other side does with a question.
"""

import os
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Event, Thread
from typing import Self, TextIO

from rich.console import Console
from rich.live import Live

from deploy.watch.status import TIMEOUT_S, fetch_status
from deploy.watch.top_picture import Picture
from learner.run_folder import RunFolder
from learner.status import Status, label
from protocol.errors import AsyncGdpoError, ConfigError, PeerLost, brief

FIRST_ANSWER_S = 5.0
REDRAW_S = 1.0

Answer = Status | BaseException


def top(target: str, *, interval_s: float, once: bool) -> int:
    """Show the learner of ``target`` until the user or the end of its run ends it.

    Elsewhere than on a terminal, or with ``once``, it is shown once. Returns the exit code; raises
    `ConfigError` if there is no learner.
    """
    watched = Watched(target)
    console = Console(highlight=False)
    with Questions(watched.fetch, interval_s) as questions:
        first = questions.next(FIRST_ANSWER_S) or PeerLost(f"no answer in {FIRST_ANSWER_S:g} s")
        if isinstance(first, BaseException):
            raise watched.explain(first)
        if once or not sys.stdout.isatty() or console.is_dumb_terminal:
            console.print(Picture(first))
            return 0
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, questions.interrupt)
        console = Console(highlight=False, file=_buffered_stdout())
        view = View(first, interval_s)
        ended = watch(view, questions, watched, console)
    console.print(view.draw())
    if ended:
        console.print(ended, markup=False, soft_wrap=True)
    return 0


def _buffered_stdout() -> TextIO:
    """Open standard output once more: what is written to it comes out whole.

    Without a buffer (PYTHONUNBUFFERED, which many containers set) Python drops the rest of what was
    being written when a signal came.
    """
    return os.fdopen(sys.stdout.fileno(), "w", encoding=sys.stdout.encoding, closefd=False)


def watch(view: "View", questions: "Questions", watched: "Watched", console: Console) -> str:
    """Draw until the run is over, and return what became of it; empty if the user has left."""
    try:
        with Live(console=console, screen=True, auto_refresh=False) as live:
            while True:
                live.update(view.draw(console.height), refresh=True)
                if answer := questions.next(REDRAW_S):
                    view.note(answer)
                if view.error and (ended := watched.how_it_ended(view.status)):
                    return ended
    except KeyboardInterrupt:
        # The only way to leave the view of a run that goes on: nothing was interrupted.
        return ""


class Watched:
    """The learner at an address, or of a run folder, where a resumed one has another address."""

    def __init__(self, target: str) -> None:
        """Take a run folder or an address; raises `ConfigError`."""
        self._address: str | None = None
        self._folder: RunFolder | None = None
        if "://" in target:
            self._address = _address(target)
        elif (path := Path(target)).is_dir():
            self._folder = RunFolder(path)
        else:
            raise ConfigError(
                f"there is no run folder {target}; write runs/NAME or http://HOST:PORT"
            )

    def fetch(self) -> Status:
        """Ask for the status; raises `AsyncGdpoError` if that is not the learner's answer."""
        address = self._address or self._address_in_folder()
        status = fetch_status(address)
        if self._folder is not None and status.run not in _names(path := self._folder.path):
            raise PeerLost(
                f"the learner of {path} is gone; where it was is that of the run {status.run}, "
                f"see gdpo top {address}"
            )
        return status

    def explain(self, error: BaseException) -> BaseException:
        """Return what to tell the user if even the first answer is an error."""
        if not isinstance(error, AsyncGdpoError):
            return error
        if self._folder is not None and (ended := self._end_in_folder()):
            return ConfigError(f"the run in {self._folder.path} is over: {ended}")
        return ConfigError(f"no learner to watch: {brief(error)}")

    def how_it_ended(self, last: Status) -> str:
        """Return why no learner will answer any more; empty if one may.

        ``last`` is what it said last.
        """
        if ended := self._end_in_folder():
            return f"The run is over: {ended}"
        if last.phase.startswith(("saving", "leaving")) or last.step >= last.steps:
            return f"The learner has left, after step {last.step} of {last.steps}."
        return ""

    def _address_in_folder(self) -> str:
        assert self._folder is not None
        return _address(self._folder.read_endpoints().metrics)

    def _end_in_folder(self) -> str:
        """What the summary says; a resumed learner deletes it."""
        if self._folder is None:
            return ""
        try:
            return label(self._folder.read_summary().ended_because)
        except ConfigError:
            return ""


class Questions:
    """Asks at once and then every ``interval_s`` until the context ends."""

    def __init__(self, fetch: Callable[[], Status], interval_s: float) -> None:
        self._fetch = fetch
        self._interval_s = interval_s
        self._answers: SimpleQueue[Answer] = SimpleQueue()
        self._done = Event()

    def __enter__(self) -> Self:
        Thread(target=self._run, name="questions", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()

    def interrupt(self, *_: object) -> None:
        """Take a signal as one of the answers, in its turn: the terminal is left in order."""
        self._answers.put(KeyboardInterrupt())

    def next(self, timeout_s: float) -> Answer | None:
        """Return the next answer, or what was raised instead; None if there is none in time."""
        try:
            return self._answers.get(timeout=timeout_s)
        except Empty:
            return None

    def _run(self) -> None:
        while not self._done.is_set():
            try:
                self._answers.put(self._fetch())
            except Exception as error:
                self._answers.put(error)
            self._done.wait(self._interval_s)


class View:
    """The last status that came, and how long ago that was."""

    def __init__(
        self, status: Status, interval_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.status = status
        self.error = ""
        """Why the last question was in vain."""
        self._clock = clock
        self._heard_at = clock()
        # To connect, and then to wait for the answer.
        self._patience_s = interval_s + 2 * TIMEOUT_S

    def note(self, answer: Answer) -> None:
        """Remember an answer; raises it if it is an error of ours, or the user's wish to leave."""
        if isinstance(answer, Status):
            self.status, self.error = answer, ""
            self._heard_at = self._clock()
        elif isinstance(answer, AsyncGdpoError):
            self.error = brief(answer)
        else:
            raise answer

    def draw(self, height: int | None = None) -> Picture:
        """Return the picture of now, ``height`` lines high."""
        silence_s = self._clock() - self._heard_at
        note = ""
        if self.error or silence_s > self._patience_s:
            note = f"no answer for {silence_s:.0f} s" + (f": {self.error}" if self.error else "")
        return Picture(self.status, note, height)


def _names(folder: Path) -> tuple[str, str]:
    """What a run in ``folder`` may be called, as a status says it."""
    return label(folder.name), label(folder.resolve().name)


def _address(text: str) -> str:
    """``http://HOST:PORT`` of it, or of one of the pages there; raises `ConfigError`."""
    match = re.fullmatch(r"(http://[\w.:\[\]-]+:(\d{1,5}))(/|/metrics|/status)?", text, re.ASCII)
    if match is None or not 0 < int(match[2]) < 1 << 16:
        raise ConfigError(f"{text} is no address of a learner's metrics; write http://HOST:PORT")
    return match[1]
