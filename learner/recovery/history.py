"""What lets a run continue after its learner was killed: the journal and the checkpoints.

    training:   batch of step v+1 ──► journal ─┐
                step v+1 ──────────────────────┴─► both done: version v+1 may be published
                every few steps: checkpoint ──► journal loses what the oldest checkpoint has used

    resume:     newest good checkpoint (v) ──► the batches v+1, v+2, ... are trained again, from
                the journal ──► groups of no batch go into the buffer ──► the ports open

The batches that are trained again consist of the same groups in the same order, with the same
weights of the rewards, so they make the same versions (bit for bit where the arithmetic is
deterministic), and what actors sampled from those versions keeps its meaning. Without a journal the
run continues from the checkpoint, and prompts whose groups were lost are leased again.
"""

import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from threading import Lock
from typing import Any

from learner.config.run import RunConfig
from learner.phases import Phases
from learner.recovery.checkpoints import Checkpoints
from learner.replay.buffer import TrainingBatch
from learner.replay.journal import Journal, wait_until_stored
from learner.run_folder import RunFolder
from learner.training.policy import Policy

JOURNAL_TIMEOUT_S = 60.0


class History:
    """Writes the journal and the checkpoints of a run."""

    def __init__(
        self, folder: RunFolder, config: RunConfig, policy: Policy, phases: Phases
    ) -> None:
        """Open what is there, or create it; raises `ConfigError`."""
        self._config = config
        self._phases = phases
        self.journal = (
            Journal(folder.journal, config.buffer.journal_max_bytes)
            if config.buffer.durability == "journal"
            else None
        )
        self.checkpoints = Checkpoints(
            folder.checkpoints, policy, keep=config.checkpoints.keep, on_written=self._prune
        )
        self._last_batch: Future[None] | None = None
        self._lock = Lock()
        self._finished: deque[tuple[int, tuple[int, ...]]] = deque()
        """(step, prompt indices of the groups that nobody needs after it)."""

    def begin(self, step: int, batch: TrainingBatch) -> None:
        """Record a batch that is going to be trained on."""
        self.note_finished(step, batch.finished)
        if self.journal is not None:
            self._last_batch = self.journal.batch(step, batch)

    def note_finished(self, step: int, prompt_indices: tuple[int, ...]) -> None:
        """Note groups that nobody needs after ``step``, by their prompts: they may be deleted."""
        # Without a journal nothing is pruned, and the list would only grow.
        if self.journal is not None:
            with self._lock:
                self._finished.append((step, prompt_indices))

    def wait(self) -> None:
        """Wait until what `begin` was told is on disk; raises `TrainingError` if it cannot be."""
        if self._last_batch is not None:
            wait_until_stored(self._last_batch, JOURNAL_TIMEOUT_S)

    @contextmanager
    def copying(self) -> Iterator[None]:
        """Count how long training waits for a checkpoint: for the copy, not for the disk."""
        started = time.monotonic()
        yield
        self._phases.checkpoint(time.monotonic() - started)

    def record_command(self, from_step: int, updates: Any) -> None:
        """Record a change to the rewards, and wait until it is on disk.

        Raises `TrainingError` if it cannot be.
        """
        assert self.journal is not None
        wait_until_stored(self.journal.command(from_step, updates), JOURNAL_TIMEOUT_S)

    def is_due(self, version: int) -> bool:
        """Whether it is time for a checkpoint.

        One that is still being written is waited for only when the journal is full. Raises
        `TrainingError` if the one before could not be written.
        """
        self.checkpoints.raise_if_failed()
        if self.journal is not None and self.journal.is_full:
            return True
        every = self._config.checkpoints.every_steps
        return version % every == 0 and not self.checkpoints.is_writing

    def close(self) -> None:
        """Write what waits, and end the threads; a checkpoint that has begun is not waited for."""
        self.checkpoints.close()
        if self.journal is not None:
            self.journal.close()

    def _prune(self) -> None:
        """Delete what no kept checkpoint needs, once one is written.

        A single one is no reason to: if it were damaged, everything would be lost.
        """
        versions = self.checkpoints.versions
        if self.journal is None or len(versions) < 2:
            return
        finished: list[int] = []
        with self._lock:
            while self._finished and self._finished[0][0] <= versions[0]:
                finished += self._finished.popleft()[1]
        # A group that may still be used again keeps the record of its first use.
        self.journal.prune(finished, versions[0] - self._config.training.max_staleness - 1)
