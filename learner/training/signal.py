"""Groups without signal: nothing in them moves the policy.

With `algorithm.no_signal` they are refilled: DAPO's dynamic sampling, arXiv 2503.14476, 3.2. There
it is a group whose accuracy is 0 or 1. Here it is one whose advantages are all 0 by the estimator
that is configured, under what the rewards count: no reward varies, or those that do have weight 0
or cancel each other out. Completions that the loss leaves out do not count.
"""

from collections.abc import Sequence

import numpy as np
import torch

import gdpo
from learner.config.algorithm import AlgorithmConfig
from learner.training.overlong import cut_off, trained_on
from learner.training.reward_settings import RewardSetting
from protocol.groups import Group


def lack_signal(
    groups: Sequence[Group], *, setting: RewardSetting, algorithm: AlgorithmConfig
) -> list[bool]:
    """Tell of each group whether it would move nothing in a step with ``setting``.

    The batch around it changes nothing: its step only scales what is there.
    """
    advantages = gdpo.compute_advantages(
        torch.from_numpy(np.stack([group.scores for group in groups])),
        estimator=algorithm.estimator,
        weights=list(setting.weights.values()),
        eps=algorithm.advantage_eps,
        min_std=algorithm.min_std,
        conditions=setting.conditions,
    )
    counts_PG = trained_on(cut_off(groups), algorithm.overlong)
    moves_P = ((advantages.group_sum != 0) & counts_PG).any(dim=-1)
    return [not moves for moves in moves_P.tolist()]
