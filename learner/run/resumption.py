"""How a learner becomes what the one before it in its folder was, when it ended or was killed."""

import logging
import time

from learner.prompts.work_queue import group_limits
from learner.recovery.checkpoints import Checkpoint
from learner.recovery.resume import Resumed
from learner.replay.buffer import TrainingBatch
from learner.run.parts import Parts
from learner.run.reports import step_report
from learner.training.reward_settings import RewardSetting

log = logging.getLogger("learner")


def resume(parts: Parts, checkpoint: Checkpoint | None) -> None:
    """Continue from ``checkpoint``, or else from the start, and train on later batches again.

    Raises `ConfigError` if what was left does not fit together, `TrainingError` if a step fails.
    """
    config, folder, history = parts.config, parts.folder, parts.history
    limits = group_limits(config, parts.policy.vocab_size)
    resumed = Resumed(config, checkpoint, history.journal, limits)
    history.checkpoints.put_aside_after(resumed.version)
    folder.forget_steps_after(resumed.version)
    parts.completions.resume(resumed.version)
    log.info("resuming %s from step %d", folder.path, resumed.version)
    if checkpoint is not None:
        _restore_totals(parts, checkpoint)

    def train_again(batch: TrainingBatch, setting: RewardSetting) -> None:
        started = time.monotonic()
        step = parts.trainer.step(batch.groups, setting)
        parts.progress.training_seconds += time.monotonic() - started
        parts.note(step, batch)
        folder.append_step(step_report(parts, step, batch, time.monotonic() - started))

    resumed.replay(parts.buffer, parts.rewards, train_again, history.note_finished)
    resumed.restore_work(parts.prompts, parts.work, parts.coordinator.leases, parts.buffer)
    # A version that is made of the journal's batches is the one that was evaluated.
    folder.forget_evaluations_after(parts.trainer.version)
    parts.progress.evaluations = folder.read_evaluations()
    parts.coordinator.advance(parts.trainer.version)
    if parts.trainer.version > resumed.version:
        parts.snapshots.publish(parts.packed())
        parts.coordinator.count_as_pushed()


def _restore_totals(parts: Parts, checkpoint: Checkpoint) -> None:
    state = checkpoint.state
    parts.progress.training_seconds = state.training_seconds
    parts.progress.lag0_difference = state.lag0_difference
    parts.throughput.tokens_trained = state.tokens_trained
    parts.throughput.tokens_generated_before = state.tokens_generated
    parts.coordinator.counters.restore(state.counters)
