"""An actor's metrics for Prometheus, read off its counters at every scrape."""

from collections.abc import Callable, Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from protocol.messages import Status

_COUNTERS = {
    "gdpo_tokens_generated": ("tokens_generated", "Completion tokens sampled"),
    "gdpo_groups_generated": ("groups_generated", "Groups finished and scored"),
    "gdpo_actor_idle_seconds": ("idle_seconds", "Time without anything to generate"),
    "gdpo_actor_stall_seconds": ("stall_seconds", "Time in which weights were loaded"),
}
_GAUGES = {
    "gdpo_policy_version": ("version", "Version of the weights in use"),
    "gdpo_leases_capacity": ("capacity", "Leases that can be held at once"),
    "gdpo_uptime_seconds": ("uptime_seconds", "Age of the process"),
}


class StatusCollector(Collector):
    """The actor's `Status` as metrics."""

    def __init__(
        self,
        status: Callable[[], Status],
        failed: dict[str, int],
        reward_failures: Callable[[], dict[tuple[str, str], int]],
        dropped: Callable[[], int],
    ) -> None:
        self._status = status
        self._failed = failed
        self._reward_failures = reward_failures
        self._dropped = dropped

    def collect(self) -> Iterator[Metric]:
        """All metrics, as of now."""
        status = self._status()
        for name, (field, text) in _COUNTERS.items():
            yield CounterMetricFamily(name, text, value=getattr(status, field))
        for name, (field, text) in _GAUGES.items():
            yield GaugeMetricFamily(name, text, value=getattr(status, field))
        yield GaugeMetricFamily(
            "gdpo_leases_active",
            "Leases being worked on, or whose group is not acknowledged",
            value=len(status.leases),
        )
        failed = CounterMetricFamily(
            "gdpo_groups_failed", "Groups given up, by cause", labels=["cause"]
        )
        for cause, count in dict(self._failed).items():
            failed.add_metric([cause], count)
        yield failed
        rewards = CounterMetricFamily(
            "gdpo_reward_failures",
            "Groups that a reward function failed on",
            labels=["reward", "kind"],
        )
        for (reward, kind), count in self._reward_failures().items():
            rewards.add_metric([reward, kind], count)
        yield rewards
        yield CounterMetricFamily(
            "gdpo_messages_dropped",
            "Messages not sent because the queue was full, or not valid when received",
            value=self._dropped(),
        )
