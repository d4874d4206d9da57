"""Where a run continues: what a checkpoint and its journal make of a learner's parts.

`Resumed` does it for a learner, `replay` for whoever wants to know whether it comes out the same.
"""

import logging
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from learner.config.run import RunConfig
from learner.prompts.stream import PromptStream
from learner.prompts.work_queue import WorkQueue, group_limits
from learner.recovery.checkpoints import Checkpoint, load_tensors, oldest
from learner.replay.buffer import ReplayBuffer, TrainingBatch
from learner.replay.journal_reader import JournalReader, RecordedBatch
from learner.run_folder import RunFolder
from learner.state import OpenPrompts, RunState
from learner.training.policy import Policy, load_model, load_policy
from learner.training.ranks import ALONE, Ranks
from learner.training.reward_settings import RewardSchedule, RewardSetting
from learner.training.trainer import StepResult, Trainer
from protocol.errors import BadMessage, ConfigError
from protocol.groups import Group, GroupLimits
from protocol.leases import LeaseBook, LeaseCounts

log = logging.getLogger("learner")


@dataclass(slots=True)
class Resumed:
    """The place where a run continues; call `replay` first."""

    config: RunConfig
    checkpoint: Checkpoint | None
    journal: JournalReader | None
    limits: GroupLimits
    """Limits that the groups in the journal keep to."""

    @property
    def state(self) -> RunState | None:
        """What the checkpoint holds besides tensors; None without one."""
        return self.checkpoint.state if self.checkpoint else None

    @property
    def version(self) -> int:
        """Version of the checkpoint; 0 without one."""
        return self.checkpoint.version if self.checkpoint else 0

    def replay(
        self,
        buffer: ReplayBuffer,
        rewards: RewardSchedule,
        train: Callable[[TrainingBatch, RewardSetting], None],
        finished: Callable[[int, tuple[int, ...]], None] = lambda step, prompt_indices: None,
    ) -> None:
        """Take the journal's batches again and ``train`` on them, then fill the buffer.

        ``finished`` is told the prompt indices of groups that nobody needs after a step. Raises
        `ConfigError` if the journal and the checkpoint do not belong together, or the run is to end
        before the step that it is at.
        """
        batches = self.journal.batches() if self.journal is not None else []
        before = [batch for batch in batches if batch.step <= self.version]
        after = [batch for batch in batches if batch.step > self.version]
        self._check_steps(after)
        if self.state is not None:
            buffer.restore(self.state.groups)
            rewards.restore(self.state.rewards, self.version)
        if self.journal is None:
            if self.state is not None:
                buffer.lose(self.state.groups)
            return
        uses = Counter(prompt_index for batch in before for prompt_index in batch.prompt_indices)
        ended = self._ended(before, uses)
        finished(self.version, tuple(ended))
        alive = dict.fromkeys(p for p in self.journal.prompt_indices() if p not in ended)

        def fetch(prompt_indices: Iterable[int]) -> None:
            """Load groups into memory, only when their turn comes."""
            for prompt_index in prompt_indices:
                if prompt_index in alive:
                    del alive[prompt_index]
                    buffer.put_back(self._group(prompt_index), prompt_index, uses[prompt_index])

        commands = deque(self.journal.commands())

        def command_up_to(step: int) -> None:
            while commands and commands[0].from_step <= step:
                command = commands.popleft()
                if command.number > rewards.num_commands:
                    rewards.command(command.updates)

        for batch in after:
            log.info("training on the batch of step %d again, from the journal", batch.step)
            fetch((*batch.prompt_indices, *(prompt_index for prompt_index, _ in batch.evicted)))
            command_up_to(batch.step)
            setting = rewards.begin(batch.step)
            again = self._retake(buffer, batch)
            finished(batch.step, again.finished)
            train(again, setting)
            buffer.step_done()
        command_up_to(self.config.training.steps)
        fetch(list(alive))

    def restore_work(
        self, stream: PromptStream, work: WorkQueue, leases: LeaseBook, buffer: ReplayBuffer
    ) -> None:
        """Lease again what did not come in, continue in the stream, and carry the counts on."""
        prompts = self.state.prompts if self.state else OpenPrompts()
        stored = set(self.journal.prompt_indices()) if self.journal else set()
        # Prompts are leased in order: what is before one that came in was leased too.
        stream.next_prompt_index = max(prompts.next_prompt_index, max(stored, default=-1) + 1)
        since = range(prompts.next_prompt_index, stream.next_prompt_index)
        # What was in the buffer is in the journal, if there is one.
        open_indices = {
            *prompts.leased,
            *prompts.waiting,
            *prompts.buffered,
            *since,
        }
        for prompt_index in sorted(open_indices - stored):
            work.retries.append(stream.work(prompt_index))
        if self.state is not None:
            for purpose, counts in self.state.leases.items():
                arrived = stored.intersection(prompts.leased) if purpose == "train" else ()
                gone = counts.outstanding - len(arrived)
                leases.counts[purpose] = LeaseCounts.after_loss(
                    counts.received, counts.failed, gone
                )
            leases.next_lease = self.state.next_lease
        train = leases.counts["train"]
        train.received = buffer.counts.accepted
        train.leased = train.received + train.failed.total()

    def _check_steps(self, batches: Sequence[RecordedBatch]) -> None:
        """Check that the batches follow the checkpoint, and that the run is to go that far."""
        reached, steps = self.version + len(batches), self.config.training.steps
        if reached > steps:
            raise ConfigError(
                f"training.steps = {steps}, but the run is at step {reached} already; give more"
            )
        if [batch.step for batch in batches] != list(range(self.version + 1, reached + 1)):
            assert self.journal is not None
            raise ConfigError(
                f"{self.journal.path} has no record of the steps after {self.version}: checkpoint "
                "and journal are not of one run"
            )

    def _ended(self, batches: Iterable[RecordedBatch], uses: Mapping[int, int]) -> set[int]:
        """Return the prompt indices of groups that nobody needs after ``batches``."""
        max_uses = self.config.buffer.max_uses
        used_up = {prompt_index for prompt_index, n in uses.items() if n >= max_uses}
        return used_up | {prompt_index for batch in batches for prompt_index, _ in batch.evicted}

    def _retake(self, buffer: ReplayBuffer, batch: RecordedBatch) -> TrainingBatch:
        try:
            return buffer.retake(batch.prompt_indices, batch.evicted, batch.step - 1)
        except KeyError as error:
            raise ConfigError(
                f"a group of step {batch.step} is missing (prompt {error}): checkpoint "
                "and journal are not of one run"
            ) from error

    def _group(self, prompt_index: int) -> Group:
        assert self.journal is not None
        try:
            return self.journal.group(prompt_index, self.limits)
        except BadMessage as error:
            raise ConfigError(
                f"{self.journal.path}, prompt {prompt_index}: {error}; "
                "was the configuration changed?"
            ) from error


def load_trainer(
    config: RunConfig,
    checkpoint: Checkpoint | None,
    on_progress: Callable[[], None] = lambda: None,
    ranks: Ranks = ALONE,
) -> tuple[Policy, Trainer]:
    """Policy and trainer, as the configuration says or as they were at a checkpoint.

    Of several ``ranks``, all call it; those that made the checkpoint may have been another number.
    Raises `ConfigError`.
    """
    policy = load_policy(config, checkpoint.model if checkpoint else None)
    # The KL term is to the model that training began with, not to where it continues.
    first = checkpoint is not None and config.algorithm.kl_coefficient
    reference = load_model(config, policy.folder) if first else None
    trainer = Trainer(policy, config, reference=reference, ranks=ranks, on_progress=on_progress)
    if checkpoint is not None:
        trainer.load_state(checkpoint.version, partial(load_tensors, checkpoint))
        state = checkpoint.state
        trainer.batch_std = state.batch_std
        if state.batch_std_setting is not None:
            trainer.batch_std_setting = RewardSetting.from_json(state.batch_std_setting)
    ranks.meet()
    return policy, trainer


def replay(folder: RunFolder, config: RunConfig, on_step: Callable[[StepResult], None]) -> None:
    """Train again on every batch that the run's journal still holds; nothing is written.

    Raises `ConfigError`.
    """
    journal = JournalReader.open(folder.journal)
    batches = journal.batches()
    # Nothing is deleted before there are two checkpoints.
    from_start = (
        bool(batches)
        and batches[0].step == 1
        and batches[0].prompt_indices[0] in journal.prompt_indices()
    )
    checkpoint = None if from_start else oldest(folder.checkpoints)
    policy, trainer = load_trainer(config, checkpoint)

    def train(batch: TrainingBatch, setting: RewardSetting) -> None:
        on_step(trainer.step(batch.groups, setting))

    Resumed(config, checkpoint, journal, group_limits(config, policy.vocab_size)).replay(
        ReplayBuffer.of(config), RewardSchedule(config.rewards, config.training.steps), train
    )
