"""Signs of life between the ranks of a learner, and whose fault a broken call was.

    every rank, once a second       its pulse ──► the store that torchrun's ranks met in
    the leader, of all others       no new pulse for ``timeout_s`` ──► the rank is lost
    the others, of the leader

A call to all (a gradient to be added up, a weight to be gathered) breaks off or gets stuck where
one of them dies or hangs, and says nothing of which. So whoever gets such an error looks here: a
rank that failed by itself has left its cause, one that was killed or stopped has no pulse any more.
"""

import logging
import os
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from threading import Condition, main_thread

from torch.distributed import Store

from learner.threads import GuardedThread
from protocol.errors import AsyncGdpoError, TrainingError, brief, one_line
from protocol.process import leave

log = logging.getLogger("learner")

BEAT_S = 1.0
_SOON_S = 3.5
"""After a call has broken off, this silence is enough: living ranks beat meanwhile."""
_GRACE_S = 10.0
"""Beyond the deadline of a call that is stuck, for it to break off."""


class Pulse:
    """Beats for this rank on a thread, and watches others."""

    def __init__(self, store: Store, rank: int, size: int, timeout_s: float) -> None:
        """``timeout_s`` is how long another rank may be silent."""
        # A connection of its own: another thread may wait on the other one.
        self._store: Store = store.clone()  # type: ignore[attr-defined]
        self._rank = rank
        self._timeout_s = timeout_s
        self._watched = [other for other in range(size) if (rank == 0) != (other == 0)]
        self._names: dict[int, str] = {}
        self._heard: dict[int, tuple[str, float]] = {}
        """What each one's pulse was, and since when."""
        self._lost: TrainingError | None = None
        self._changed = Condition()
        self._closing = False
        self._noticed = False
        """Whether the thread that trains knows that a rank is lost."""
        self._on_lost: Callable[[AsyncGdpoError], None] = lambda _: None
        self._thread = GuardedThread("pulse", self._run)

    def start(self, meet: timedelta) -> None:
        """Meet the others and begin; raises `TrainingError` if one does not come in time."""
        self._store.set(f"who/{self._rank}", f"{os.getpid()} {socket.gethostname()}")
        self._beat(0)
        for other in self._watched:
            try:
                self._store.wait([f"pulse/{other}"], meet)
            except RuntimeError as error:
                raise TrainingError(
                    f"rank {other} of the learner did not come within {meet.total_seconds():g} s"
                ) from error
            pid, _, host = self._store.get(f"who/{other}").decode().partition(" ")
            self._names[other] = f"rank {other} of the learner (process {pid} on {host})"
        self._thread.start(self._lose)

    def when_lost(self, call: Callable[[AsyncGdpoError], None]) -> None:
        """Have ``call`` called, on the thread, once another rank is lost."""
        self._on_lost = call

    def close(self) -> None:
        """Watch and beat no more."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(BEAT_S)

    def leave_cause(self, error: BaseException) -> None:
        """Tell the others why this rank ends."""
        try:
            self._store.set(f"cause/{self._rank}", brief(error))
        except RuntimeError:
            log.info("the other ranks are gone already")

    def check(self) -> None:
        """Raise `TrainingError` if another rank is lost."""
        if self._lost is not None:
            self._noticed = True
            raise self._lost

    def explain(self, error: Exception) -> Exception:
        """Return what was wrong with another rank, or the error itself."""
        self._noticed = True
        deadline = time.monotonic() + _SOON_S + 2 * BEAT_S
        with self._changed:
            while self._lost is None and time.monotonic() < deadline and not self._closing:
                self._changed.wait(BEAT_S / 2)
                # If the store is gone, the thread says so.
                with suppress(RuntimeError):
                    self._look(_SOON_S)
        if self._lost is None and "timed out" in str(error).lower():
            return TrainingError(
                f"{self._who_hangs()}: no call of all ranks came about within "
                f"deadlines.ranks_timeout_s = {self._timeout_s:g}, though all give signs of life"
            )
        return self._lost or error

    def _who_hangs(self) -> str:
        """Name those that compute, or do anything else, while all others wait for them."""
        found = []
        for other in self._watched:
            with suppress(RuntimeError):
                if place := self._store.get(f"place/{other}").decode(errors="replace"):
                    found.append(f"{self._names[other]} hangs in {one_line(place)}")
        return "; ".join(found) or "a rank of the learner hangs"

    # --- the thread -----------------------------------------------------------------------------

    def _run(self) -> None:
        with self._changed:
            try:
                self._watch()
            except RuntimeError as error:
                self._lose(TrainingError(f"torchrun, where ranks meet, is gone: {brief(error)}"))
            self._changed.wait_for(lambda: self._closing, self._timeout_s + _GRACE_S)
        if self._lost is not None and not self._noticed:
            # A call that cannot be interrupted, and does not keep its deadline.
            print(f"error: {self._lost}", file=sys.stderr)
            leave(1)

    def _watch(self) -> None:
        number = 0
        while not self._closing and self._lost is None:
            number += 1
            self._beat(number)
            self._listen()
            self._look(self._timeout_s)
            self._changed.notify_all()
            self._changed.wait(BEAT_S)

    def _beat(self, number: int) -> None:
        self._store.set(f"place/{self._rank}", "" if self._noticed else _place())
        self._store.set(f"pulse/{self._rank}", str(number))

    def _listen(self) -> None:
        now = time.monotonic()
        for other in self._watched:
            pulse = self._store.get(f"pulse/{other}").decode()
            if pulse != self._heard.get(other, ("", now))[0]:
                self._heard[other] = pulse, now

    def _look(self, limit_s: float) -> None:
        """Find one that has failed, or been silent for longer."""
        now = time.monotonic()
        for other in self._watched:
            if self._store.check([f"cause/{other}"]):
                cause = one_line(self._store.get(f"cause/{other}").decode(errors="replace"))
                self._lose(TrainingError(f"{self._names[other]} failed: {cause}"))
            elif (silent_s := now - self._heard.get(other, ("", now))[1]) > limit_s:
                how = "has died" if self._has_died(other) else "does not answer"
                self._lose(
                    TrainingError(f"{self._names[other]} {how}: no sign of it for {silent_s:.0f} s")
                )

    def _has_died(self, other: int) -> bool:
        pid, _, host = self._store.get(f"who/{other}").decode().partition(" ")
        return host == socket.gethostname() and not Path(f"/proc/{pid}").exists()

    def _lose(self, error: AsyncGdpoError) -> None:
        """End what waits for the others, once."""
        if self._lost is not None:
            return
        self._lost = TrainingError(str(error))
        log.error("%s", error)
        self._on_lost(self._lost)


def _place() -> str:
    """Where the thread that trains is in this program; empty while it waits for other ranks."""
    frame = sys._current_frames().get(main_thread().ident or 0)
    place = ""
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module.startswith("torch.distributed"):
            return ""
        if not place and module.startswith("learner."):
            place = f"{module}:{frame.f_lineno}"
        frame = frame.f_back
    return place
