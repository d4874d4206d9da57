"""What the learner tells people: the live status, the line per step, the summary at the end."""

import time
from dataclasses import asdict
from statistics import fmean
from typing import TYPE_CHECKING, Any

from learner.prompts.evaluation import Evaluation
from learner.registry import ActorState
from learner.training.trainer import StepResult
from protocol.weights import total_bytes

if TYPE_CHECKING:
    from learner.run.learner import Learner


def status_report(learner: "Learner") -> dict[str, Any]:
    """The state of the run now, for displays."""
    rates = learner.progress.sample()
    step, done = learner.last_step, learner.trainer.version
    total = learner.config.training.steps
    live = learner.coordinator.num_live
    # With a fixed lag they wait for each other by design.
    free = learner.config.buffer.lag is None
    return {
        "run": learner.folder.path.name,
        "phase": learner.phase if live else f"{learner.phase}, waiting for an actor",
        "step": done,
        "steps": total,
        "seconds_left": _seconds_left(learner.training_seconds, done, total),
        "rewards": step.rewards if step else {},
        "tokens_generated_per_s": rates.tokens_generated_per_s,
        "tokens_trained_per_s": rates.tokens_trained_per_s,
        "staleness_mean": fmean(step.staleness) if step else None,
        "staleness_max": max(step.staleness) if step else None,
        "max_staleness": learner.config.training.max_staleness,
        "buffer_groups": len(learner.buffer),
        "buffer_bytes": learner.buffer.size_bytes,
        "batch_groups": learner.config.training.batch_groups,
        "actors_live": live,
        "actors_wanted": rates.actors_wanted if free else None,
        "actor_idle_share": rates.actor_idle_share,
        "learner_wait_share": rates.learner_wait_share,
        **_refused(learner),
        "bottleneck": rates.bottleneck if done and live and free else None,
        "weights": weights_report(learner),
        "actors": [_actor(learner, actor) for actor in learner.coordinator.actors()],
    }


def weights_report(learner: "Learner") -> dict[str, Any]:
    """Epochs, the last pushes, and what pulling costs."""
    publisher, stream = learner.publisher, learner.weights_stream
    return {
        "backend": publisher.backend,
        "push_every": learner.config.weights.push_every,
        "pushes": publisher.pushes,
        "num_bytes": total_bytes(learner.policy.specs),
        "stream_share": stream.share,
        "stream_bytes": stream.sent_bytes,
        "stream_plain_bytes": stream.plain_bytes,
        "epochs": [asdict(epoch) for epoch in publisher.epochs],
        "last_pushes": [asdict(push) for push in tuple(publisher.history)],
        "evictions": dict(publisher.evictions),
    }


def step_line(learner: "Learner", step: StepResult, seconds: float) -> dict[str, Any]:
    """One line of metrics.jsonl."""
    rates = learner.progress.rates
    return {
        "step": step.version,
        "seconds": learner.training_seconds,
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
        "buffer_groups": len(learner.buffer),
        "buffer_bytes": learner.buffer.size_bytes,
        "actors_live": learner.coordinator.num_live,
        "lag0_logprob_difference": step.lag0_difference,
        **step.metrics,
    }


def summary_report(learner: "Learner") -> dict[str, Any]:
    """summary.json: what the run achieved, and its books."""
    leases, books = learner.coordinator.leases.books, learner.buffer.books
    seconds = learner.training_seconds
    return {
        "run": learner.folder.path.name,
        "completed": learner.completed,
        "ended_because": "all steps done" if learner.completed else learner.interrupted,
        "steps": learner.trainer.version,
        "seconds_training": seconds,
        "rewards": {
            "before": learner.before,
            "after": learner.after,
            "changes": [asdict(change) for change in learner.rewards.changes],
            "failures": dict(learner.coordinator.counters.reward_failures),
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
            "tokens_trained": learner.progress.tokens_trained,
            "tokens_trained_per_s": learner.progress.tokens_trained / seconds if seconds else 0.0,
            "tokens_generated": learner.progress.tokens_generated,
        },
        "staleness": {
            "largest": learner.buffer.largest_staleness,
            "limit": learner.config.training.max_staleness,
        },
        "lag0_logprob_difference": learner.lag0_difference,
        "phase_seconds": learner.phase_seconds,
        "actors_lost": learner.coordinator.counters.actors_lost,
        "bad_messages": learner.coordinator.counters.bad_messages,
        **_refused(learner),
        "weights": {
            "version": learner.trainer.version,
            "digest_mismatches": learner.coordinator.counters.digest_mismatches,
            "actors_stalled_share": learner.progress.stalled_share,
            "pushes": learner.publisher.pushes,
            "evictions": dict(learner.publisher.evictions),
            "stream_share": learner.weights_stream.share,
        },
        "checkpoint": str(learner.folder.checkpoint.resolve())
        if learner.folder.checkpoint.exists()
        else None,
    }


def _actor(learner: "Learner", actor: ActorState) -> dict[str, Any]:
    idle, stalled = learner.progress.shares(actor.session) or (None, None)
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


def _refused(learner: "Learner") -> dict[str, Any]:
    """What did not get past the access, by cause."""
    return {
        "connections_refused": dict(learner.access.connections_refused),
        "messages_refused": dict(learner.access.messages_refused),
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
