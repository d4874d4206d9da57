"""Ratios of policies, from their log-probabilities.

Shapes: B sequences, T token positions.

    mu       behaviour policy: sampled the token, its log-probability recorded by the actor
    pi_prox  proximal policy: the policy at the start of this training batch
    pi       the policy being updated

    mu ----- w = pi_prox / mu -----> pi_prox ----- r = pi / pi_prox -----> pi
    mu -------------------------- rho = pi / mu -------------------------> pi
"""

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


def log_ratio(numerator_BT: Tensor, denominator_BT: Tensor) -> Tensor:
    """Compute log a - log b, limited to +-20 so that its exponential is never infinite.

    Beyond the limit the ratio has no gradient. A NaN stays NaN: it is an error to be seen.
    """
    return (numerator_BT - denominator_BT).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def behaviour_weight(tokens: Tokens) -> Tensor:
    """Compute w = pi_prox / mu without a gradient, or pi / mu where there is no pi_prox."""
    return _log_weight(tokens).exp()


def sequence_weight(tokens: Tokens) -> Tensor:
    """Compute prod_t w_t of each sequence, at each of its tokens; the log of it limited to +-20."""
    log_weight_B1 = (_log_weight(tokens) * tokens.mask_BT).sum(dim=-1, keepdim=True)
    weight_B1 = log_weight_B1.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    return torch.where(tokens.mask_BT, weight_B1, 1.0)


def sequence_ratio(log_ratio_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Compute exp(mean_t log ratio_t) of each sequence, at each of its tokens."""
    count_B1 = mask_BT.sum(dim=-1, keepdim=True).clamp(min=1)
    ratio_B1 = ((log_ratio_BT * mask_BT).sum(dim=-1, keepdim=True) / count_B1).exp()
    return torch.where(mask_BT, ratio_B1, 1.0)


def interpolated_proximal(
    behaviour_logprobs: Tensor, logprobs: Tensor, versions: Tensor, current_version: int
) -> Tensor:
    """Approximate log pi_prox [B, T] by the versions, which saves the forward pass for it.

        log pi_prox = log mu + alpha (log pi - log mu),  alpha = s / (s + 1)

    s is the token's staleness, current_version - version: with mu s versions behind pi_prox, and
    pi on its way to the next version, pi_prox lies at s of s + 1 steps between them.

    Source: A-3PO, arXiv 2512.06547, the log-linear form that AReaL offers; its formula is alpha =
    (v_prox - v_mu) / (v_pi - v_mu) with v_prox = v_pi - 1. In consequence:

    1. r = (pi / mu)^(1 / (s + 1)) is not exactly 1 before the first update of a batch, unless
       pi = mu: pi is taken to be one version beyond pi_prox throughout.
    2. A token sampled from pi_prox itself, s = 0, has w = 1. So has one that claims a version
       of the future, which happens when weights arrive while a token is sampled.

    Args:
        behaviour_logprobs: [B, T], log mu.
        logprobs: [B, T], log pi; no gradient comes back.
        versions: [B, T] or [B, 1], the policy version that sampled each token.
        current_version: the trainer's version at the start of this training batch.

    Raises ValueError for shapes that do not match.
    """
    num_sequences, num_tokens = logprobs.shape
    allowed = ((num_sequences, num_tokens), (num_sequences, 1))
    if behaviour_logprobs.shape != logprobs.shape or versions.shape not in allowed:
        raise ValueError(
            f"logprobs has shape {tuple(logprobs.shape)}, behaviour_logprobs "
            f"{tuple(behaviour_logprobs.shape)}, versions {tuple(versions.shape)}: give one entry "
            "for each token"
        )
    staleness_BT = (current_version - versions).clamp(min=0).to(torch.float32)
    # lerp is exact at its ends, and garbage at masked positions stays where it is.
    return torch.lerp(
        behaviour_logprobs.detach().float(),
        logprobs.detach().float(),
        staleness_BT / (staleness_BT + 1),
    )


def _log_weight(tokens: Tokens) -> Tensor:
    policy_BT = tokens.policy_BT if tokens.proximal_BT is None else tokens.proximal_BT
    return log_ratio(policy_BT.detach(), tokens.behaviour_BT)
