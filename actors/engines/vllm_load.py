"""The load of a vLLM engine: whether it makes progress, and how many leases it can use."""

import contextlib
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from actors.engines.engine import EngineStats

if TYPE_CHECKING:
    from vllm.v1.metrics.stats import IterationStats, SchedulerStats

FULL_S = 2.0
"""Time that something must have waited for the engine to count as full."""
FULL_KV_CACHE = 0.9
"""Share of the key-value cache in use above which more requests would only push others out."""


class EngineLoad:
    """How busy the engine is, from what vLLM reports after every step."""

    def __init__(self) -> None:
        self._tokens = 0
        self.max_sequences = 1
        """Sequences that vLLM works on at once."""
        self._enough: int | None = None
        """Leases known to run without waiting; at first a guess."""
        self._full_since: float | None = None
        self._requests = 0
        self._idle_seconds = 0.0
        self._since = time.monotonic()
        """When it last made progress, or ran out of things to do."""

    @contextlib.contextmanager
    def request(self) -> Iterator[None]:
        """Context in which a request is in the engine."""
        now = time.monotonic()
        if self._requests == 0:
            self._idle_seconds += now - self._since
            self._since = now
        self._requests += 1
        try:
            yield
        finally:
            self._requests -= 1
            if self._requests == 0:
                self._since = time.monotonic()

    @property
    def stalled_s(self) -> float:
        """Seconds since the last progress; 0 without requests."""
        return time.monotonic() - self._since if self._requests else 0.0

    def totals(self) -> EngineStats:
        """Totals without the time in which weights were loaded."""
        idle = self._idle_seconds
        if self._requests == 0:
            idle += time.monotonic() - self._since
        return EngineStats(tokens_generated=self._tokens, idle_seconds=idle)

    def capacity(self, active: int, num_rollouts: int) -> int:
        """Leases that keep the engine full, found without a setting.

        No more than the ``active`` ones while something waits, a quarter more while nothing does;
        in any case as many as once ran without waiting, until that many had to wait for a while.
        """
        if self._enough is None:
            self._enough = max(1, self.max_sequences // num_rollouts)
        if self._full_since is None:
            self._enough = max(self._enough, active)
            return max(self._enough, active + max(1, active // 4))
        # New prompts always wait for a moment, and so does everything after a change of weights.
        if time.monotonic() - self._full_since > FULL_S:
            self._enough = max(1, min(self._enough, active))
        return active

    def logger(self, vllm_config: Any, engine_index: int = 0) -> Any:
        """A logger of vLLM's statistics that feeds this object."""
        from vllm.v1.metrics.loggers import StatLoggerBase

        load = self

        class Logger(StatLoggerBase):  # type: ignore[misc]
            def __init__(self) -> None:
                pass

            def record(
                self,
                scheduler_stats: "SchedulerStats | None",
                iteration_stats: "IterationStats | None",
                mm_cache_stats: Any = None,
                engine_idx: int = 0,
            ) -> None:
                load._record(scheduler_stats, iteration_stats)

            def log_engine_initialized(self) -> None:
                pass

        return Logger()

    def _record(
        self, scheduler: "SchedulerStats | None", iteration: "IterationStats | None"
    ) -> None:
        if iteration is not None:
            self._tokens += iteration.num_generation_tokens
            if self._requests:
                self._since = time.monotonic()
        if scheduler is not None:
            waiting = scheduler.num_waiting_reqs + scheduler.num_skipped_waiting_reqs
            if waiting == 0 and scheduler.kv_cache_usage <= FULL_KV_CACHE:
                self._full_since = None
            elif self._full_since is None:
                self._full_since = time.monotonic()
