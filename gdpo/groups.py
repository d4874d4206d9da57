"""The statistics of every group's rewards, which all estimators start from.

Shapes: P prompts, G rollouts of one prompt (a group), K rewards. Everything is float64, because
advantages are differences of nearly equal numbers. The rollouts come first, [G, P, K]: reducing
over the first axis runs along memory, which makes an estimator three times as fast.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

FLOAT32_MAX = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class GroupedRewards:
    """Rewards made ready for an estimator, with the statistics of each group's columns."""

    deviation_GPK: Tensor
    """Reward minus its mean over the group's valid values; 0 where it is missing."""
    mean_PK: Tensor
    """That mean; 0 where nothing is valid."""
    std_PK: Tensor
    """Sample standard deviation (ddof = 1) of the valid values; 0 where the column is dead."""
    inverse_std_PK: Tensor
    """1 / std; 0 where the column is dead."""
    noise_PK: Tensor
    """One rounding step of the column's mean: smaller differences are not a signal."""
    live_PK: Tensor
    """bool, whether the reward varies in the group."""
    valid_GPK: Tensor | None
    """1 where there is a reward, 0 where it is missing; None if none is missing."""
    present_GP: Tensor
    """1 where the rollout has any reward at all; 0 for a padding rollout."""


def group_rewards(rewards_PGK: Tensor, min_std_K: Tensor) -> GroupedRewards:
    """Compute each group's column statistics over the valid (not NaN) rewards.

    A column is live where it has two valid values, std > min_std, and std above one rounding step
    of the rewards' dtype: a smaller spread is arithmetic noise, not a signal.

    Raises ValueError for an infinite reward, or one so large that its square could be.
    """
    reward_GPK = rewards_PGK.transpose(0, 1).to(
        torch.float64, copy=True, memory_format=torch.contiguous_format
    )
    present_GP = reward_GPK.new_ones(reward_GPK.shape[:2])
    top_PK = reward_GPK.amax(dim=0)
    count_PK = torch.full_like(top_PK, len(reward_GPK))
    valid_GPK = None
    # The largest value is NaN where any is. Batches without one are worth the shorter way.
    if bool(top_PK.isnan().any()):
        valid_GPK = (~reward_GPK.isnan()).to(torch.float64)
        present_GP = sum_over_rewards(valid_GPK).clamp_(max=1)
        count_PK = valid_GPK.sum(dim=0)
        top_PK = reward_GPK.nan_to_num(nan=-torch.inf).amax(dim=0)
        top_PK.masked_fill_(count_PK == 0, 0.0)

    # Measured from the column's largest value, equal rewards are exactly 0 apart. Measured from
    # their mean they would not be: the mean of three times 0.1 is not 0.1.
    deviation_GPK = reward_GPK.sub_(top_PK)
    if valid_GPK is not None:
        deviation_GPK.nan_to_num_(nan=0.0)
    mean_below_top_PK = deviation_GPK.sum(dim=0) / count_PK.clamp(min=1)
    deviation_GPK.sub_(mean_below_top_PK)
    if valid_GPK is not None:
        deviation_GPK.mul_(valid_GPK)
    mean_PK = top_PK + mean_below_top_PK
    _check_finite(top_PK, mean_below_top_PK)

    sum_of_squares_PK = (deviation_GPK * deviation_GPK).sum(dim=0)
    std_PK = (sum_of_squares_PK / (count_PK - 1).clamp_(min=1)).sqrt_()
    noise_PK = torch.finfo(rewards_PGK.dtype).eps * mean_PK.abs()
    live_PK = (count_PK >= 2) & (std_PK > noise_PK) & (std_PK > min_std_K)
    return GroupedRewards(
        deviation_GPK=deviation_GPK,
        mean_PK=mean_PK,
        std_PK=torch.where(live_PK, std_PK, 0.0),
        inverse_std_PK=torch.where(live_PK, 1 / std_PK, 0.0),
        noise_PK=noise_PK,
        live_PK=live_PK,
        valid_GPK=valid_GPK,
        present_GP=present_GP,
    )


def _check_finite(top_PK: Tensor, mean_below_top_PK: Tensor) -> None:
    # This checks columns, not rewards, which would take as long as the rest. Negative infinity
    # is the mean's distance from the largest value, or has become float64's largest number.
    if bool((top_PK > FLOAT32_MAX).any() | ~(mean_below_top_PK >= -2 * FLOAT32_MAX).all()):
        raise ValueError(
            "rewards holds an infinite value (or one beyond the range of float32): make the "
            "reward function return a finite number, or None where it does not apply"
        )


def sum_over_rewards(values_GPK: Tensor) -> Tensor:
    """Sum over the last axis."""
    # The product with ones takes half the time of sum(dim=-1) over so short a dimension.
    return values_GPK @ values_GPK.new_ones(values_GPK.shape[-1])
