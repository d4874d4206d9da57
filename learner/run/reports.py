"""The records of a run, made of its parts as they are at the moment."""

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from statistics import fmean

from learner.config.run import RunConfig
from learner.coordinator.coordinator import Coordinator
from learner.prompts.evaluation import Evaluation
from learner.records import (
    Books,
    EvaluationResult,
    GroupBooks,
    LeaseBooks,
    RewardChangeRecord,
    SetResult,
    Step,
    Summary,
    SummaryRewards,
    SummaryStaleness,
    SummaryThroughput,
    SummaryWeights,
)
from learner.registry import ActorState
from learner.replay.buffer import NO_SIGNAL, ReplayBuffer, TrainingBatch
from learner.run.connections import Connections
from learner.run.parts import Parts
from learner.run.throughput import Throughput
from learner.status import (
    ActorStatus,
    EpochStatus,
    EvaluatingStatus,
    EvaluationStatus,
    PushStatus,
    Status,
    StepStatus,
    WeightsStatus,
)
from learner.training.trainer import StepResult
from learner.weights.push import PushReport
from protocol.weights import total_bytes


def status_report(parts: Parts, connections: Connections) -> Status:
    """The state of the run now, for displays."""
    config, progress, coordinator = parts.config, parts.progress, parts.coordinator
    buffer, throughput, access = parts.buffer, parts.throughput, connections.access
    version = parts.trainer.version
    rates = throughput.sample()
    step, live = progress.last_step, coordinator.num_live
    total = config.training.steps
    # With a fixed lag they wait for each other by design.
    free = config.buffer.lag is None
    return Status(
        run=parts.folder.path.name,
        phase=progress.phase if live else f"{progress.phase}, waiting for an actor",
        step=version,
        steps=total,
        seconds_left=_seconds_left(progress.training_seconds, version, total),
        rewards=step.rewards if step else {},
        last_step=_last_step(step.metrics) if step else None,
        evaluating=_evaluating(progress.evaluating),
        evaluation=_last_evaluation(progress.evaluations),
        tokens_generated_per_s=rates.tokens_generated_per_s,
        tokens_trained_per_s=rates.tokens_trained_per_s,
        staleness_mean=fmean(step.staleness) if step else None,
        staleness_max=max(step.staleness) if step else None,
        max_staleness=config.training.max_staleness,
        buffer_groups=len(buffer),
        buffer_bytes=buffer.size_bytes,
        batch_groups=config.training.batch_groups,
        groups_refilled=buffer.counts.evicted[NO_SIGNAL],
        actors_live=live,
        actors_wanted=rates.actors_wanted if free else None,
        actor_idle_share=rates.actor_idle_share,
        learner_wait_share=rates.learner_wait_share,
        connections_refused=dict(access.connections_refused),
        messages_refused=dict(access.messages_refused),
        bottleneck=rates.bottleneck if version and live and free else None,
        weights=weights_report(parts, connections),
        actors=[_actor(actor, throughput) for actor in coordinator.actors()],
    )


def weights_report(parts: Parts, connections: Connections) -> WeightsStatus:
    """Epochs, the last pushes, and what pulling costs."""
    publisher, stream = connections.publisher, parts.weights_stream
    return WeightsStatus(
        backend=publisher.backend,
        push_every=parts.config.weights.push_every,
        pushes=publisher.pushes,
        num_bytes=total_bytes(parts.policy.specs),
        stream_share=stream.share,
        stream_bytes=stream.sent_bytes,
        stream_plain_bytes=stream.plain_bytes,
        epochs=[EpochStatus(**asdict(epoch)) for epoch in publisher.epochs],
        last_pushes=[_push(report) for report in tuple(publisher.history)],
        evictions=dict(publisher.evictions),
    )


def step_report(parts: Parts, step: StepResult, batch: TrainingBatch, seconds: float) -> Step:
    """The line of a step on ``batch`` that took ``seconds``."""
    rates, buffer, actors = parts.throughput.rates, parts.buffer, parts.coordinator.actors()
    return Step.model_validate(
        {
            "step": step.version,
            "seconds": parts.progress.training_seconds,
            "step_seconds": seconds,
            "rewards": step.rewards,
            "reward_settings": step.setting.as_json(),
            "staleness_mean": fmean(step.staleness),
            "staleness_max": max(step.staleness),
            "groups_refilled": batch.num_refilled,
            "tokens_generated_per_s": rates.tokens_generated_per_s,
            "tokens_trained_per_s": rates.tokens_trained_per_s,
            "actor_idle_share": rates.actor_idle_share,
            "learner_wait_share": rates.learner_wait_share,
            "buffer_groups": len(buffer),
            "buffer_bytes": buffer.size_bytes,
            "actors_live": len(actors),
            "lag0_logprob_difference": step.lag0_difference,
            "actor_difference_mean": _largest(actor.difference_mean for actor in actors),
            "actor_difference_largest": _largest(actor.difference_largest for actor in actors),
            **step.metrics,
        }
    )


def summary_report(parts: Parts, connections: Connections) -> Summary:
    """What the run achieved, and its books."""
    folder, progress, buffer = parts.folder, parts.progress, parts.buffer
    coordinator, throughput, access = parts.coordinator, parts.throughput, connections.access
    counters, seconds = coordinator.counters, progress.training_seconds
    version = parts.trainer.version
    return Summary(
        run=parts.folder.path.name,
        completed=progress.completed,
        ended_because="all steps done" if progress.completed else progress.interrupted,
        steps=version,
        seconds_training=seconds,
        rewards=SummaryRewards(
            changes=[RewardChangeRecord.model_validate(asdict(c)) for c in parts.rewards.changes],
            failures=dict(counters.reward_failures),
        ),
        evaluations=progress.evaluations,
        books=_books(coordinator, buffer),
        throughput=SummaryThroughput(
            tokens_trained=throughput.tokens_trained,
            tokens_trained_per_s=throughput.tokens_trained / seconds if seconds else 0.0,
            tokens_generated=throughput.tokens_generated,
        ),
        staleness=SummaryStaleness(
            largest=buffer.largest_staleness, limit=parts.config.training.max_staleness
        ),
        lag0_logprob_difference=progress.lag0_difference,
        phase_seconds=parts.phases.mean_seconds,
        actors_lost=counters.actors_lost,
        bad_messages=counters.bad_messages,
        connections_refused=dict(access.connections_refused),
        messages_refused=dict(access.messages_refused),
        weights=SummaryWeights(
            version=version,
            digest_mismatches=counters.digest_mismatches,
            actors_stalled_share=throughput.stalled_share,
            pushes=connections.publisher.pushes,
            evictions=dict(connections.publisher.evictions),
            stream_share=parts.weights_stream.share,
        ),
        checkpoint=str(folder.checkpoint.resolve()) if folder.checkpoint.exists() else None,
    )


def evaluation_report(evaluation: Evaluation, config: RunConfig) -> EvaluationResult:
    """What an evaluation that is done found."""
    names, when = [reward.name for reward in config.rewards], config.eval.pass_when
    sets = {}
    for heldout in config.heldout_sets:
        scores = evaluation.sets[heldout.name]
        passes = scores.passes(heldout.pass_at, when, names) if when else {}
        sets[heldout.name] = SetResult(
            prompts=len(scores.scores),
            failed_prompts=scores.num_failed,
            missing_prompts=scores.num_prompts - len(scores.scores) - scores.num_failed,
            num_rollouts=heldout.num_rollouts,
            temperature=heldout.temperature,
            completion_tokens_mean=scores.num_tokens / max(scores.num_rollouts, 1),
            truncated_share=scores.num_truncated / max(scores.num_rollouts, 1),
            means=scores.means(names),
            pass_at={str(k): value for k, value in passes.items()},
        )
    return EvaluationResult(
        due=evaluation.due,
        version=evaluation.due if evaluation.version is None else evaluation.version,
        seconds=evaluation.seconds,
        sets=sets,
    )


def _books(coordinator: Coordinator, buffer: ReplayBuffer) -> Books:
    groups = buffer.counts
    return Books(
        leases={
            purpose: LeaseBooks(
                leased=leases.leased,
                received=leases.received,
                failed=dict(leases.failed),
                outstanding=leases.outstanding,
                balanced=leases.balanced,
            )
            for purpose, leases in coordinator.leases.counts.items()
        },
        groups=GroupBooks(
            accepted=groups.accepted,
            trained=groups.trained,
            evicted=dict(groups.evicted),
            evicted_tokens=dict(groups.evicted_tokens),
            buffered=groups.buffered,
            balanced=groups.balanced,
        ),
    )


def _last_step(metrics: Mapping[str, float]) -> StepStatus:
    return StepStatus(
        mean_length=metrics["completions/mean_length"],
        min_length=metrics["completions/min_length"],
        max_length=metrics["completions/max_length"],
        clipped_ratio=metrics["completions/clipped_ratio"],
        frac_reward_zero_std=metrics["frac_reward_zero_std"],
        entropy=metrics.get("entropy"),
        learning_rate=metrics["learning_rate"],
    )


def _evaluating(evaluation: Evaluation | None) -> EvaluatingStatus | None:
    if evaluation is None:
        return None
    return EvaluatingStatus(
        version=-1 if evaluation.version is None else evaluation.version,
        prompts_done=evaluation.num_prompts - evaluation.num_missing,
        prompts=evaluation.num_prompts,
    )


def _last_evaluation(evaluations: Sequence[EvaluationResult]) -> EvaluationStatus | None:
    if not evaluations:
        return None
    last = evaluations[-1]
    return EvaluationStatus(
        version=last.version,
        seconds=last.seconds,
        sets={name: found.figures for name, found in last.sets.items()},
    )


def _actor(actor: ActorState, throughput: Throughput) -> ActorStatus:
    idle, stalled = throughput.shares(actor.session) or (None, None)
    return ActorStatus(
        number=actor.number,
        host=actor.hello.host,
        pid=actor.hello.pid,
        version=actor.version,
        route=actor.route,
        evaluates=actor.evaluates,
        leases=actor.num_leases,
        groups=actor.groups,
        check=actor.check,
        check_difference=actor.check_difference,
        difference_mean=actor.difference_mean,
        difference_largest=actor.difference_largest,
        idle_share=idle,
        stalled_share=stalled,
        # By the coordinator's clock.
        silent_s=max(0.0, time.monotonic() - actor.last_heard),
    )


def _push(report: PushReport) -> PushStatus:
    return PushStatus(
        version=report.version,
        epoch=report.epoch,
        routes=dict(report.routes),
        seconds=report.seconds,
        phases=dict(report.phases),
        # JSON's keys are words.
        evicted={str(actor): cause for actor, cause in report.evicted.items()},
        behind=list(report.behind),
    )


def _largest(values: Iterable[float | None]) -> float | None:
    return max((value for value in values if value is not None), default=None)


def _seconds_left(seconds: float, done: int, total: int) -> float | None:
    """Time left at the mean pace so far; None while there is none."""
    return seconds / done * (total - done) if done and seconds > 0 else None
