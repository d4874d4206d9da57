"""What a correction is: limits, and a per-token objective within them.

Shapes: N tokens that the policy chose. mu, pi_prox, pi and their ratios w, r, rho are those of
`gdpo.ratios`. A = advantage. `gdpo.corrections` has the corrections themselves.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import ClassVar

import torch
from torch import Tensor

from gdpo.ratios import Tokens, log_ratio

_RANGES = {
    "clip_low": (0, 1),
    "clip_high": (0, math.inf),
    "weight_floor": (0, math.inf),
    "weight_cap": (0, math.inf),
    "tv_limit": (0, 1),
    "log_ratio_penalty": (0, math.inf),
    "second_moment_limit": (0, math.inf),
}


@dataclass(frozen=True)
class Objective:
    """What a correction makes of each token; all but the value without a gradient."""

    value_N: Tensor
    """The objective, to be maximised."""
    ratio_N: Tensor
    """The ratio that carries the gradient: r or rho."""
    truncated_N: Tensor | None = None
    """bool, True where an importance weight was truncated; None for nowhere, as below."""
    clipped_low_N: Tensor | None = None
    """bool, True where the clip removed the gradient because the ratio was low ..."""
    clipped_high_N: Tensor | None = None
    """... or high."""
    masked_low_N: Tensor | None = None
    """bool, True where a mask removed the token because a ratio was low ..."""
    masked_high_N: Tensor | None = None
    """... or high."""


@dataclass(frozen=True, kw_only=True)
class Correction(ABC):
    """How a policy learns from tokens that an older policy sampled.

    The fields are the correction's limits: how far a token may be off policy before it stops
    counting. A limit that a correction does not have cannot be given.

    Raises ValueError for a limit out of range.
    """

    name: ClassVar[str]
    """The name that a configuration uses."""
    needs_proximal: ClassVar[bool]
    """Whether it takes pi_prox, the policy at the start of the training batch."""
    by_token: ClassVar[bool] = True
    """Whether the gradient of a token depends on the log-probabilities of no other."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value, (low, high) = getattr(self, field.name), _RANGES[field.name]
            if not low <= value <= high:
                raise ValueError(f"{field.name} is {value}: give a number from {low} to {high}")
            if field.name == "weight_cap" and value == 0:
                raise ValueError(f"weight_cap is {value}: give a positive number, or inf")

    @property
    def acts_without_advantage(self) -> bool:
        """Whether tokens of advantage 0 have a gradient, or a part in that of others."""
        return False

    @abstractmethod
    def objective(self, tokens: Tokens) -> Objective:
        """Compute the objective of each token [N], to be maximised."""


@dataclass(frozen=True, kw_only=True)
class ClippedCorrection(Correction):
    """A correction that clips a ratio as PPO does.

    min(ratio A, clip(ratio, 1 - clip_low, 1 + clip_high) A)

    Source: PPO, arXiv 1707.06347, eq. 7.
    """

    clip_low: float = 0.2
    """The clip's lower end is 1 - clip_low."""
    clip_high: float = 0.2
    """The clip's upper end is 1 + clip_high."""

    def _clip(self, ratio_N: Tensor, tokens: Tokens) -> Objective:
        low, high = 1 - self.clip_low, 1 + self.clip_high
        advantage_N = tokens.advantage_N
        clipped_N = ratio_N.clamp(low, high)
        fixed_N = ratio_N.detach()
        return Objective(
            value_N=torch.minimum(ratio_N * advantage_N, clipped_N * advantage_N),
            ratio_N=fixed_N,
            clipped_low_N=(fixed_N < low) & (advantage_N < 0),
            clipped_high_N=(fixed_N > high) & (advantage_N > 0),
        )

    def _clip_to_proximal(self, tokens: Tokens) -> Objective:
        return self._clip(log_ratio(tokens.policy_N, proximal(tokens)).exp(), tokens)


def proximal(tokens: Tokens) -> Tensor:
    """Take log pi_prox [N] where the caller must have given it."""
    assert tokens.proximal_N is not None, "packed_policy_loss checks this"
    return tokens.proximal_N
