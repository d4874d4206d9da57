"""What the learner exports to Prometheus."""

from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from learner.coordinator.access import Access
from learner.coordinator.coordinator import Coordinator
from learner.replay.buffer import ReplayBuffer
from learner.replay.journal import Journal
from learner.run.throughput import Progress
from learner.training.trainer import StepResult
from learner.weights.stream import WeightsStream


class StepMetrics:
    """Metrics that a training step updates."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def gauge(name: str, text: str, labels: tuple[str, ...] = ()) -> Gauge:
            return Gauge(name, text, labels, registry=registry)

        self._tokens = Counter(
            "gdpo_tokens_trained", "Completion tokens trained on", registry=registry
        )
        self._groups = Counter(
            "gdpo_group_uses", "Groups put into training batches", registry=registry
        )
        self._version = gauge("gdpo_trainer_version", "Training batches done")
        self._staleness = Histogram(
            "gdpo_staleness_versions",
            "Staleness of groups when they were trained on, in versions",
            buckets=(0, 1, 2, 3, 4, 6, 8, 12, 16, 32),
            registry=registry,
        )
        self._step_seconds = Histogram(
            "gdpo_step_seconds", "Duration of a training step", registry=registry
        )
        self._loss = {
            "ess": gauge("gdpo_effective_sample_size_ratio", "ESS of the importance weights"),
            "ratio_mean": gauge("gdpo_policy_ratio_mean", "Mean of the clipped ratio"),
            "ratio_max": gauge("gdpo_policy_ratio_max", "Largest ratio"),
            "clip_low_share": gauge("gdpo_clip_low_ratio", "Share of tokens clipped from below"),
            "clip_high_share": gauge("gdpo_clip_high_ratio", "Share of tokens clipped from above"),
            "mismatch_kl": gauge("gdpo_mismatch_kl", "KL of behaviour and current policy (k3)"),
            "loss": gauge("gdpo_loss", "Policy loss"),
            "grad_norm": gauge("gdpo_gradient_norm", "Gradient norm before clipping"),
            "groups/dead": gauge("gdpo_groups_dead", "Groups of the batch without any signal"),
            "groups/collapsed": gauge(
                "gdpo_groups_collapsed", "Groups of the batch whose rewards cancel out"
            ),
        }
        self._reward = {
            field: gauge(f"gdpo_reward_{name}", text, ("reward",))
            for field, (name, text) in {
                "mean": ("mean", "Mean score in the batch"),
                "std": ("std", "Standard deviation of the score in the batch"),
                "live_share": ("live_ratio", "Share of groups in which the reward varies"),
                "advantage_share": ("advantage_ratio", "Share of the absolute advantage"),
            }.items()
        }
        self._weight = gauge("gdpo_reward_weight", "Weight in the batch", ("reward",))
        self._correlation = gauge(
            "gdpo_reward_correlation", "Correlation of two rewards", ("first", "second")
        )
        self._lag0 = gauge(
            "gdpo_lag0_logprob_difference",
            "Largest difference of actors' and learner's log-probabilities at the same version",
        )

    def step(self, result: StepResult, seconds: float) -> None:
        self._tokens.inc(result.num_tokens)
        self._groups.inc(len(result.staleness))
        self._version.set(result.version)
        self._step_seconds.observe(seconds)
        if result.lag0_difference is not None:
            self._lag0.set(result.lag0_difference)
        for staleness in result.staleness:
            self._staleness.observe(staleness)
        for name, weight in result.setting.weights.items():
            self._weight.labels(name).set(weight)
        for name, value in result.metrics.items():
            if metric := self._loss.get(name):
                metric.set(value)
            elif name.startswith("reward_correlation/"):
                self._correlation.labels(*name.split("/")[1:]).set(value)
            elif name.startswith("reward/"):
                _, reward, field = name.split("/")
                self._reward[field].labels(reward).set(value)


class StateCollector(Collector):
    """Metrics read off the run's state at every scrape."""

    def __init__(
        self,
        coordinator: Coordinator,
        access: Access,
        buffer: ReplayBuffer,
        progress: Progress,
        journal: Journal | None,
        stream: WeightsStream,
    ) -> None:
        self._stream = stream
        self._coordinator = coordinator
        self._access = access
        self._buffer = buffer
        self._progress = progress
        self._journal = journal

    def collect(self) -> Iterator[Metric]:
        books, counters = self._buffer.books, self._coordinator.counters
        rates = self._progress.rates
        yield _gauge("gdpo_buffer_groups", "Groups in the replay buffer", len(self._buffer))
        yield _gauge("gdpo_buffer_bytes", "Memory of the groups", self._buffer.size_bytes)
        if self._journal is not None:
            size = self._journal.size_bytes
            yield _gauge("gdpo_journal_bytes", "Size of the journal", size)
        yield _gauge("gdpo_actors_live", "Actors connected", self._coordinator.num_live)
        yield _gauge(
            "gdpo_actors_wanted",
            "Actors that would keep the learner busy; 0 while unknown",
            rates.actors_wanted or 0,
        )
        yield _gauge("gdpo_actor_idle_ratio", "Idle share of actors", rates.actor_idle_share)
        yield _gauge(
            "gdpo_learner_wait_ratio",
            "Share of time that the learner waits",
            rates.learner_wait_share,
        )
        yield _counter(
            "gdpo_learner_wait_seconds",
            "Time that the learner waited for groups",
            self._progress.wait_seconds,
        )
        yield _counter(
            "gdpo_cluster_tokens_generated",
            "Completion tokens that all actors reported",
            self._progress.tokens_generated,
        )
        yield _counter("gdpo_groups_accepted", "Groups accepted for training", books.accepted)
        yield _counter(
            "gdpo_tokens_accepted", "Completion tokens of groups accepted", books.accepted_tokens
        )
        yield _counter("gdpo_groups_trained", "Groups that left the buffer trained", books.trained)
        yield _by("gdpo_groups_evicted", "Groups evicted", "cause", books.evicted)
        yield _by(
            "gdpo_tokens_evicted",
            "Completion tokens of groups evicted",
            "cause",
            books.evicted_tokens,
        )
        yield _by(
            "gdpo_groups_received", "Group messages, by verdict", "verdict", counters.verdicts
        )
        yield _counter("gdpo_bad_messages", "Messages refused as invalid", counters.bad_messages)
        yield _counter(
            "gdpo_unknown_session_messages",
            "Messages of actors that were given up before",
            counters.unknown_session,
        )
        yield _by(
            "gdpo_reward_failures",
            "Groups that a reward function failed on, as actors reported",
            "reward",
            counters.reward_failures,
        )
        yield _by(
            "gdpo_connections_refused",
            "Connections that ended before they could send anything",
            "cause",
            self._access.connections_refused,
        )
        yield _by(
            "gdpo_messages_refused",
            "Messages that were not decoded, because of the key they came with",
            "cause",
            self._access.messages_refused,
        )
        yield _counter("gdpo_actors_lost", "Actors lost without goodbye", counters.actors_lost)
        yield _counter(
            "gdpo_weight_digest_mismatches",
            "Actors that reported other weights",
            counters.digest_mismatches,
        )
        yield _counter(
            "gdpo_weight_stream_bytes", "Bytes sent to actors that pull", self._stream.sent_bytes
        )
        yield _counter(
            "gdpo_weight_stream_seconds",
            "Processor time of the thread that encodes and answers pulls",
            self._stream.busy_seconds,
        )
        yield self._actor_weights()
        yield from self._leases()

    def _actor_weights(self) -> Metric:
        """The version that each actor samples from, and how it got there."""
        family = GaugeMetricFamily(
            "gdpo_actor_version",
            "Policy version that an actor samples from, and the route by which it came",
            labels=["actor", "route"],
        )
        for actor in self._coordinator.actors():
            family.add_metric([str(actor.number), actor.route], actor.version)
        return family

    def _leases(self) -> Iterator[Metric]:
        issued = CounterMetricFamily("gdpo_leases_issued", "Leases issued", labels=["purpose"])
        ended = CounterMetricFamily(
            "gdpo_leases_ended", "Leases ended, by outcome", labels=["purpose", "outcome"]
        )
        outstanding = GaugeMetricFamily(
            "gdpo_leases_outstanding", "Leases being worked on", labels=["purpose"]
        )
        for purpose, books in self._coordinator.leases.books.items():
            issued.add_metric([purpose], books.leased)
            ended.add_metric([purpose, "received"], books.received)
            for cause, count in dict(books.failed).items():
                ended.add_metric([purpose, f"failed_{cause}"], count)
            outstanding.add_metric([purpose], books.outstanding)
        yield issued
        yield ended
        yield outstanding


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(name, text, value=value)


def _counter(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(name, text, value=value)


def _by(name: str, text: str, label: str, counts: dict[str, Any]) -> Metric:
    family = CounterMetricFamily(name, text, labels=[label])
    for key, count in dict(counts).items():
        family.add_metric([key], count)
    return family
