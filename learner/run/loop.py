"""The training loop: batches in, versions out, on the main thread."""

import logging
import time
from functools import partial

from learner.replay.buffer import LackSignal, TrainingBatch
from learner.run.evaluations import Evaluations
from learner.run.metrics import StepMetrics
from learner.run.parts import Parts
from learner.run.progress import STOP_CHECK_S
from learner.run.reports import step_report
from learner.run.saving import checkpoint
from learner.run.trainer_threads import automatic_threads, busy_cores
from learner.training.signal import lack_signal
from learner.training.trainer import StepResult
from learner.weights.publisher import Publisher
from protocol.errors import TrainingError

log = logging.getLogger("learner")


class TrainingLoop:
    """Trains until all steps are done or the run is to stop."""

    def __init__(self, parts: Parts, publisher: Publisher, evaluations: Evaluations) -> None:
        self._parts = parts
        self._publisher = publisher
        self._evaluations = evaluations
        self._metrics = StepMetrics(parts.registry)
        self._threads = automatic_threads(parts)
        self._began_at = 0.0
        """When training would have begun without any interruption."""

    def run(self) -> None:
        """Train; raises what made it impossible to continue, a `TrainingError` above all."""
        parts = self._parts
        self._open()
        while (batch := self._next_batch()) is not None:
            started, version = time.monotonic(), parts.trainer.version + 1
            # In this order: a command for the batch after it is in the journal behind it.
            parts.history.begin(version, batch)
            setting = parts.rewards.begin(version)
            step = parts.trainer.step(batch.groups, setting)
            speed = step.num_tokens / (time.monotonic() - started)
            # Nobody may see a version that a resumed run would not make again.
            parts.history.wait()
            parts.coordinator.advance(version)
            if parts.pacing.is_pushed(version):
                self._publish()
            self._evaluations.step_done(version)
            self._record(step, batch, started)
            if self._threads is not None:
                holds_up = parts.throughput.rates.bottleneck == "learner"
                self._threads.follow(speed, busy_cores(parts), holds_up=holds_up)
            if parts.history.is_due(version):
                checkpoint(parts)
            self._pause()
        self._close()

    def _open(self) -> None:
        self._parts.progress.phase = "training"
        self._began_at = time.monotonic() - self._parts.progress.training_seconds
        self._parts.throughput.restart()
        self._parts.coordinator.open_training()
        self._evaluations.resume()

    def _next_batch(self) -> TrainingBatch | None:
        """Wait for a batch; None if there is no step left or the run is to stop."""
        parts = self._parts
        if parts.trainer.version >= parts.config.training.steps:
            return None
        patience = _Patience(parts)
        parts.coordinator.batch_wanted()
        with parts.throughput.waiting():
            while not parts.progress.interrupted:
                parts.coordinator.raise_if_failed()
                patience.check()
                parts.heartbeat.beat()
                self._evaluations.look()
                batch = self._take()
                if batch is not None:
                    parts.coordinator.batch_taken(batch.num_refilled)
                    return batch
                self._check_refills()
        return None

    def _take(self) -> TrainingBatch | None:
        """A batch, if enough groups come in within a moment."""
        parts, config = self._parts, self._parts.config.training
        batch = parts.buffer.take(
            config.batch_groups,
            parts.trainer.version,
            STOP_CHECK_S,
            batches_after=config.steps - parts.trainer.version - 1,
            lack_signal=self._lack_signal(),
        )
        # Room in the buffer.
        parts.coordinator.make_room()
        return batch

    def _lack_signal(self) -> LackSignal | None:
        """What tells the groups that are to be refilled; None where all are trained on.

        A command that comes while a batch is being cut counts in its step, but did not choose its
        groups.
        """
        parts, algorithm = self._parts, self._parts.config.algorithm
        if algorithm.no_signal == "keep":
            return None
        setting = parts.rewards.upcoming(parts.trainer.version + 1)
        return partial(lack_signal, setting=setting, algorithm=algorithm)

    def _check_refills(self) -> None:
        """Raise `TrainingError` if a batch costs too many groups without signal."""
        config, refilled = self._parts.config, self._parts.buffer.num_refilled
        if refilled > config.algorithm.max_refills * config.training.batch_groups:
            raise TrainingError(
                f"step {self._parts.trainer.version + 1}: {refilled} groups without signal, more "
                f"than algorithm.max_refills = {config.algorithm.max_refills} batches of them: "
                "look for rewards that do not vary, prompts that are too easy or too hard, or set "
                'algorithm.no_signal = "keep"'
            )

    def _publish(self) -> None:
        """Give the weights to the publisher; training waits for the copy, not for a push."""
        started = time.monotonic()
        snapshot = self._parts.packed()
        self._publisher.publish(snapshot, time.monotonic() - started)

    def _record(self, step: StepResult, batch: TrainingBatch, started: float) -> None:
        """Record a step that began at ``started``, everywhere."""
        parts, seconds = self._parts, time.monotonic() - started
        parts.progress.training_seconds = time.monotonic() - self._began_at
        parts.note(step, batch)
        parts.throughput.sample()
        self._metrics.step(step, seconds)
        parts.folder.append_step(step_report(parts, step, batch, seconds))
        if batch.num_refilled > len(batch.groups):
            log.info(
                "step %d: %d groups without signal were refilled, for %d that have one",
                step.version,
                batch.num_refilled,
                len(batch.groups),
            )

    def _pause(self) -> None:
        """Be as slow as ``training.pause_per_step_s`` asks for."""
        parts = self._parts
        deadline = time.monotonic() + parts.config.training.pause_per_step_s
        while not parts.progress.interrupted and (left := deadline - time.monotonic()) > 0:
            time.sleep(min(left, STOP_CHECK_S))

    def _close(self) -> None:
        self._parts.progress.training_seconds = time.monotonic() - self._began_at
        self._parts.coordinator.close_training()


class _Patience:
    """Ends a run in which actors are connected and no group comes in."""

    def __init__(self, parts: Parts) -> None:
        deadlines = parts.config.deadlines
        self._parts = parts
        self._timeout_s, self._wait_s = deadlines.lease_timeout_s, deadlines.wait_for_actors_s
        self._accepted = parts.buffer.counts.accepted
        self._since = time.monotonic()

    def check(self) -> None:
        """Raise `TrainingError` if the last group came too long ago, or the last token."""
        now, coordinator = time.monotonic(), self._parts.coordinator
        evaluating = self._parts.progress.evaluating
        # A single actor may have no room for anything else until `eval.timeout_s`.
        evaluates = evaluating is not None and evaluating.is_under_way
        if evaluates or self._parts.buffer.counts.accepted > self._accepted:
            self._since, self._accepted = now, self._parts.buffer.counts.accepted
        idle_s = now - max(self._since, coordinator.progressed_at)
        limit_s = coordinator.lease_limit_s + self._wait_s
        if idle_s > self._timeout_s + self._wait_s or now - self._since > limit_s:
            raise TrainingError(
                f"no group came in for {now - self._since:.0f} s, though "
                f"{coordinator.num_live} actors are connected; look into their logs"
            )
