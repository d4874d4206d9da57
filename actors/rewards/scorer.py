"""The scores of a group, and what becomes of a reward that fails."""

import logging
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from actors.rewards.pool import RewardFailure, RewardPool
from protocol.config import RewardConfig
from protocol.groups import Floats
from protocol.messages import FinishReason

log = logging.getLogger("actor")


@dataclass(frozen=True, slots=True)
class Scored:
    """The scores of a group."""

    scores: Floats
    """[G, K], NaN = the reward does not apply."""
    missing: dict[str, str]
    """Rewards that failed and count as not applying, by name, with the cause."""


class RewardScorer:
    """Scores groups with the run's reward functions."""

    def __init__(self, rewards: Sequence[RewardConfig], pool: RewardPool) -> None:
        """``pool`` calls the functions of ``rewards``."""
        self._rewards = tuple(rewards)
        self._pool = pool
        self.names = tuple(reward.name for reward in rewards)
        self.failures: Counter[tuple[str, str]] = Counter()
        """Groups that a reward failed on, by reward and kind (`FailureKind`)."""

    async def score(
        self,
        prompt_id: str,
        row: dict[str, Any],
        completions: list[str],
        completion_ids: list[list[int]],
        finish: list[FinishReason],
    ) -> Scored:
        """Score the completions of one data row, by one reward after the other.

        Raises `RewardFailure` for a reward whose ``on_failure`` is not ``missing``.
        """
        scores = np.full((len(completions), len(self._rewards)), math.nan, dtype=np.float32)
        missing = {}
        for k, reward in enumerate(self._rewards):
            try:
                scores[:, k] = await self._pool.call(
                    reward.name, row, completions, completion_ids, finish
                )
            except RewardFailure as failure:
                self.failures[failure.reward, failure.kind] += 1
                if reward.on_failure != "missing":
                    raise
                log.warning("%s: %s; the reward counts as missing", prompt_id, failure)
                missing[reward.name] = str(failure)
        return Scored(scores, missing)
