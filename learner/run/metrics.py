"""What the learner exports to Prometheus."""

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from learner.run.connections import Connections
from learner.run.parts import Parts
from learner.training.trainer import StepResult


class _Family(NamedTuple):
    name: str
    text: str
    labels: tuple[str, ...] = ()


_COUNTERS = {
    "tokens": _Family("gdpo_tokens_trained", "Completion tokens trained on"),
    "groups": _Family("gdpo_group_uses", "Groups put into training batches"),
}

_GAUGES = {
    "version": _Family("gdpo_trainer_version", "Training batches done"),
    "weight": _Family("gdpo_reward_weight", "Weight in the batch", ("reward",)),
    "correlation": _Family(
        "gdpo_reward_correlation", "Correlation of two rewards", ("first", "second")
    ),
    "lag0": _Family(
        "gdpo_lag0_logprob_difference",
        "Largest difference of actors' and learner's log-probabilities at the same version",
    ),
}

_BATCH = {
    "ess": _Family("gdpo_effective_sample_size_ratio", "ESS of the importance weights"),
    "ratio_mean": _Family("gdpo_policy_ratio_mean", "Mean of the clipped ratio"),
    "ratio_max": _Family("gdpo_policy_ratio_max", "Largest ratio"),
    "clip_low_share": _Family("gdpo_clip_low_ratio", "Share of tokens clipped from below"),
    "clip_high_share": _Family("gdpo_clip_high_ratio", "Share of tokens clipped from above"),
    "mismatch_kl": _Family("gdpo_mismatch_kl", "KL of behaviour and current policy (k3)"),
    "loss": _Family("gdpo_loss", "Policy loss"),
    "grad_norm": _Family("gdpo_gradient_norm", "Gradient norm before clipping"),
    "learning_rate": _Family("gdpo_learning_rate", "Learning rate of the last optimiser step"),
    "entropy": _Family("gdpo_entropy", "Mean entropy of the policy at a sampled token, in nats"),
    "completions/mean_length": _Family(
        "gdpo_completions_mean_length", "Mean tokens of completions"
    ),
    "completions/min_length": _Family("gdpo_completions_min_length", "Tokens of the shortest"),
    "completions/max_length": _Family("gdpo_completions_max_length", "Tokens of the longest"),
    "completions/clipped_ratio": _Family(
        "gdpo_completions_clipped_ratio", "Share of completions cut off at max_tokens"
    ),
    "frac_reward_zero_std": _Family(
        "gdpo_frac_reward_zero_std", "Share of groups that are dead or collapsed"
    ),
    "groups/dead": _Family("gdpo_groups_dead", "Groups of the batch without any signal"),
    "groups/collapsed": _Family(
        "gdpo_groups_collapsed", "Groups of the batch whose rewards cancel out"
    ),
}
"""Figures of `learner.training.trainer.StepResult.metrics` as they are."""

_REWARD = {
    "mean": _Family("gdpo_reward_mean", "Mean score in the batch", ("reward",)),
    "std": _Family("gdpo_reward_std", "Standard deviation of the score in the batch", ("reward",)),
    "live_share": _Family(
        "gdpo_reward_live_ratio", "Share of groups in which the reward varies", ("reward",)
    ),
    "advantage_share": _Family(
        "gdpo_reward_advantage_ratio", "Share of the absolute advantage", ("reward",)
    ),
}
"""Figures of one reward there: ``reward/NAME/FIELD``."""


class StepMetrics:
    """Metrics that a training step updates."""

    def __init__(self, registry: CollectorRegistry) -> None:
        """``registry`` exports them."""

        def gauges(families: Mapping[str, _Family]) -> dict[str, Gauge]:
            return {key: Gauge(*family, registry=registry) for key, family in families.items()}

        self._counters = {key: Counter(*f, registry=registry) for key, f in _COUNTERS.items()}
        self._gauges, self._batch, self._reward = map(gauges, (_GAUGES, _BATCH, _REWARD))
        # Not every step computes it, and 0 would mean something.
        self._batch["entropy"].set(math.nan)
        self._staleness = Histogram(
            "gdpo_staleness_versions",
            "Staleness of groups when they were trained on, in versions",
            buckets=(0, 1, 2, 3, 4, 6, 8, 12, 16, 32),
            registry=registry,
        )
        self._seconds = Histogram(
            "gdpo_step_seconds", "Duration of a training step", registry=registry
        )

    def step(self, result: StepResult, seconds: float) -> None:
        """Export a training step of ``seconds``, publishing its weights included."""
        self._counters["tokens"].inc(result.num_tokens)
        self._counters["groups"].inc(len(result.staleness))
        self._gauges["version"].set(result.version)
        self._seconds.observe(seconds)
        if result.lag0_difference is not None:
            self._gauges["lag0"].set(result.lag0_difference)
        for staleness in result.staleness:
            self._staleness.observe(staleness)
        for name, weight in result.setting.weights.items():
            self._gauges["weight"].labels(name).set(weight)
        for name, value in result.metrics.items():
            if metric := self._batch.get(name):
                metric.set(value)
            elif name.startswith("reward_correlation/"):
                self._gauges["correlation"].labels(*name.split("/")[1:]).set(value)
            elif name.startswith("reward/"):
                _, reward, field = name.split("/")
                self._reward[field].labels(reward).set(value)


class StateCollector(Collector):
    """Metrics read off the run's state at every scrape."""

    def __init__(self, parts: Parts, connections: Connections) -> None:
        self._parts = parts
        self._connections = connections

    def collect(self) -> Iterator[Metric]:
        """Yield every family, as Prometheus' client asks for it."""
        yield from self._groups()
        yield from self._actors()
        yield from self._checks()
        yield from self._wire()
        yield from self._weights()
        yield from self._leases()
        yield from self._evaluations()

    def _groups(self) -> Iterator[Metric]:
        buffer, counts = self._parts.buffer, self._parts.buffer.counts
        yield _gauge("gdpo_buffer_groups", "Groups in the replay buffer", len(buffer))
        yield _gauge("gdpo_buffer_bytes", "Memory of the groups", buffer.size_bytes)
        if (journal := self._parts.history.journal) is not None:
            yield _gauge("gdpo_journal_bytes", "Size of the journal", journal.size_bytes)
        yield _counter("gdpo_groups_accepted", "Groups accepted for training", counts.accepted)
        yield _counter(
            "gdpo_tokens_accepted", "Completion tokens of groups accepted", counts.accepted_tokens
        )
        yield _counter("gdpo_groups_trained", "Groups that left the buffer trained", counts.trained)
        yield _by("gdpo_groups_evicted", "Groups evicted", "cause", counts.evicted)
        yield _by(
            "gdpo_tokens_evicted",
            "Completion tokens of groups evicted",
            "cause",
            counts.evicted_tokens,
        )

    def _actors(self) -> Iterator[Metric]:
        coordinator, throughput = self._parts.coordinator, self._parts.throughput
        rates = throughput.rates
        yield _gauge("gdpo_actors_live", "Actors connected", coordinator.num_live)
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
            throughput.wait_seconds,
        )
        yield _counter(
            "gdpo_cluster_tokens_generated",
            "Completion tokens that all actors reported",
            throughput.tokens_generated,
        )
        yield _counter(
            "gdpo_actors_lost",
            "Actors lost without goodbye",
            coordinator.counters.actors_lost,
        )
        yield _by(
            "gdpo_reward_failures",
            "Groups that a reward function failed on, as actors reported",
            "reward",
            coordinator.counters.reward_failures,
        )

    def _checks(self) -> Iterator[Metric]:
        """Whether the actors compute what the learner does."""
        coordinator = self._parts.coordinator
        yield _counter(
            "gdpo_spot_checks", "Comparisons of actors at work", coordinator.counters.spot_checks
        )
        mean = GaugeMetricFamily(
            "gdpo_actor_logprob_difference_mean",
            "Mean difference of log-probabilities, actor to learner, in its newest check, in nats",
            labels=["actor"],
        )
        largest = GaugeMetricFamily(
            "gdpo_actor_logprob_difference_largest",
            "Largest difference of log-probabilities in all checks of an actor, in nats",
            labels=["actor"],
        )
        for actor in coordinator.actors():
            if actor.difference_mean is not None and actor.difference_largest is not None:
                mean.add_metric([str(actor.number)], actor.difference_mean)
                largest.add_metric([str(actor.number)], actor.difference_largest)
        yield mean
        yield largest

    def _wire(self) -> Iterator[Metric]:
        counters, access = self._parts.coordinator.counters, self._connections.access
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
            "gdpo_connections_refused",
            "Connections that ended before they could send anything",
            "cause",
            access.connections_refused,
        )
        yield _by(
            "gdpo_messages_refused",
            "Messages that were not decoded, because of the key they came with",
            "cause",
            access.messages_refused,
        )

    def _weights(self) -> Iterator[Metric]:
        coordinator, stream = self._parts.coordinator, self._parts.weights_stream
        yield _counter(
            "gdpo_weight_digest_mismatches",
            "Actors that reported other weights",
            coordinator.counters.digest_mismatches,
        )
        yield _counter(
            "gdpo_weight_stream_bytes", "Bytes sent to actors that pull", stream.sent_bytes
        )
        yield _counter(
            "gdpo_weight_stream_seconds",
            "Processor time of the thread that encodes and answers pulls",
            stream.busy_seconds,
        )
        yield self._actor_weights()

    def _actor_weights(self) -> Metric:
        """The version that each actor samples from, and how it got there."""
        family = GaugeMetricFamily(
            "gdpo_actor_version",
            "Policy version that an actor samples from, and the route by which it came",
            labels=["actor", "route"],
        )
        for actor in self._parts.coordinator.actors():
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
        for purpose, counts in self._parts.coordinator.leases.counts.items():
            issued.add_metric([purpose], counts.leased)
            ended.add_metric([purpose, "received"], counts.received)
            for cause, count in dict(counts.failed).items():
                ended.add_metric([purpose, f"failed_{cause}"], count)
            outstanding.add_metric([purpose], counts.outstanding)
        yield issued
        yield ended
        yield outstanding
        yield _gauge(
            "gdpo_lease_limit_seconds",
            "Time after which a lease is given up whatever its actor reports",
            self._parts.coordinator.lease_limit_s,
        )
        yield _gauge(
            "gdpo_lease_lead_seconds",
            "Time before a batch is needed at which its prompts are leased; 0 while unknown",
            self._parts.coordinator.lead_s or 0.0,
        )

    def _evaluations(self) -> Iterator[Metric]:
        """What the evaluation that was done last found."""
        results = tuple(self._parts.progress.evaluations)
        yield _counter("gdpo_evaluations", "Evaluations done", len(results))
        version = GaugeMetricFamily("gdpo_eval_version", "Policy version evaluated last")
        seconds = GaugeMetricFamily("gdpo_eval_seconds", "Duration of the last evaluation")
        mean = GaugeMetricFamily(
            "gdpo_eval_reward_mean", "Mean score on held-out prompts", labels=["set", "reward"]
        )
        passes = GaugeMetricFamily(
            "gdpo_eval_pass_ratio", "pass@k on held-out prompts", labels=["set", "k"]
        )
        length = GaugeMetricFamily(
            "gdpo_eval_completions_mean_length",
            "Mean tokens of completions of held-out prompts",
            labels=["set"],
        )
        for result in results[-1:]:
            version.add_metric([], result.version)
            seconds.add_metric([], result.seconds)
            for name, found in result.sets.items():
                length.add_metric([name], found.completion_tokens_mean)
                for reward, value in found.means.items():
                    if value is not None:
                        mean.add_metric([name, reward], value)
                for k, share in found.pass_at.items():
                    passes.add_metric([name, k], share)
        yield from (version, seconds, mean, passes, length)


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(name, text, value=value)


def _counter(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(name, text, value=value)


def _by(name: str, text: str, label: str, counts: dict[str, Any]) -> Metric:
    family = CounterMetricFamily(name, text, labels=[label])
    for key, count in dict(counts).items():
        family.add_metric([key], count)
    return family
