"""What a welcome has an actor build: rewards, tokenizer, engine and weights receiver."""

import tempfile
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from transformers import AutoTokenizer

from actors.engines.choice import start_engine
from actors.engines.engine import Engine
from actors.engines.model_files import write_model_files
from actors.link import LearnerLink
from actors.rewards.pool import RewardPool
from actors.rewards.scorer import RewardScorer
from actors.rollouts.single_turn import RolloutWorker
from actors.weights.receiver import WeightsReceiver
from protocol.config import ActorConfig
from protocol.errors import BadMessage, brief
from protocol.messages import Welcome
from protocol.weights import TensorSpec, layout


@dataclass(frozen=True, slots=True)
class Parts:
    """What an actor works with once it has joined."""

    config: ActorConfig
    scorer: RewardScorer
    engine: Engine
    worker: RolloutWorker
    weights: WeightsReceiver


@dataclass(frozen=True, slots=True)
class Builder:
    """Builds the parts, with what the actor brings along."""

    link: LearnerLink
    device: torch.device
    """Device that receives weights by NCCL."""
    allowed_modules: tuple[str, ...]
    folder: Path
    """Reward modules that lie here may be imported too."""
    closing: AsyncExitStack
    """Closes what was built, also when building breaks off."""

    async def build(self, welcome: Welcome, files: list[memoryview]) -> Parts:
        """Build what a welcome asks for, which takes up to minutes.

        Raises `BadMessage` for a welcome that no learner would send, and what the parts raise.
        """
        # Only while they are read, so that a killed actor leaves no copy behind.
        with tempfile.TemporaryDirectory(prefix="gdpo-actor-") as name:
            folder = Path(name)
            write_model_files(folder, welcome.files, files)
            config, specs = _read(welcome)
            scorer = await self._scorer(config)
            tokenizer = _tokenizer(folder)
            engine = await start_engine(folder, config)
        self.closing.push_async_callback(engine.close)
        worker = RolloutWorker(
            engine,
            tokenizer,
            scorer,
            max_prompt_tokens=config.sampling.max_prompt_tokens,
            max_tokens=config.sampling.max_tokens,
        )
        weights = WeightsReceiver(self.link, engine, specs, config.learner_timeout_s, self.device)
        return Parts(config, scorer, engine, worker, weights)

    async def _scorer(self, config: ActorConfig) -> RewardScorer:
        pool = RewardPool(
            config.rewards,
            allowed_modules=self.allowed_modules,
            folder=self.folder,
            timeout_s=config.reward_timeout_s,
            processes=config.reward_processes,
        )
        self.closing.push_async_callback(pool.close)
        await pool.start()
        return RewardScorer(config.rewards, pool)


def _read(welcome: Welcome) -> tuple[ActorConfig, list[TensorSpec]]:
    try:
        config = ActorConfig.model_validate(welcome.actor)
    except ValidationError as error:
        raise BadMessage(f"the welcome's configuration is invalid: {error}") from error
    try:
        return config, layout(welcome.manifest)
    except ValueError as error:
        raise BadMessage(f"the welcome's weights are invalid: {brief(error)}") from error


def _tokenizer(folder: Path) -> Any:
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        # Whatever its parsers raise: the files came from the learner.
        raise BadMessage(f"the welcome brings no tokenizer: {brief(error)}") from error
