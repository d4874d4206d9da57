"""From the rewards of a training batch to one advantage per rollout.

Shapes: P prompts, G rollouts of one prompt (a group), K rewards.

    rewards_PGK -> conditions -> group step -> group_sum_PG -> batch step -> advantages_PG
                   (raw)         (estimator)                   (eq. 6)
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gdpo.conditions import Condition, apply_conditions
from gdpo.estimators import ESTIMATORS, Estimator, group_rewards

FLOAT32_MAX = torch.finfo(torch.float32).max

# A group step's float64 temporaries then stay in the cache, which takes a third off its time. No
# result depends on the number, because groups meet only in the batch step.
GROUPS_PER_BLOCK = 1024


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


def compute_advantages(
    rewards: Tensor,
    *,
    estimator: str = "gdpo",
    weights: Sequence[float] | Tensor | None = None,
    eps: float = 1e-6,
    min_std: float | Sequence[float] | Tensor = 0.0,
    clamp: float | None = None,
    conditions: Sequence[Condition] | None = None,
    exclude_dead_from_batch_std: bool = False,
) -> Advantages:
    """Compute the advantage of every rollout of a training batch.

        gdpo             A_k = (r_k - mean_G r_k) / (std_G r_k + eps);  A_sum = sum_k w_k A_k;
                         A = (A_sum - mean_batch A_sum) / (std_batch A_sum + eps)
        grpo             r = sum_k w_k r_k;  A = (r - mean_G r) / (std_G r + eps)
        grpo_no_std      A = r - mean_G r
        grpo_batch_norm  grpo, then the batch step of gdpo

    Source: GDPO, arXiv 2601.05242, eq. 4, 7 and 6. Every std is the sample std (ddof = 1). Pass
    the whole training batch, before it is split: the batch step is over sequences, each once.

    Departures from the paper:

    1. A reward that does not vary in a group (fewer than two valid values, std <= `min_std`, or
       a spread within one rounding step of the dtype) is dead there and contributes exactly 0.
    2. A missing reward is neutral; the docstrings in `gdpo.estimators` say how.
    3. The batch mean is not computed: it is 0 because every group's A_sum adds up to 0, and
       subtracting its rounding error would give dead groups an advantage.
    4. A group whose contributions cancel but for rounding has A_sum exactly 0.

    Args:
        rewards: float [P, G, K]. NaN means "does not apply"; a rollout of nothing but NaN is
            padding, for groups of unequal size: it counts nowhere and gets advantage 0.
        estimator: a name in `ESTIMATORS`.
        weights: [K], all 1 by default.
        eps: added to every std.
        min_std: one number, or one per reward; see departure 1.
        clamp: limit on |A|, applied last. None for no limit.
        conditions: the paper's conditioned rewards (eq. 8), applied to the raw rewards.
        exclude_dead_from_batch_std: leave groups without a live reward of non-zero weight out of
            the batch std. They shrink it, which enlarges everybody else's advantage by about
            1 / sqrt(share of live groups).

    Raises ValueError for a wrong shape or dtype, an infinite reward, or a setting out of range.
    """
    _check_rewards(rewards)
    if estimator not in ESTIMATORS:
        raise ValueError(f"unknown estimator {estimator!r}: use one of {', '.join(ESTIMATORS)}")
    if not (math.isfinite(eps) and eps >= 0):
        raise ValueError(f"eps is {eps}: give a finite number of at least 0")
    if clamp is not None and not clamp > 0:
        raise ValueError(f"clamp is {clamp}: give a positive number, or None for no limit")
    weights_K = _per_reward("weights", 1.0 if weights is None else weights, rewards)
    min_std_K = _per_reward("min_std", min_std, rewards)
    if bool((min_std_K < 0).any()):
        raise ValueError(f"min_std is {min_std}: a std is never negative, use 0 to switch it off")

    chosen = ESTIMATORS[estimator]
    with torch.no_grad():
        conditioned_PGK = apply_conditions(rewards, conditions or ())
        blocks = [
            _group_step(block_pGK, chosen, weights_K, min_std_K, eps)
            for block_pGK in torch.split(conditioned_PGK, GROUPS_PER_BLOCK)
        ]
        per_reward_PGK, group_sum_PG, live_PK, present_PG = (
            torch.cat(parts) for parts in zip(*blocks, strict=True)
        )
        advantages_PG = group_sum_PG
        if chosen.batch_step:
            counted_PG = present_PG
            if exclude_dead_from_batch_std:
                trainable_P = (live_PK & (weights_K != 0)).any(dim=-1)
                counted_PG = counted_PG & trainable_P[:, None]
            advantages_PG = _scale_to_unit_batch_std(group_sum_PG, counted_PG, eps)
        if clamp is not None:
            advantages_PG = advantages_PG.clamp(-clamp, clamp)
        return Advantages(
            advantages=_to_float32(advantages_PG),
            group_sum=_to_float32(group_sum_PG),
            per_reward=per_reward_PGK,
            live=live_PK,
        )


def _group_step(
    rewards_PGK: Tensor, estimator: Estimator, weights_K: Tensor, min_std_K: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Everything that a group's own rewards decide: contributions, sums, live, present."""
    groups = group_rewards(rewards_PGK, min_std_K)
    per_reward_PGK, group_sum_PG = estimator.group_step(groups, weights_K, eps)
    return _to_float32(per_reward_PGK), group_sum_PG, groups.live_PK, groups.present_PG


def _scale_to_unit_batch_std(group_sum_PG: Tensor, counted_PG: Tensor, eps: float) -> Tensor:
    """A = A_sum / (std_batch A_sum + eps), over the counted sequences, whose mean is 0 (eq. 6)."""
    degrees_of_freedom = (counted_PG.sum() - 1).clamp(min=1)
    std = (group_sum_PG.square().sum() / degrees_of_freedom).sqrt()
    return group_sum_PG * torch.where(std > 0, 1 / (std + eps), 0.0)


def _to_float32(values: Tensor) -> Tensor:
    # Saturates, because sums of the largest rewards overflow to infinity in float32.
    return values.to(torch.float32).clamp_(-FLOAT32_MAX, FLOAT32_MAX)


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
    # The bound also keeps squares of float64 rewards from overflowing.
    largest = rewards.nan_to_num(nan=0.0, posinf=math.inf, neginf=-math.inf).abs().amax()
    if bool(largest > FLOAT32_MAX):
        raise ValueError(
            "rewards holds an infinite value (or one beyond the range of float32): make the "
            "reward function return a finite number, or None where it does not apply"
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
