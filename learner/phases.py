"""Durations of the phases of a run, counted where they occur."""

from collections.abc import Mapping
from threading import Lock

from prometheus_client import CollectorRegistry, Histogram


class Phases:
    """Histograms for Prometheus, and the mean of every phase; any thread may call any method."""

    def __init__(self, registry: CollectorRegistry) -> None:
        """The histograms are exported by ``registry``."""
        self._actor_seconds = Histogram(
            "gdpo_actor_phase_seconds",
            "Phases of a group and of a weight update on the actors",
            ("phase",),
            registry=registry,
        )
        self._push_seconds = Histogram(
            "gdpo_weight_push_seconds", "Phases of a weight push", ("phase",), registry=registry
        )
        self._checkpoint_seconds = Histogram(
            "gdpo_checkpoint_copy_seconds",
            "Time that training waited for a checkpoint",
            registry=registry,
        )
        self._lock = Lock()
        self._totals: dict[str, tuple[int, float]] = {}

    def actor(self, phase: str, seconds: float) -> None:
        """Count one duration that an actor reported."""
        self._actor_seconds.labels(phase).observe(seconds)
        self._count(phase, seconds)

    def push(self, phases: Mapping[str, float], whole_seconds: float) -> None:
        """Count the durations of one weight push, by phase and as a whole."""
        for phase, seconds in {**phases, "whole": whole_seconds}.items():
            self._push_seconds.labels(phase).observe(seconds)
            self._count(f"weights_{phase}", seconds)

    def checkpoint(self, seconds: float) -> None:
        """Count the time that training waited for one checkpoint."""
        self._checkpoint_seconds.observe(seconds)
        self._count("checkpoint_copy", seconds)

    @property
    def mean_seconds(self) -> dict[str, float]:
        """The mean duration of every phase so far, by its name."""
        with self._lock:
            totals = sorted(self._totals.items())
        return {phase: total / count for phase, (count, total) in totals}

    def _count(self, phase: str, seconds: float) -> None:
        with self._lock:
            count, total = self._totals.get(phase, (0, 0.0))
            self._totals[phase] = (count + 1, total + seconds)
