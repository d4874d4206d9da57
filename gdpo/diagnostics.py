"""What the rewards of a training batch look like, and what each does to the advantages.

Shapes: P prompts, G rollouts of one prompt (a group), K rewards, N = P * G rollouts.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from gdpo.advantages import Advantages


def reward_diagnostics(
    rewards_PGK: Tensor, advantages: Advantages, names: Sequence[str]
) -> dict[str, float]:
    """Describe a batch's rewards as plain finite numbers, ready to be logged.

        reward/<name>/mean, std            over the rollouts it applies to; std is the sample std
        reward/<name>/live_share           share of groups in which it varies
        reward/<name>/advantage_share      mean |A_k| / sum_k mean |A_k|, A_k weighted, before eq. 6
        reward_correlation/<a>/<b>         Pearson's r, a before b in `names`, over the rollouts to
                                           which both apply; 0 where it is undefined
        groups/dead                        number of groups in which no reward varies
        groups/collapsed                   number of groups in which a reward varies, but every
                                           A_sum is 0: the rewards cancel each other

    Whatever cannot be computed (a mean of nothing) is 0. A group of nothing but padding is dead;
    one in which only rewards of weight 0 vary counts as collapsed.

    Raises ValueError where `rewards_PGK`, `advantages` and `names` disagree about their sizes.
    """
    _check(rewards_PGK, advantages, names)
    columns = rewards_PGK.detach().to("cpu", torch.float64).flatten(0, 1).unbind(dim=-1)
    contribution_K = advantages.per_reward.to("cpu", torch.float64).abs().flatten(0, 1).sum(dim=0)
    live_PK = advantages.live.cpu()

    result: dict[str, float] = {}
    for k, (name, column_N) in enumerate(zip(names, columns, strict=True)):
        valid_n = column_N[~column_N.isnan()]
        result[f"reward/{name}/mean"] = float(valid_n.mean()) if len(valid_n) else 0.0
        result[f"reward/{name}/std"] = float(valid_n.std()) if _varies(valid_n) else 0.0
        result[f"reward/{name}/live_share"] = _ratio(live_PK[:, k].sum(), len(live_PK))
        result[f"reward/{name}/advantage_share"] = _ratio(contribution_K[k], contribution_K.sum())
    for a, name_a in enumerate(names):
        for b in range(a + 1, len(names)):
            result[f"reward_correlation/{name_a}/{names[b]}"] = _correlation(columns[a], columns[b])

    has_live_P = live_PK.any(dim=-1)
    silent_P = (advantages.group_sum.cpu() == 0).all(dim=-1)
    result["groups/dead"] = float((~has_live_P).sum())
    result["groups/collapsed"] = float((has_live_P & silent_P).sum())
    return result


def _correlation(a_N: Tensor, b_N: Tensor) -> float:
    """Pearson's r over the pairs without NaN.

    sum (a - mean a)(b - mean b) / (|a - mean a| |b - mean b|)
    """
    both_N = ~(a_N.isnan() | b_N.isnan())
    a_n, b_n = a_N[both_N], b_N[both_N]
    if not (_varies(a_n) and _varies(b_n)):
        return 0.0
    a_n, b_n = a_n - a_n.mean(), b_n - b_n.mean()
    # Each to unit length before they meet: the product of two tiny lengths underflows.
    cosine = (a_n / a_n.norm()) @ (b_n / b_n.norm())
    return float(cosine.clamp(-1.0, 1.0))


def _varies(values_n: Tensor) -> bool:
    return len(values_n) >= 2 and bool(values_n.amax() > values_n.amin())


def _ratio(part: Tensor | float, whole: Tensor | float) -> float:
    return float(part) / float(whole) if whole else 0.0


def _check(rewards_PGK: Tensor, advantages: Advantages, names: Sequence[str]) -> None:
    if rewards_PGK.shape != advantages.per_reward.shape:
        raise ValueError(
            f"rewards has shape {tuple(rewards_PGK.shape)}, advantages were computed from "
            f"{tuple(advantages.per_reward.shape)}: pass the rewards they came from"
        )
    num_rewards = rewards_PGK.shape[-1]
    if len(names) != num_rewards or len(set(names)) != num_rewards:
        raise ValueError(
            f"names is {list(names)}: give {num_rewards} different names, one for each reward"
        )
