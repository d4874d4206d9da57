"""Conditioned rewards: an easy reward that counts only where a hard one was earned.

Shapes: P prompts, G rollouts of one prompt, K rewards.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RewardCondition:
    """Reward `reward` counts only where reward `on` reached `at_least` (both by index)."""

    reward: int
    on: int
    at_least: float


def apply_conditions(rewards_PGK: Tensor, conditions: Sequence[RewardCondition]) -> Tensor:
    """Condition rewards on other rewards, before anything is normalised.

        r_k <- r_k if r_on >= at_least else 0            (GDPO, arXiv 2601.05242, eq. 8)

    Every condition looks at the raw rewards, so their order does not matter, and a reward with
    several conditions must meet them all. The paper does not say what a missing value means:

    1. A missing r_k stays missing.
    2. Where r_on is missing, nobody knows whether the condition holds, so r_k does not apply
       either: it becomes missing (neutral), not 0 (a penalty). A condition that certainly
       fails decides before one that is unknown.

    Raises ValueError for an index outside 0..K-1 or a threshold that is NaN.
    """
    if not conditions:
        return rewards_PGK
    failed_PGK = torch.zeros_like(rewards_PGK, dtype=torch.bool)
    unknown_PGK = torch.zeros_like(failed_PGK)
    for condition in conditions:
        _check(condition, rewards_PGK.shape[-1])
        gate_PG = rewards_PGK[..., condition.on]
        # Compared in the rewards' own dtype, so that a float32 0.7 reaches the threshold 0.7.
        failed_PGK[..., condition.reward] |= gate_PG < condition.at_least
        unknown_PGK[..., condition.reward] |= gate_PG.isnan()
    missing_PGK = rewards_PGK.isnan() | (unknown_PGK & ~failed_PGK)
    return rewards_PGK.masked_fill(failed_PGK, 0.0).masked_fill(missing_PGK, math.nan)


def _check(condition: RewardCondition, num_rewards: int) -> None:
    for field, index in (("reward", condition.reward), ("on", condition.on)):
        if not 0 <= index < num_rewards:
            raise ValueError(
                f"condition.{field} is {index}, but there are {num_rewards} rewards: "
                f"use an index from 0 to {num_rewards - 1}"
            )
    if math.isnan(condition.at_least):
        raise ValueError("condition.at_least is NaN: give a number")
