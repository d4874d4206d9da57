"""The scores of a group, and what becomes of a reward that fails."""

import logging
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from actors.rewards.pool import RewardFailure, RewardPool
from protocol.config import RewardConfig
from protocol.groups import Floats

log = logging.getLogger("actor")


@dataclass(frozen=True, slots=True)
class Scored:
    """What the rewards say of a group."""

    scores: Floats
    """[G, K], NaN = the reward does not apply."""
    missing: dict[str, str]
    """Rewards that failed and count as not applying, by name, with the cause."""


class RewardScorer:
    """Scores groups with the run's reward functions."""

    def __init__(
        self,
        rewards: Sequence[RewardConfig],
        *,
        allowed_modules: Iterable[str],
        folder: Path,
        timeout_s: float,
        processes: int,
    ) -> None:
        self._rewards = tuple(rewards)
        self._pool = RewardPool(
            rewards,
            allowed_modules=allowed_modules,
            folder=folder,
            timeout_s=timeout_s,
            processes=processes,
        )
        self.names = tuple(reward.name for reward in rewards)
        self.failures: Counter[tuple[str, str]] = Counter()
        """By reward and kind (`FailureKind`), whatever became of the group."""

    async def start(self) -> None:
        """Import the functions; raises `RewardError` with what to change."""
        await self._pool.start()

    async def score(
        self,
        prompt_id: str,
        row: dict[str, Any],
        completions: list[str],
        completion_ids: list[list[int]],
    ) -> Scored:
        """Score the completions of one data row.

        Raises `RewardFailure` for a reward whose ``on_failure`` is not ``missing``.
        """
        scores = np.full((len(completions), len(self._rewards)), math.nan, dtype=np.float32)
        missing = {}
        for k, reward in enumerate(self._rewards):
            try:
                scores[:, k] = await self._pool.call(reward.name, row, completions, completion_ids)
            except RewardFailure as failure:
                self.failures[failure.reward, failure.kind] += 1
                if reward.on_failure != "missing":
                    raise
                log.warning("%s: %s; the reward counts as missing", prompt_id, failure)
                missing[reward.name] = str(failure)
        return Scored(scores, missing)

    async def close(self) -> None:
        """End the reward processes, whatever they are doing."""
        await self._pool.close()
