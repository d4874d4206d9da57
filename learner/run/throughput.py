"""Rates and shares of the last seconds: how fast each side is, and which one holds up the other."""

import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock
from typing import NamedTuple

from learner.coordinator.coordinator import Coordinator
from learner.status import Bottleneck

WINDOW_S = 15.0
WINDOW_STEPS = 3
_REMEMBERED_ACTORS = 10_000
"""Actors that left long before are summed up: an actor that comes and goes has a new session."""


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
    groups_used: int


class _Counters(NamedTuple):
    """Totals of one actor."""

    tokens: int
    groups: int
    uptime: float
    idle: float
    stalled: float

    def within(self, first: "_Counters", seconds: float) -> "_Counters":
        """Keep what can be true: ``seconds`` after ``first`` no clock shows more than that."""
        uptime, idle, stalled = (
            min(max(value, start), start + seconds)
            for value, start in zip(self[2:], first[2:], strict=True)
        )
        return self._replace(uptime=uptime, idle=idle, stalled=stalled)

    def since(self, first: "_Counters") -> "_Counters":
        """Keep what counts: only time from ``first`` on, so that shares do not jump at a join."""
        times = (last - start for last, start in zip(self[2:], first[2:], strict=True))
        return _Counters(self.tokens, self.groups, *times)


@dataclass(frozen=True, slots=True)
class Rates:
    """Rates over the last `WINDOW_S` seconds or `WINDOW_STEPS` steps, whichever are more."""

    tokens_generated_per_s: float = 0.0
    tokens_trained_per_s: float = 0.0
    actor_idle_share: float = 0.0
    """Share of the actors' time in which they had nothing to generate."""
    learner_wait_share: float = 0.0
    """Share of the learner's time in which it waited for groups."""
    actors_wanted: int | None = None
    """Actors that would keep the learner busy at its measured speed; None while unknown."""

    @property
    def bottleneck(self) -> Bottleneck:
        """The side that the other one waits for."""
        if max(self.actor_idle_share, self.learner_wait_share) < 0.1:
            return "balanced"
        return "actors" if self.learner_wait_share > self.actor_idle_share else "learner"


class Throughput:
    """Totals of the run, sampled into `Rates`."""

    def __init__(
        self,
        coordinator: Coordinator,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._coordinator = coordinator
        self._clock = clock
        self._lock = Lock()
        self._samples: deque[_Sample] = deque()
        self._first: dict[str, tuple[_Counters, float]] = {}
        """What an actor reported first, and when, by its session."""
        self._last: dict[str, _Counters] = {}
        self._forgotten = _Counters(0, 0, 0.0, 0.0, 0.0)
        self.tokens_trained = 0
        self.tokens_generated_before = 0
        """Tokens that were generated for the learners before a resume."""
        self._waited = 0.0
        self._waiting_since: float | None = None
        self.steps = self._groups_used = 0
        self.rates = Rates()

    def note(self, version: int, num_tokens: int, num_groups: int) -> None:
        """Count a training step, and the groups that it cost, those without signal included."""
        self.tokens_trained += num_tokens
        self._groups_used += num_groups
        self.steps = version

    def restart(self) -> None:
        """Forget what was before training: rates are about now."""
        with self._lock:
            self._samples.clear()
        self.sample()

    @property
    def tokens_generated(self) -> int:
        """Tokens by all actors ever seen, also for evaluation and for groups that were not used."""
        with self._lock:
            return self.tokens_generated_before + self._totals().tokens

    @property
    def stalled_share(self) -> float:
        """Share of all actors' time, since they were first heard, that they waited for weights."""
        with self._lock:
            totals = self._totals()
            return _share(totals.stalled, totals.uptime)

    def shares(self, session: str) -> tuple[float, float] | None:
        """Shares of one actor's time since it was first heard: idle, and stalled for weights.

        They are those of the last `sample`; None if it had reported nothing then.
        """
        with self._lock:
            if session not in self._last:
                return None
            counted = self._last[session].since(self._first[session][0])
        return _share(counted.idle, counted.uptime), _share(counted.stalled, counted.uptime)

    @property
    def wait_seconds(self) -> float:
        """The learner's time without a batch, a wait that still goes on included."""
        since = self._waiting_since
        return self._waited + (self._clock() - since if since is not None else 0.0)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time inside as waiting for groups."""
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
            totals.tokens,
            totals.groups,
            totals.uptime,
            totals.idle,
            self.tokens_trained,
            self.wait_seconds,
            self.steps,
            self._groups_used,
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

    def _totals(self) -> _Counters:
        """Sums over all actors ever seen, as far as each one had got when it was last heard."""
        now, actors = self._clock(), self._coordinator.actors()
        for actor in actors:
            if status := actor.status:
                values = _Counters(
                    status.tokens_generated,
                    status.groups_generated,
                    status.uptime_seconds,
                    status.idle_seconds,
                    status.stall_seconds,
                )
                first, at = self._first.setdefault(actor.session, (values, now))
                self._last[actor.session] = values.within(first, now - at)
        if len(self._last) > _REMEMBERED_ACTORS:
            self._forget({actor.session for actor in actors})
        counted = (last.since(self._first[session][0]) for session, last in self._last.items())
        return _sum([self._forgotten, *counted])

    def _forget(self, live: set[str]) -> None:
        """Sum up the older half of those that left."""
        gone = [session for session in self._last if session not in live]
        for session in gone[: (len(gone) + 1) // 2]:
            first, _ = self._first.pop(session)
            self._forgotten = _sum([self._forgotten, self._last.pop(session).since(first)])

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
        demand = (new.groups_used - old.groups_used) / busy_seconds
        return math.ceil(demand / (groups / actor_busy))


def _sum(counters: list[_Counters]) -> _Counters:
    return _Counters(*(sum(column) for column in zip(*counters, strict=True)))


def _share(part: float, whole: float) -> float:
    return min(max(part / whole, 0.0), 1.0) if whole > 0 else 0.0
