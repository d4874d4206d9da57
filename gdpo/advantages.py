"""From the rewards of a training batch to one advantage per rollout.

Shapes: P prompts, G rollouts of one prompt (a group), K rewards.

    rewards_PGK -> conditions -> group step -> group_sum_PG -> batch step -> advantages_PG
                   (raw)         (estimator)                   (eq. 6)

    gdpo             A_k = (r_k - mean_G r_k) / (std_G r_k + eps);  A_sum = sum_k w_k A_k;
                     A = (A_sum - mean_batch A_sum) / (std_batch A_sum + eps)
    grpo             r = sum_k w_k r_k;  A = (r - mean_G r) / (std_G r + eps)
    grpo_no_std      A = r - mean_G r
    grpo_batch_norm  grpo, then the batch step of gdpo
    dvao             A = sum_k w_k std_G(r_k) A_k / sum_l |w_l| std_G(r_l)
    corr_grpo        A = A_sum / (sqrt(sum_kl w_k w_l C_kl) + eps), C the correlations
    gd2po            gdpo, with A_sum = 0 where the A_k of a rollout disagree in sign

Source: GDPO, arXiv 2601.05242, eq. 4, 7 and 6; those of the last three, and what they left open,
are in `gdpo.estimators`. Every std is the sample std (ddof = 1).

Departures from the paper:

1. A reward that does not vary in a group (fewer than two valid values, std <= `min_std`, or a
   spread within one rounding step of the dtype) is dead there and contributes exactly 0.
2. A missing reward is neutral; the docstrings in `gdpo.estimators` say how.
3. The batch mean is not computed: it is 0 because every group's A_sum adds up to 0, and
   subtracting its rounding error would give dead groups an advantage.
4. A group whose contributions cancel but for rounding has A_sum exactly 0.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gdpo.batch import AllReduceSum, alone, batch_std, smoothed_std
from gdpo.conditions import RewardCondition, apply_conditions
from gdpo.estimators import ESTIMATORS, Estimator
from gdpo.groups import FLOAT32_MAX, group_rewards

# A group step's temporaries are then small enough to stay in the cache, and for the allocator to
# use again instead of fetching fresh pages: that halves its time. No result depends on the
# number, because groups meet only in the batch step.
GROUPS_PER_BLOCK = 512


@dataclass(frozen=True)
class Advantages:
    """The result of `compute_advantages`; floats are float32."""

    advantages: Tensor
    """[P, G], after the batch step and the clamp: what the loss takes. 0 for padding."""
    group_sum: Tensor
    """[P, G], before the batch step."""
    per_reward: Tensor
    """[P, G, K], what each reward contributes, weight included: `group_sum` is its sum over K."""
    live: Tensor
    """[P, K] bool, whether the reward varies in the group."""
    batch_std: float | None
    """What the batch step divided by, but for eps: the next batch's `previous_batch_std`. None
    where the estimator has no batch step, or no batch had a signal yet."""


def compute_advantages(
    rewards: Tensor,
    *,
    estimator: str = "gdpo",
    weights: Sequence[float] | Tensor | None = None,
    eps: float = 1e-6,
    min_std: float | Sequence[float] | Tensor = 0.0,
    clamp: float | None = None,
    conditions: Sequence[RewardCondition] | None = None,
    exclude_dead_from_batch_std: bool = False,
    ema_decay: float = 0.0,
    previous_batch_std: float | None = None,
    all_reduce_sum: AllReduceSum = alone,
) -> Advantages:
    """Compute the advantage of every rollout of a training batch.

        A = A_sum / (std_batch A_sum + eps),  A_sum by the estimator, group by group

    The formulae, their sources and the departures are at the top of `gdpo.advantages`. Pass the
    whole batch, before it is split: the batch step is over sequences, each once.

    Args:
        rewards: float [P, G, K]. NaN means "does not apply"; a rollout of nothing but NaN is
            padding, for groups of unequal size: it counts nowhere and gets advantage 0.
        estimator: a name in `gdpo.ESTIMATORS`.
        weights: [K], all 1 by default.
        eps: added to every std.
        min_std: one number, or one per reward: a reward is dead in a group unless its std is above.
        clamp: limit on |A|, applied last. None for no limit.
        conditions: the paper's conditioned rewards (eq. 8), applied to the raw rewards.
        exclude_dead_from_batch_std: leave groups without a live reward of non-zero weight out of
            the batch std. They shrink it, which enlarges everybody else's advantage by about
            1 / sqrt(share of live groups).
        ema_decay: share of the batches before in the batch std, by `gdpo.batch.smoothed_std`.
        previous_batch_std: `Advantages.batch_std` of the batch before; None for the first.
        all_reduce_sum: for a batch spread over ranks, each with some of the prompts: returns
            the sum of its tensor over the ranks (see `gdpo.batch.batch_std`). Every rank must
            make the call, with the same settings.

    Raises ValueError for a wrong shape or dtype, an infinite reward, or a setting out of range.
    """
    _check_rewards(rewards)
    _check_settings(estimator, eps, clamp, ema_decay, previous_batch_std)
    weights_K = _per_reward("weights", 1.0 if weights is None else weights, rewards)
    chosen = ESTIMATORS[estimator]
    with torch.no_grad():
        conditioned_PGK = apply_conditions(rewards, conditions or ())
        groups = _group_step(conditioned_PGK, chosen, weights_K, _min_std(min_std, rewards), eps)
        std = None
        if chosen.batch_step:
            counted_PG = _counted(groups, weights_K, without_dead=exclude_dead_from_batch_std)
            std = batch_std(groups.sum_PG, counted_PG, all_reduce_sum)
            std = smoothed_std(std, previous_batch_std, ema_decay)
        return _advantages(groups, std, eps, clamp)


@dataclass(frozen=True)
class _GroupStep:
    """What the groups' own rewards decide, with the prompts first again."""

    per_reward_PGK: Tensor
    """float32"""
    sum_PG: Tensor
    """float64"""
    live_PK: Tensor
    """bool"""
    present_PG: Tensor
    """float64, 1 or 0"""


def _group_step(
    rewards_PGK: Tensor, estimator: Estimator, weights_K: Tensor, min_std_K: Tensor, eps: float
) -> _GroupStep:
    num_prompts, num_rollouts, num_rewards = rewards_PGK.shape
    result = _GroupStep(
        per_reward_PGK=rewards_PGK.new_empty(rewards_PGK.shape, dtype=torch.float32),
        sum_PG=rewards_PGK.new_empty((num_prompts, num_rollouts), dtype=torch.float64),
        live_PK=rewards_PGK.new_empty((num_prompts, num_rewards), dtype=torch.bool),
        present_PG=rewards_PGK.new_empty((num_prompts, num_rollouts), dtype=torch.float64),
    )
    for start in range(0, num_prompts, GROUPS_PER_BLOCK):
        block = slice(start, start + GROUPS_PER_BLOCK)
        groups = group_rewards(rewards_PGK[block], min_std_K)
        per_reward_GPK, sum_GP = estimator.group_step(groups, weights_K, eps)
        result.per_reward_PGK[block] = per_reward_GPK.transpose(0, 1)
        result.sum_PG[block] = sum_GP.T
        result.live_PK[block] = groups.live_PK
        result.present_PG[block] = groups.present_GP.T
    return result


def _counted(groups: _GroupStep, weights_K: Tensor, *, without_dead: bool) -> Tensor:
    """Whether each rollout [P, G] counts in the batch std, 1 or 0."""
    if not without_dead:
        return groups.present_PG
    trainable_P = (groups.live_PK & (weights_K != 0)).any(dim=-1)
    return groups.present_PG * trainable_P[:, None]


def _advantages(
    groups: _GroupStep, std: float | None, eps: float, clamp: float | None
) -> Advantages:
    """The end of the batch step, and the clamp."""
    advantages_PG = groups.sum_PG if std is None else groups.sum_PG / (std + eps)
    if clamp is not None:
        advantages_PG = advantages_PG.clamp(-clamp, clamp)
    return Advantages(
        advantages=_saturate_(advantages_PG.to(torch.float32)),
        group_sum=_saturate_(groups.sum_PG.to(torch.float32)),
        per_reward=_saturate_(groups.per_reward_PGK),
        live=groups.live_PK,
        batch_std=std,
    )


def _min_std(min_std: float | Sequence[float] | Tensor, rewards: Tensor) -> Tensor:
    min_std_K = _per_reward("min_std", min_std, rewards)
    if bool((min_std_K < 0).any()):
        raise ValueError(f"min_std is {min_std}: a std is never negative, use 0 to switch it off")
    return min_std_K


def _saturate_(values: Tensor) -> Tensor:
    # Sums of the largest rewards overflow to infinity in float32.
    return values.clamp_(-FLOAT32_MAX, FLOAT32_MAX)


def _check_settings(
    estimator: str,
    eps: float,
    clamp: float | None,
    ema_decay: float,
    previous_batch_std: float | None,
) -> None:
    if estimator not in ESTIMATORS:
        raise ValueError(f"unknown estimator {estimator!r}: use one of {', '.join(ESTIMATORS)}")
    if not (math.isfinite(eps) and eps >= 0):
        raise ValueError(f"eps is {eps}: give a finite number of at least 0")
    if clamp is not None and not clamp > 0:
        raise ValueError(f"clamp is {clamp}: give a positive number, or None for no limit")
    if not 0 <= ema_decay < 1:
        raise ValueError(f"ema_decay is {ema_decay}: give a number from 0 to below 1")
    if previous_batch_std is not None and not 0 < previous_batch_std < math.inf:
        raise ValueError(
            f"previous_batch_std is {previous_batch_std}: give the batch_std of the batch before, "
            "or None"
        )


def _check_rewards(rewards: Tensor) -> None:
    if rewards.dim() != 3 or rewards.numel() == 0:
        raise ValueError(
            f"rewards has shape {tuple(rewards.shape)}: give [prompts, rollouts of a prompt, "
            "rewards], with at least one of each"
        )
    if not rewards.dtype.is_floating_point:
        raise ValueError(
            f"rewards is {rewards.dtype}: convert it to float, with NaN for a missing reward"
        )


def _per_reward(name: str, value: float | Sequence[float] | Tensor, rewards: Tensor) -> Tensor:
    """One finite float64 number for each reward, from one for all or one for each."""
    values = torch.as_tensor(value, dtype=torch.float64, device=rewards.device).detach()
    num_rewards = rewards.shape[-1]
    if values.dim() > 1 or (values.dim() == 1 and len(values) != num_rewards):
        raise ValueError(
            f"{name} has shape {tuple(values.shape)}, but there are {num_rewards} rewards: "
            "give one number for each"
        )
    if not bool((values.abs() <= FLOAT32_MAX).all()):
        raise ValueError(f"{name} must be finite numbers within the range of float32")
    return values.expand(num_rewards)
