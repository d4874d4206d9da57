"""What the learner tells people: the live status, the line per step, the summary at the end."""

import time
from dataclasses import asdict
from statistics import fmean
from typing import Any

from learner.coordinator.access import Access
from learner.prompts.evaluation import Evaluation
from learner.registry import ActorState
from learner.run.connections import Connections
from learner.run.parts import Parts
from learner.training.trainer import StepResult
from protocol.weights import total_bytes


def status_report(parts: Parts, connections: Connections) -> dict[str, Any]:
    """The state of the run now, for displays."""
    rates = parts.throughput.sample()
    step, done = parts.progress.last_step, parts.trainer.version
    total = parts.config.learner.steps
    live = parts.coordinator.num_live
    # With a fixed lag they wait for each other by design.
    free = parts.config.buffer.lag is None
    return {
        "run": parts.folder.path.name,
        "phase": parts.progress.phase if live else f"{parts.progress.phase}, waiting for an actor",
        "step": done,
        "steps": total,
        "seconds_left": _seconds_left(parts.progress.training_seconds, done, total),
        "rewards": step.rewards if step else {},
        "tokens_generated_per_s": rates.tokens_generated_per_s,
        "tokens_trained_per_s": rates.tokens_trained_per_s,
        "staleness_mean": fmean(step.staleness) if step else None,
        "staleness_max": max(step.staleness) if step else None,
        "max_staleness": parts.config.learner.max_staleness,
        "buffer_groups": len(parts.buffer),
        "buffer_bytes": parts.buffer.size_bytes,
        "batch_groups": parts.config.learner.batch_groups,
        "actors_live": live,
        "actors_wanted": rates.actors_wanted if free else None,
        "actor_idle_share": rates.actor_idle_share,
        "learner_wait_share": rates.learner_wait_share,
        **_refused(connections.access),
        "bottleneck": rates.bottleneck if done and live and free else None,
        "weights": weights_report(parts, connections),
        "actors": [_actor(parts, actor) for actor in parts.coordinator.actors()],
    }


def weights_report(parts: Parts, connections: Connections) -> dict[str, Any]:
    """Epochs, the last pushes, and what pulling costs."""
    publisher, stream = connections.publisher, parts.weights_stream
    return {
        "backend": publisher.backend,
        "push_every": parts.config.weights.push_every,
        "pushes": publisher.pushes,
        "num_bytes": total_bytes(parts.policy.specs),
        "stream_share": stream.share,
        "stream_bytes": stream.sent_bytes,
        "stream_plain_bytes": stream.plain_bytes,
        "epochs": [asdict(epoch) for epoch in publisher.epochs],
        "last_pushes": [asdict(push) for push in tuple(publisher.history)],
        "evictions": dict(publisher.evictions),
    }


def step_line(parts: Parts, step: StepResult, seconds: float) -> dict[str, Any]:
    """One line of metrics.jsonl."""
    rates = parts.throughput.rates
    return {
        "step": step.version,
        "seconds": parts.progress.training_seconds,
        "step_seconds": seconds,
        "rewards": step.rewards,
        "reward_settings": step.setting.as_json(),
        "completion_tokens_mean": step.mean_tokens,
        "staleness_mean": fmean(step.staleness),
        "staleness_max": max(step.staleness),
        "tokens_generated_per_s": rates.tokens_generated_per_s,
        "tokens_trained_per_s": rates.tokens_trained_per_s,
        "actor_idle_share": rates.actor_idle_share,
        "learner_wait_share": rates.learner_wait_share,
        "buffer_groups": len(parts.buffer),
        "buffer_bytes": parts.buffer.size_bytes,
        "actors_live": parts.coordinator.num_live,
        "lag0_logprob_difference": step.lag0_difference,
        **step.metrics,
    }


def summary_report(parts: Parts, connections: Connections) -> dict[str, Any]:
    """summary.json: what the run achieved, and its books."""
    leases, books = parts.coordinator.leases.books, parts.buffer.books
    seconds = parts.progress.training_seconds
    return {
        "run": parts.folder.path.name,
        "completed": parts.progress.completed,
        "ended_because": "all steps done"
        if parts.progress.completed
        else parts.progress.interrupted,
        "steps": parts.trainer.version,
        "seconds_training": seconds,
        "rewards": {
            "before": parts.progress.before,
            "after": parts.progress.after,
            "changes": [asdict(change) for change in parts.rewards.changes],
            "failures": dict(parts.coordinator.counters.reward_failures),
        },
        "books": {
            "leases": {
                purpose: {
                    "leased": b.leased,
                    "received": b.received,
                    "failed": dict(b.failed),
                    "outstanding": b.outstanding,
                    "balanced": b.balanced,
                }
                for purpose, b in leases.items()
            },
            "groups": {
                "accepted": books.accepted,
                "trained": books.trained,
                "evicted": dict(books.evicted),
                "evicted_tokens": dict(books.evicted_tokens),
                "buffered": books.buffered,
                "balanced": books.balanced,
            },
        },
        "throughput": {
            "tokens_trained": parts.throughput.tokens_trained,
            "tokens_trained_per_s": parts.throughput.tokens_trained / seconds if seconds else 0.0,
            "tokens_generated": parts.throughput.tokens_generated,
        },
        "staleness": {
            "largest": parts.buffer.largest_staleness,
            "limit": parts.config.learner.max_staleness,
        },
        "lag0_logprob_difference": parts.progress.lag0_difference,
        "phase_seconds": parts.phases.mean_seconds,
        "actors_lost": parts.coordinator.counters.actors_lost,
        "bad_messages": parts.coordinator.counters.bad_messages,
        **_refused(connections.access),
        "weights": {
            "version": parts.trainer.version,
            "digest_mismatches": parts.coordinator.counters.digest_mismatches,
            "actors_stalled_share": parts.throughput.stalled_share,
            "pushes": connections.publisher.pushes,
            "evictions": dict(connections.publisher.evictions),
            "stream_share": parts.weights_stream.share,
        },
        "checkpoint": str(parts.folder.checkpoint.resolve())
        if parts.folder.checkpoint.exists()
        else None,
    }


def _actor(parts: Parts, actor: ActorState) -> dict[str, Any]:
    idle, stalled = parts.throughput.shares(actor.session) or (None, None)
    return {
        "number": actor.number,
        "host": actor.hello.host,
        "pid": actor.hello.pid,
        "version": actor.version,
        "route": actor.route,
        "leases": actor.held,
        "groups": actor.groups,
        "check": actor.check,
        "check_difference": actor.check_difference,
        "idle_share": idle,
        "stalled_share": stalled,
        # By the coordinator's clock.
        "silent_s": max(0.0, time.monotonic() - actor.last_heard),
    }


def _refused(access: Access) -> dict[str, Any]:
    """What did not get past the access, by cause."""
    return {
        "connections_refused": dict(access.connections_refused),
        "messages_refused": dict(access.messages_refused),
    }


def _seconds_left(seconds: float, done: int, total: int) -> float | None:
    """At the mean pace so far; None while there is none."""
    return seconds / done * (total - done) if done and seconds > 0 else None


def evaluation_report(evaluation: Evaluation, names: tuple[str, ...]) -> dict[str, Any]:
    """What an evaluation found."""
    return {
        "version": evaluation.version,
        "prompts": evaluation.num_prompts,
        "failed_prompts": evaluation.num_failed,
        "completion_tokens_mean": evaluation.mean_tokens,
        "means": evaluation.means(names),
    }
