"""Checkpoints of a run: when one is begun, what it holds, and which one the run ends with."""

import time

from learner.run.parts import Parts
from learner.state import RunState


class Saver:
    """Makes the checkpoints; `learner.recovery.checkpoints` writes them."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts

    def begin(self) -> None:
        """Begin a checkpoint: training waits for the copy, not for the disk."""
        started = time.monotonic()
        self._parts.history.checkpoints.begin(
            run_state(self._parts), self._parts.trainer.state_tensors()
        )
        self._parts.phases.checkpoint(time.monotonic() - started)

    def finish(self) -> None:
        """Write the checkpoint of the last step; none if there is no step, or half of one.

        Raises `TrainingError` if it cannot be written.
        """
        history, trainer = self._parts.history, self._parts.trainer
        checkpoints, version = history.checkpoints, trainer.version
        try:
            checkpoints.finish()
            if version and not trainer.in_step and version not in checkpoints.versions:
                # With a checkpoint of a batch that is not in the journal, a resumed run would train
                # on its groups again.
                history.wait()
                self.begin()
                checkpoints.finish()
        finally:
            if versions := checkpoints.versions:
                self._parts.folder.show_checkpoint(checkpoints.path(versions[-1]) / "model")


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
