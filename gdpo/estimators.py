"""The group step of every estimator, and the registry that names them.

Shapes: P prompts, G rollouts of one prompt (a group), K rewards. Everything is float64.

An estimator turns `GroupedRewards` into contributions [P, G, K] and their sum over K [P, G], the
advantage of a rollout within its group. The sums of a group always add up to 0 over its rollouts.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# Contributions that add up to less than this share of their size cancelled, but for rounding.
CANCELLED_SHARE = 1e-6


@dataclass(frozen=True)
class GroupedRewards:
    """Rewards made ready for an estimator, with the statistics of each group's columns."""

    reward_PGK: Tensor
    """The reward as given, in its own dtype; NaN where it is missing."""
    deviation_PGK: Tensor
    """Reward minus its mean over the group's valid values; 0 where it is missing."""
    inverse_std_PK: Tensor
    """1 / sample standard deviation (ddof = 1) of the valid values; 0 where the column is dead."""
    live_PK: Tensor
    """Whether the reward varies in the group."""
    present_PG: Tensor
    """Whether the rollout has any reward at all; a padding rollout has none."""


GroupStep = Callable[[GroupedRewards, Tensor, float], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Estimator:
    """A group step, and whether the batch step (eq. 6) follows it."""

    group_step: GroupStep
    batch_step: bool


def group_rewards(rewards_PGK: Tensor, min_std_K: Tensor) -> GroupedRewards:
    """Compute each group's column statistics over the valid (not NaN) rewards.

    A column is live where it has two valid values, std > min_std, and std above one rounding step
    of the rewards' dtype: a smaller spread is arithmetic noise, not a signal.
    """
    rounding_step = torch.finfo(rewards_PGK.dtype).eps
    valid_PGK = (~rewards_PGK.isnan()).to(torch.float64)
    count_PK = valid_PGK.sum(dim=1)

    # Measured from the column's largest value, equal rewards are exactly 0 apart. Measured from
    # their mean they would not be: the mean of three times 0.1 is not 0.1.
    top_PK = rewards_PGK.nan_to_num(nan=-torch.inf).amax(dim=1).to(torch.float64)
    top_PK = top_PK.masked_fill(count_PK == 0, 0.0)
    deviation_PGK = rewards_PGK.to(torch.float64, copy=True)
    deviation_PGK.sub_(top_PK[:, None]).nan_to_num_(nan=0.0)
    mean_below_top_PK = deviation_PGK.sum(dim=1) / count_PK.clamp(min=1)
    deviation_PGK.sub_(mean_below_top_PK[:, None]).mul_(valid_PGK)

    std_PK = (deviation_PGK.square().sum(dim=1) / (count_PK - 1).clamp(min=1)).sqrt()
    noise_PK = rounding_step * (top_PK + mean_below_top_PK).abs()
    live_PK = (count_PK >= 2) & (std_PK > noise_PK) & (std_PK > min_std_K)
    return GroupedRewards(
        reward_PGK=rewards_PGK,
        deviation_PGK=deviation_PGK,
        inverse_std_PK=torch.where(live_PK, 1 / std_PK, 0.0),
        live_PK=live_PK,
        present_PG=valid_PGK.amax(dim=-1) > 0,
    )


def normalise_each_reward(
    groups: GroupedRewards, weights_K: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Normalise every reward within its group, then add them up.

        A_k = (r_k - mean_G r_k) / (std_G r_k + eps);  A_sum = sum_k w_k A_k

    Source: GDPO, arXiv 2601.05242, eq. 4 and 7. The weights multiply the normalised advantages.
    A missing reward is left out of its column's mean and std and contributes 0.
    """
    # Cancelling is judged without eps, which scales rewards of different std differently and
    # would leave a residue of about eps/std for the batch step to blow up.
    contribution_PGK = groups.deviation_PGK * (weights_K * groups.inverse_std_PK)[:, None]
    cancelled_P = _cancels(contribution_PGK, _sum(contribution_PGK))
    # x / (std + eps) = (x / std) / (1 + eps / std)
    contribution_PGK.div_((1 + eps * groups.inverse_std_PK)[:, None])
    return contribution_PGK, _sum(contribution_PGK).masked_fill_(cancelled_P[:, None], 0.0)


def normalise_summed_reward(
    groups: GroupedRewards, weights_K: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Add up the rewards, then normalise the sum within its group (GRPO).

        r = sum_k w_k r_k;  A = (r - mean_G r) / (std_G r + eps)

    Source: GRPO, arXiv 2402.03300, section 4.1.2. Contributions share the one denominator.
    """
    contribution_PGK, group_sum_PG = centre_summed_reward(groups, weights_K, eps)
    count_P = groups.present_PG.sum(dim=1)
    std_P = (group_sum_PG.square().sum(dim=1) / (count_P - 1).clamp(min=1)).sqrt()
    # Nothing to divide by, so that the cancelling contributions have no scale either.
    scale_P = torch.where(std_P > 0, 1 / (std_P + eps), 0.0)
    return contribution_PGK.mul_(scale_P[:, None, None]), group_sum_PG.mul_(scale_P[:, None])


def centre_summed_reward(
    groups: GroupedRewards, weights_K: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Add up the rewards and subtract the group's mean, without a std (eps is not used).

        r = sum_k w_k r_k;  A = r - mean_G r

    Source: "GRPO without std" (Dr. GRPO, arXiv 2503.20783). With missing rewards:

    1. r sums over the rewards that apply, so within a live column a missing reward counts as 0.
    2. A rollout with no reward at all is left out of the mean and gets 0.
    3. A dead column is left out of the sum. For complete groups that changes nothing; otherwise
       it keeps the pattern of what is missing from becoming an advantage.
    """
    value_PGK = groups.reward_PGK.nan_to_num(nan=0.0).to(torch.float64)
    count_P1 = groups.present_PG.sum(dim=1, keepdim=True).clamp(min=1)
    centred_PGK = value_PGK.sub_(value_PGK.sum(dim=1, keepdim=True) / count_P1[..., None])
    contribution_PGK = centred_PGK.mul_((weights_K * groups.live_PK)[:, None])
    contribution_PGK.mul_(groups.present_PG.to(torch.float64)[..., None])
    sum_PG = _sum(contribution_PGK)
    cancelled_P = _cancels(contribution_PGK, sum_PG)
    return contribution_PGK, sum_PG.masked_fill_(cancelled_P[:, None], 0.0)


def _cancels(contribution_PGK: Tensor, sum_PG: Tensor) -> Tensor:
    """Groups [P] in which the rewards' contributions cancel in every rollout."""
    return (sum_PG.abs() <= CANCELLED_SHARE * _sum(contribution_PGK.abs())).all(dim=1)


def _sum(contribution_PGK: Tensor) -> Tensor:
    # The product with ones takes half the time of sum(dim=-1) over so short a dimension.
    return contribution_PGK @ contribution_PGK.new_ones(contribution_PGK.shape[-1])


ESTIMATORS: dict[str, Estimator] = {
    "gdpo": Estimator(normalise_each_reward, batch_step=True),
    "grpo": Estimator(normalise_summed_reward, batch_step=False),
    "grpo_no_std": Estimator(centre_summed_reward, batch_step=False),
    "grpo_batch_norm": Estimator(normalise_summed_reward, batch_step=True),
}
"""Every estimator by the name that a configuration uses."""
