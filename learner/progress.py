"""Rates and shares of the last seconds: how fast each side is, and which one holds up the other."""

import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from threading import Lock

from learner.coordinator import Coordinator

WINDOW_S = 15.0


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


@dataclass(frozen=True, slots=True)
class Rates:
    """Over the last `WINDOW_S` seconds or less."""

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
        self._gone = dict.fromkeys(("tokens", "groups", "uptime", "idle"), 0.0)
        self._last_seen: dict[str, dict[str, float]] = {}
        self.tokens_trained = 0
        self.wait_seconds = 0.0
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
            return int(self._totals()["tokens"])

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
        while self._samples[0].at < now - WINDOW_S:
            self._samples.popleft()
        return self._between(self._samples[0], new)

    def _totals(self) -> dict[str, float]:
        """Sums over live actors, and what those that left had reached."""
        live = {}
        for actor in self._coordinator.actors():
            if status := actor.status:
                live[actor.session] = {
                    "tokens": status.tokens_generated,
                    "groups": status.groups_generated,
                    "uptime": status.uptime_seconds,
                    "idle": status.idle_seconds,
                }
        for session in self._last_seen.keys() - live.keys():
            for name, value in self._last_seen[session].items():
                self._gone[name] += value
        for session in live.keys() - self._last_seen.keys():
            # Only what happens from now on counts, so that rates do not jump at a join.
            for name, value in live[session].items():
                self._gone[name] -= value if name in ("uptime", "idle") else 0
        self._last_seen = live
        return {
            name: gone + sum(values[name] for values in live.values())
            for name, gone in self._gone.items()
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
