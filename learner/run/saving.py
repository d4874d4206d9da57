"""Checkpoints of a run: what they hold, and which one the run ends with."""

from learner.run.parts import Parts
from learner.state import RunState
from learner.training.ranks import Order


def checkpoint(parts: Parts) -> None:
    """Begin a checkpoint of the trainer's version.

    Raises `TrainingError` if the one before could not be written.
    """
    parts.completions.write_soon()
    ranks = parts.trainer.ranks
    with parts.history.copying():
        ranks.order(Order.GATHER_STATE)
        with ranks.explained():
            parts.history.checkpoints.begin(run_state(parts), parts.trainer.state_tensors())


def save(parts: Parts) -> None:
    """Write the checkpoint of the last step; none if there is no step, or half of one.

    Raises `TrainingError` if it cannot be written.
    """
    checkpoints, version = parts.history.checkpoints, parts.trainer.version
    try:
        checkpoints.finish()
        if version and not parts.trainer.in_step and version not in checkpoints.versions:
            # With a checkpoint of a batch that is not in the journal, a resumed run would train on
            # its groups again.
            parts.history.wait()
            checkpoint(parts)
            checkpoints.finish()
    finally:
        if versions := checkpoints.versions:
            parts.folder.show_checkpoint(checkpoints.path(versions[-1]) / "model")


def run_state(parts: Parts) -> RunState:
    """What a checkpoint holds besides weights and optimiser, as it is now."""
    prompts, leases = parts.coordinator.state()
    trainer, setting = parts.trainer, parts.trainer.batch_std_setting
    return RunState(
        run_id=parts.folder.run_id,
        version=trainer.version,
        prompts=prompts,
        next_lease=parts.coordinator.leases.next_lease,
        leases=leases,
        groups=parts.buffer.state(),
        rewards=parts.rewards.state(),
        batch_std=trainer.batch_std,
        batch_std_setting=setting.as_json() if setting else None,
        tokens_trained=parts.throughput.tokens_trained,
        tokens_generated=parts.throughput.tokens_generated,
        training_seconds=parts.progress.training_seconds,
        lag0_difference=parts.progress.lag0_difference,
        counters=parts.coordinator.counters.totals(),
    )
