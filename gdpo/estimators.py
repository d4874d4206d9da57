"""The group step of every estimator, and the registry that names them.

Shapes: P prompts, G rollouts of one prompt (a group), K rewards; rollouts first, everything
float64: see `gdpo.groups`.

An estimator turns `GroupedRewards` into contributions [G, P, K] and their sum over K [G, P], the
advantage of a rollout within its group. Over the rollouts of a group the sums add up to 0, except
where `gd2po` dropped some of them.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gdpo.groups import GroupedRewards, sum_over_rewards

# Contributions that add up to less than this share of their size cancelled, but for rounding.
CANCELLED_SHARE = 1e-6
# A reward closer to its mean than this many std takes no side.
NEUTRAL_STD = 1e-6

GroupStep = Callable[[GroupedRewards, Tensor, float], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Estimator:
    """A group step, and whether the batch step (eq. 6) follows it."""

    group_step: GroupStep
    batch_step: bool


def normalise_each_reward(
    groups: GroupedRewards, weights_K: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Normalise every reward within its group, then add them up (GDPO).

        A_k = (r_k - mean_G r_k) / (std_G r_k + eps);  A_sum = sum_k w_k A_k

    Source: GDPO, arXiv 2601.05242, eq. 4 and 7. The weights multiply the normalised advantages.
    A missing reward is left out of its column's mean and std and contributes 0.
    """
    return _add_up(groups, weights_K * groups.inverse_std_PK, eps)


def normalise_summed_reward(
    groups: GroupedRewards, weights_K: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Add up the rewards, then normalise the sum within its group (GRPO).

        r = sum_k w_k r_k;  A = (r - mean_G r) / (std_G r + eps)

    Source: GRPO, arXiv 2402.03300, section 4.1.2. Contributions share the one denominator.
    """
    return _to_unit_std(groups, *centre_summed_reward(groups, weights_K, eps), eps)


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
    factor_PK = weights_K * groups.live_PK
    contribution_GPK = groups.deviation_GPK * factor_PK
    if groups.valid_GPK is not None:
        contribution_GPK.add_(_offset_of_missing(groups, groups.valid_GPK).mul_(factor_PK))
    sum_GP = sum_over_rewards(contribution_GPK)
    return contribution_GPK, sum_GP.masked_fill_(_cancels(sum_GP, groups, factor_PK), 0.0)


def _offset_of_missing(groups: GroupedRewards, valid_GPK: Tensor) -> Tensor:
    """What turns deviations from the mean of the valid into those with 0 for the missing.

    The rewards of a column are then deviation + mean * valid, and their mean over the rollouts
    present is mean * count / present.
    """
    share_PK = valid_GPK.sum(dim=0) / groups.present_GP.sum(dim=0)[:, None].clamp(min=1)
    return (valid_GPK - share_PK).mul_(groups.mean_PK).mul_(groups.present_GP[..., None])


def weigh_by_std(groups: GroupedRewards, weights_K: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Normalise every reward within its group, then weigh it by the std that it had (DVAO).

        A = sum_k v_k A_k,  v_k = w_k std_G r_k / sum_l |w_l| std_G r_l,  A_k as in gdpo

    Source: DVAO, arXiv 2605.25604. For complete groups |A| is at most (G - 1) / sqrt(G), so no
    batch step follows. Decided here:

    1. The std is the sample std of the group's valid rewards, the one that A_k is divided by.
    2. The denominator takes |w_l|, so that a negative weight cannot make it vanish.
    3. eps is in A_k only; with every reward dead the advantage is 0.
    """
    total_P1 = (weights_K.abs() * groups.std_PK).sum(dim=-1, keepdim=True)
    inverse_total_P1 = torch.where(total_P1 > 0, 1 / total_P1, 0.0)
    return _add_up(groups, weights_K * groups.live_PK * inverse_total_P1, eps)


def divide_by_correlation(
    groups: GroupedRewards, weights_K: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Normalise and add up as gdpo does, then divide by how much the rewards agree (CorrGRPO).

        A = A_sum / (sqrt(sum_kl w_k w_l C_kl) + eps),  C the correlation of the rewards

    Rewards that say the same then count once, and independent ones add up. Decided here, for want
    of a published definition:

    1. C is that of the group. Over the batch the divisor would be one number for everybody, and
       the estimator would be gdpo but for a constant.
    2. The weights enter the sum, so that scaling them all changes nothing.
    3. A missing value counts as no deviation, and a dead reward has no correlation, not even with
       itself. Then sum_kl w_k w_l C_kl is the sample variance of A_sum, never negative, and |A|
       is at most (G - 1) / sqrt(G); no batch step follows.
    """
    return _to_unit_std(groups, *normalise_each_reward(groups, weights_K, eps), eps)


def drop_conflicts(groups: GroupedRewards, weights_K: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Normalise and add up as gdpo does, but drop rollouts on which rewards disagree (GD2PO).

        A_sum = sum_k w_k A_k  unless  w_k A_k > 0 > w_l A_l for some k, l: then 0

    Source: GD2PO, arXiv 2606.16771, its hard filter. Decided here:

    1. A dropped rollout has advantage 0 and stays in the batch std, as a member of a dead group
       does. The sums of its group no longer add up to 0; they are not centred again, for that
       could turn a rollout praised by every reward into a bad one.
    2. A missing reward takes no side, nor does one within rounding of its group's mean.
    3. The paper's soft filter and its weighting of prompts by the share of rollouts kept are
       left out.
    """
    contribution_GPK, sum_GP = normalise_each_reward(groups, weights_K, eps)
    threshold_PK = torch.maximum(groups.noise_PK, NEUTRAL_STD * groups.std_PK)
    takes_side_GPK = (groups.deviation_GPK.abs() > threshold_PK).to(torch.float64)
    side_GPK = contribution_GPK.sign().mul_(takes_side_GPK)
    # Signs add up to their number, or minus it, only where all are the same.
    agree_GP = sum_over_rewards(side_GPK).abs_() == sum_over_rewards(side_GPK.abs())
    kept_GP = agree_GP.to(torch.float64)
    return contribution_GPK.mul_(kept_GP[..., None]), sum_GP.mul_(kept_GP)


def _add_up(groups: GroupedRewards, factor_PK: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Contributions deviation * factor * std / (std + eps), and their sum."""
    contribution_GPK = groups.deviation_GPK * factor_PK
    # Cancelling is judged without eps, which scales rewards of different std differently and
    # would leave a residue of about eps/std for the batch step to blow up.
    cancelled_P = _cancels(sum_over_rewards(contribution_GPK), groups, factor_PK)
    # x / (std + eps) = (x / std) / (1 + eps / std)
    contribution_GPK.mul_(1 / (1 + eps * groups.inverse_std_PK))
    return contribution_GPK, sum_over_rewards(contribution_GPK).masked_fill_(cancelled_P, 0.0)


def _to_unit_std(
    groups: GroupedRewards, contribution_GPK: Tensor, sum_GP: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Divide contributions and sums by std_G of the sums, plus eps."""
    count_P = groups.present_GP.sum(dim=0)
    std_P = (sum_GP.square().sum(dim=0) / (count_P - 1).clamp(min=1)).sqrt()
    # Nothing to divide by, so that the cancelling contributions have no scale either.
    scale_P = torch.where(std_P > 0, 1 / (std_P + eps), 0.0)
    return contribution_GPK.mul_(scale_P[:, None]), sum_GP.mul_(scale_P)


def _cancels(sum_GP: Tensor, groups: GroupedRewards, factor_PK: Tensor) -> Tensor:
    """Groups [P] in which the contributions deviation * factor cancel in every rollout."""
    size_P = (factor_PK.abs() * groups.std_PK).sum(dim=-1)
    return sum_GP.abs().amax(dim=0) <= CANCELLED_SHARE * size_P


ESTIMATORS: dict[str, Estimator] = {
    "gdpo": Estimator(normalise_each_reward, batch_step=True),
    "grpo": Estimator(normalise_summed_reward, batch_step=False),
    "grpo_no_std": Estimator(centre_summed_reward, batch_step=False),
    "grpo_batch_norm": Estimator(normalise_summed_reward, batch_step=True),
    "dvao": Estimator(weigh_by_std, batch_step=False),
    "corr_grpo": Estimator(divide_by_correlation, batch_step=False),
    "gd2po": Estimator(drop_conflicts, batch_step=True),
}
"""Every estimator by the name that a configuration uses."""
