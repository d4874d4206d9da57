"""Training again on what a journal holds, without any actor: does it come out the same?"""

from collections.abc import Callable
from functools import partial

from learner.buffer import Cut, ReplayBuffer
from learner.checkpoints import Checkpoint, load_tensors, oldest
from learner.config import RunConfig
from learner.history import Resumed
from learner.journal_reader import JournalReader
from learner.policy import Policy, load_model, load_policy
from learner.reward_settings import RewardSetting, RewardSettings
from learner.runlog import RunFolder
from learner.trainer import StepResult, Trainer
from learner.work import group_limits


def load_trainer(
    config: RunConfig,
    checkpoint: Checkpoint | None,
    on_progress: Callable[[], None] = lambda: None,
) -> tuple[Policy, Trainer]:
    """Policy and trainer, as the configuration says or as they were at a checkpoint.

    Raises `ConfigError`.
    """
    policy = load_policy(config, checkpoint.model if checkpoint else None)
    # The KL term is to the model that training began with, not to where it goes on.
    first = checkpoint is not None and config.algorithm.kl_coefficient
    reference = load_model(config, policy.folder) if first else None
    trainer = Trainer(policy, config, reference=reference, on_progress=on_progress)
    if checkpoint is not None:
        trainer.load_state(checkpoint.version, partial(load_tensors, checkpoint))
        state = checkpoint.state
        trainer.batch_std = state.batch_std
        if state.batch_std_setting is not None:
            trainer.batch_std_setting = RewardSetting.from_json(state.batch_std_setting)
    return policy, trainer


def replay(folder: RunFolder, config: RunConfig, on_step: Callable[[StepResult], None]) -> None:
    """Train again on every batch that the run's journal still holds; nothing is written.

    Raises `ConfigError`.
    """
    journal = JournalReader.open(folder.journal)
    cuts = journal.cuts()
    # Nothing is deleted before there are two checkpoints.
    from_start = bool(cuts) and cuts[0].step == 1 and cuts[0].tickets[0] in journal.tickets()
    checkpoint = None if from_start else oldest(folder.checkpoints)
    policy, trainer = load_trainer(config, checkpoint)

    def train(cut: Cut, setting: RewardSetting) -> None:
        on_step(trainer.step(cut.groups, setting))

    Resumed(config, checkpoint, journal, group_limits(config, policy.vocab_size)).replay(
        ReplayBuffer.of(config), RewardSettings(config.rewards, config.learner.steps), train
    )
