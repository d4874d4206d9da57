"""Rates and shares of the last seconds: how fast each side is, and which one holds up the other."""

import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock
from typing import NamedTuple

from learner.coordinator import Coordinator

WINDOW_S = 15.0
WINDOW_STEPS = 3


@dataclass(frozen=True, slots=True)
class _Sample:
    at: float
    tokens_generated: float
    groups_generated: float
    actor_seconds: float
    actor_idle_seconds: float
    tokens_trained: float
    learner_wait_seconds: float
    steps: int


class _Counters(NamedTuple):
    """What one actor has reached."""

    tokens: int
    groups: int
    uptime: float
    idle: float
    stalled: float


@dataclass(frozen=True, slots=True)
class Rates:
    """Over the last `WINDOW_S` seconds or `WINDOW_STEPS` steps, whichever are more."""

    tokens_generated_per_s: float = 0.0
    tokens_trained_per_s: float = 0.0
    actor_idle_share: float = 0.0
    """Of the actors' time: nothing to generate."""
    learner_wait_share: float = 0.0
    """Of the learner's time: waiting for groups."""
    actors_wanted: int | None = None
    """Actors that would keep the learner busy at its measured speed; None while unknown."""

    @property
    def bottleneck(self) -> str:
        """The side that the other one waits for."""
        if max(self.actor_idle_share, self.learner_wait_share) < 0.1:
            return "balanced"
        return "actors" if self.learner_wait_share > self.actor_idle_share else "learner"


class Progress:
    """Totals of the run, sampled into `Rates`."""

    def __init__(
        self,
        coordinator: Coordinator,
        batch_groups: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._coordinator = coordinator
        self._batch_groups = batch_groups
        self._clock = clock
        self._lock = Lock()
        self._samples: deque[_Sample] = deque()
        self._first: dict[str, _Counters] = {}
        self._last: dict[str, _Counters] = {}
        self.tokens_trained = 0
        self.tokens_generated_before = 0
        """For the learners before a resume."""
        self._waited = 0.0
        self._waiting_since: float | None = None
        self.steps = 0
        self.rates = Rates()

    def restart(self) -> None:
        """Forget what was before training: rates are about now."""
        with self._lock:
            self._samples.clear()
        self.sample()

    @property
    def tokens_generated(self) -> int:
        """By all actors ever seen, also for evaluation and for groups that were not used."""
        with self._lock:
            return self.tokens_generated_before + int(self._totals()["tokens"])

    @property
    def stalled_share(self) -> float:
        """Of all actors' time since they were first heard: generation stood still for weights."""
        with self._lock:
            totals = self._totals()
            return _share(totals["stalled"], totals["uptime"])

    @property
    def wait_seconds(self) -> float:
        """The learner's time without a batch, a wait that still goes on included."""
        since = self._waiting_since
        return self._waited + (self._clock() - since if since is not None else 0.0)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """The learner waits for groups."""
        started = self._waiting_since = self._clock()
        try:
            yield
        finally:
            self._waiting_since = None
            self._waited += self._clock() - started

    def sample(self) -> Rates:
        """Update `rates`; call it a few times a second, from any thread."""
        with self._lock:
            self.rates = self._sample()
            return self.rates

    def _sample(self) -> Rates:
        now, totals = self._clock(), self._totals()
        new = _Sample(
            now,
            totals["tokens"],
            totals["groups"],
            totals["uptime"],
            totals["idle"],
            self.tokens_trained,
            self.wait_seconds,
            self.steps,
        )
        self._samples.append(new)
        # At least some steps, however long they take.
        while (
            len(self._samples) > 2
            and self._samples[1].at < now - WINDOW_S
            and self._samples[1].steps <= new.steps - WINDOW_STEPS
        ):
            self._samples.popleft()
        return self._between(self._samples[0], new)

    def _totals(self) -> dict[str, float]:
        """Sums over all actors ever seen, as far as each one had got when it was last heard."""
        for actor in self._coordinator.actors():
            if status := actor.status:
                values = _Counters(
                    status.tokens_generated,
                    status.groups_generated,
                    status.uptime_seconds,
                    status.idle_seconds,
                    status.stall_seconds,
                )
                # Only time from now on counts, so that shares do not jump at a join.
                self._first.setdefault(actor.session, values)
                self._last[actor.session] = values
        return {
            "tokens": sum(c.tokens for c in self._last.values()),
            "groups": sum(c.groups for c in self._last.values()),
            "uptime": sum(c.uptime - self._first[s].uptime for s, c in self._last.items()),
            "idle": sum(c.idle - self._first[s].idle for s, c in self._last.items()),
            "stalled": sum(c.stalled - self._first[s].stalled for s, c in self._last.items()),
        }

    def _between(self, old: _Sample, new: _Sample) -> Rates:
        seconds = new.at - old.at
        if seconds <= 0:
            return Rates()
        waited = new.learner_wait_seconds - old.learner_wait_seconds
        actor_seconds = new.actor_seconds - old.actor_seconds
        return Rates(
            tokens_generated_per_s=(new.tokens_generated - old.tokens_generated) / seconds,
            tokens_trained_per_s=(new.tokens_trained - old.tokens_trained) / seconds,
            actor_idle_share=_share(new.actor_idle_seconds - old.actor_idle_seconds, actor_seconds),
            learner_wait_share=_share(waited, seconds),
            actors_wanted=self._wanted(old, new, busy_seconds=seconds - waited),
        )

    def _wanted(self, old: _Sample, new: _Sample, *, busy_seconds: float) -> int | None:
        """Groups a second that a learner that never waits uses, over those of a busy actor."""
        steps = new.steps - old.steps
        groups = new.groups_generated - old.groups_generated
        actor_busy = (new.actor_seconds - old.actor_seconds) - (
            new.actor_idle_seconds - old.actor_idle_seconds
        )
        if steps < 1 or groups < 1 or actor_busy <= 0 or busy_seconds <= 0:
            return None
        demand = steps * self._batch_groups / busy_seconds
        return math.ceil(demand / (groups / actor_busy))


def _share(part: float, whole: float) -> float:
    return min(max(part / whole, 0.0), 1.0) if whole > 0 else 0.0
