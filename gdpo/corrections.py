"""Per-token objectives: how a policy learns from tokens that an older policy sampled.

Shapes: B sequences, T token positions.

    mu       behaviour policy: sampled the token, its log-probability recorded by the actor
    pi_prox  proximal policy: the policy at the start of this training batch
    pi       the policy being updated

    mu ----- w = pi_prox / mu -----> pi_prox ----- r = pi / pi_prox -----> pi
    mu -------------------------- rho = pi / mu -------------------------> pi

A correction turns `Tokens` into an `Objective`, to be maximised. Advantages depend on rewards
only, so every correction goes with every estimator.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# exp(20) = 4.9e8: far beyond any ratio worth learning from, and its square fits in float32.
MAX_LOG_RATIO = 20.0


@dataclass(frozen=True)
class Tokens:
    """Log-probabilities and advantages of a minibatch; every masked position holds 0."""

    policy_BT: Tensor
    """log pi, the only field with a gradient."""
    behaviour_BT: Tensor
    """log mu"""
    proximal_BT: Tensor | None
    """log pi_prox, where the caller has it."""
    advantage_BT: Tensor
    """The sequence's advantage, at each of its tokens."""
    mask_BT: Tensor
    """bool, True where the policy chose the token."""


@dataclass(frozen=True)
class Limits:
    """How far a ratio may go before it stops counting."""

    clip_low: float
    clip_high: float
    weight_cap: float


@dataclass(frozen=True)
class Objective:
    """What a correction makes of each token."""

    value_BT: Tensor
    """The objective, to be maximised."""
    ratio_BT: Tensor
    """The ratio that was clipped, without a gradient."""
    truncated_BT: Tensor
    """bool, True where the importance weight was cut down."""


Correction = Callable[[Tokens, Limits], Objective]


def decoupled_ppo(tokens: Tokens, limits: Limits) -> Objective:
    """Clip against the proximal policy, and weight by how it differs from the behaviour policy.

        min(w, C) * min(r A, clip(r, 1 - e_low, 1 + e_high) A),  no gradient through w

    Source: AReaL, arXiv 2505.24298, its decoupled PPO objective (after Hilton et al., arXiv
    2110.00641), with w truncated at C. Truncated tokens stay in the denominator of the loss.
    """
    ratio_BT = bounded_ratio(tokens.policy_BT, _proximal(tokens, "decoupled_ppo"))
    weight_BT = behaviour_weight(tokens)
    value_BT = weight_BT.clamp(max=limits.weight_cap) * clipped_surrogate(ratio_BT, tokens, limits)
    return Objective(value_BT, ratio_BT.detach(), weight_BT > limits.weight_cap)


def ppo(tokens: Tokens, limits: Limits) -> Objective:
    """Clip against the behaviour policy itself; the proximal policy is not used.

        min(rho A, clip(rho, 1 - e_low, 1 + e_high) A)

    Source: PPO, arXiv 1707.06347, eq. 7, with mu in the place of the old policy.
    """
    ratio_BT = bounded_ratio(tokens.policy_BT, tokens.behaviour_BT)
    value_BT = clipped_surrogate(ratio_BT, tokens, limits)
    return Objective(value_BT, ratio_BT.detach(), torch.zeros_like(tokens.mask_BT))


def none(tokens: Tokens, limits: Limits) -> Objective:
    """Take stale tokens as if the proximal policy had sampled them: the naive baseline.

        min(r A, clip(r, 1 - e_low, 1 + e_high) A)

    Source: PPO, arXiv 1707.06347, eq. 7, with pi_prox as the old policy; mu is ignored.
    """
    ratio_BT = bounded_ratio(tokens.policy_BT, _proximal(tokens, "none"))
    value_BT = clipped_surrogate(ratio_BT, tokens, limits)
    return Objective(value_BT, ratio_BT.detach(), torch.zeros_like(tokens.mask_BT))


def clipped_surrogate(ratio_BT: Tensor, tokens: Tokens, limits: Limits) -> Tensor:
    """min(ratio A, clip(ratio, 1 - e_low, 1 + e_high) A): PPO, arXiv 1707.06347, eq. 7."""
    clipped_BT = ratio_BT.clamp(1 - limits.clip_low, 1 + limits.clip_high)
    return torch.minimum(ratio_BT * tokens.advantage_BT, clipped_BT * tokens.advantage_BT)


def bounded_ratio(numerator_BT: Tensor, denominator_BT: Tensor) -> Tensor:
    """exp(log a - log b), the difference limited to +-20 so that the ratio is never infinite.

    Beyond the limit the ratio has no gradient. A NaN stays NaN: it is an error to be seen.
    """
    return log_ratio(numerator_BT, denominator_BT).exp()


def log_ratio(numerator_BT: Tensor, denominator_BT: Tensor) -> Tensor:
    """log a - log b, limited to +-20."""
    return (numerator_BT - denominator_BT).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def behaviour_weight(tokens: Tokens) -> Tensor:
    """w = pi_prox / mu without a gradient, or pi / mu where no proximal policy was given."""
    policy_BT = tokens.policy_BT if tokens.proximal_BT is None else tokens.proximal_BT
    return bounded_ratio(policy_BT.detach(), tokens.behaviour_BT)


def _proximal(tokens: Tokens, correction: str) -> Tensor:
    if tokens.proximal_BT is None:
        raise ValueError(
            f"correction {correction!r} needs proximal_logprobs: pass the log-probabilities of "
            "the tokens under the policy as it was at the start of this training batch (with "
            "one update per batch, logprobs.detach())"
        )
    return tokens.proximal_BT


CORRECTIONS: dict[str, Correction] = {
    "decoupled_ppo": decoupled_ppo,
    "ppo": ppo,
    "none": none,
}
"""Every correction by the name that a configuration uses."""
