"""What every push of weights exports to Prometheus."""

from typing import get_args

from prometheus_client import CollectorRegistry, Counter, Gauge

from learner.phases import Phases
from learner.weights.push import PushReport
from protocol.messages import Route


class PushMetrics:
    """Counts pushes, the actors that got them or broke them, and the seconds of their phases."""

    def __init__(self, registry: CollectorRegistry, phases: Phases) -> None:
        """Metrics are exported by ``registry``; durations go to ``phases``."""
        self._phases = phases
        self._pushes = Counter("gdpo_weight_pushes", "Weight pushes", registry=registry)
        self._epoch = Gauge(
            "gdpo_weight_epoch", "Current epoch of the collective", registry=registry
        )
        self._members = Gauge(
            "gdpo_weight_push_actors",
            "Actors of the last push, by route",
            ("route",),
            registry=registry,
        )
        self._evictions = Counter(
            "gdpo_weight_evictions",
            "Actors because of which an epoch ended, by cause",
            ("cause",),
            registry=registry,
        )

    def observe(self, report: PushReport) -> None:
        """Count one push."""
        self._pushes.inc()
        if report.epoch:
            self._epoch.set(report.epoch)
        for route in get_args(Route):
            self._members.labels(route).set(report.routes.get(route, 0))
        for cause in report.evicted.values():
            self._evictions.labels(cause).inc()
        self._phases.push(report.phases, report.seconds)
