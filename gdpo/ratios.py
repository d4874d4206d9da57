"""Ratios of policies, from their log-probabilities.

Shapes: N tokens that the policy chose, of B sequences, one after another.

    mu       behaviour policy: sampled the token, its log-probability recorded by the actor
    pi_prox  proximal policy: the policy at the start of this training batch
    pi       the policy being updated

    mu ----- w = pi_prox / mu -----> pi_prox ----- r = pi / pi_prox -----> pi
    mu -------------------------- rho = pi / mu -------------------------> pi
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

# exp(20) = 4.9e8: far beyond any ratio worth learning from, and its square fits in float32.
MAX_LOG_RATIO = 20.0


@dataclass(frozen=True, eq=False)
class Tokens:
    """The tokens of a minibatch that the policy chose: no prompt, no padding, nobody else's.

    Computed in float32 or float64. Raises ValueError for shapes that do not match.
    """

    policy_N: Tensor
    """log pi, the only field with a gradient."""
    behaviour_N: Tensor
    """log mu"""
    advantage_N: Tensor
    """The sequence's advantage, at each of its tokens."""
    sequence_N: Tensor
    """int64: the sequence that the token belongs to, from 0 to num_sequences - 1."""
    num_sequences: int
    """B, sequences without a token included."""
    proximal_N: Tensor | None = None
    """log pi_prox, where the caller has it."""

    def __post_init__(self) -> None:
        for name in ("policy", "behaviour", "advantage", "sequence", "proximal"):
            values = getattr(self, f"{name}_N")
            if values is not None and values.shape != (len(self.policy_N),):
                raise ValueError(
                    f"{name}_N has shape {tuple(values.shape)}, policy_N "
                    f"{tuple(self.policy_N.shape)}: give one entry for each token"
                )

    @cached_property
    def lengths_B(self) -> Tensor:
        """Tokens of each sequence, in the type of `policy_N`."""
        return self.sums(torch.ones_like(self.policy_N, requires_grad=False))

    def sums(self, values_N: Tensor) -> Tensor:
        """Add up values of tokens to those of their sequences, [B]."""
        zeros_B = values_N.new_zeros(self.num_sequences)
        return zeros_B.index_add(0, self.sequence_N, values_N)


def padded_tokens(
    logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    behaviour_logprobs: Tensor,
    proximal_logprobs: Tensor | None = None,
) -> tuple[Tokens, Callable[[str, Tensor], Tensor]]:
    """Take the tokens of the mask out of padded sequences [B, T], advantages [B].

    Also returns how: a function of the name and the values of a further tensor [B, T], which
    checks its shape. What is outside the mask may hold anything, NaN included: it is left out, and
    its gradient is 0.

    Raises ValueError for shapes that do not match.
    """
    if logprobs.dim() != 2 or logprobs.numel() == 0:
        raise ValueError(
            f"logprobs has shape {tuple(logprobs.shape)}: give [sequences, tokens], "
            "with at least one of each"
        )
    if advantages.shape != logprobs.shape[:1]:
        raise ValueError(
            f"advantages has shape {tuple(advantages.shape)}, logprobs {tuple(logprobs.shape)}: "
            "give one advantage for each sequence"
        )
    dtype = torch.promote_types(logprobs.dtype, torch.float32)

    def checked(name: str, values: Tensor) -> Tensor:
        if values.shape != logprobs.shape:
            raise ValueError(
                f"{name} has shape {tuple(values.shape)}, logprobs {tuple(logprobs.shape)}: "
                "give one entry for each token"
            )
        return values

    mask_BT = checked("mask", mask).bool()
    sequence_N = mask_BT.nonzero()[:, 0]

    def chosen(name: str, values: Tensor) -> Tensor:
        return checked(name, values)[mask_BT].to(dtype)

    tokens = Tokens(
        policy_N=chosen("logprobs", logprobs),
        behaviour_N=chosen("behaviour_logprobs", behaviour_logprobs.detach()),
        advantage_N=advantages.detach().to(dtype)[sequence_N],
        sequence_N=sequence_N,
        num_sequences=len(logprobs),
        proximal_N=None
        if proximal_logprobs is None
        else chosen("proximal_logprobs", proximal_logprobs.detach()),
    )
    return tokens, chosen


def log_ratio(numerator_N: Tensor, denominator_N: Tensor) -> Tensor:
    """Compute log a - log b, limited to +-20 so that its exponential is never infinite.

    Beyond the limit the ratio has no gradient. A NaN stays NaN: it is an error to be seen.
    """
    return (numerator_N - denominator_N).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def behaviour_weight(tokens: Tokens) -> Tensor:
    """Compute w = pi_prox / mu without a gradient, or pi / mu where there is no pi_prox."""
    return _log_weight(tokens).exp()


def sequence_weight(tokens: Tokens) -> Tensor:
    """Compute prod_t w_t of each sequence, at each of its tokens; the log of it limited to +-20."""
    log_weight_B = tokens.sums(_log_weight(tokens))
    return log_weight_B.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()[tokens.sequence_N]


def sequence_ratio(log_ratio_N: Tensor, tokens: Tokens) -> Tensor:
    """Compute exp(mean_t log ratio_t) of each sequence, at each of its tokens."""
    mean_B = tokens.sums(log_ratio_N) / tokens.lengths_B.clamp(min=1)
    return mean_B.exp()[tokens.sequence_N]


def interpolated_proximal(
    behaviour_logprobs: Tensor, logprobs: Tensor, versions: Tensor, current_version: int
) -> Tensor:
    """Approximate log pi_prox by the versions, which saves the forward pass for it.

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
        behaviour_logprobs: of any shape, log mu of each token.
        logprobs: of the same shape, log pi; no gradient comes back.
        versions: of the same shape, the policy version that sampled each token.
        current_version: the trainer's version at the start of this training batch.

    Raises ValueError for shapes that do not match.
    """
    if not behaviour_logprobs.shape == logprobs.shape == versions.shape:
        raise ValueError(
            f"logprobs has shape {tuple(logprobs.shape)}, behaviour_logprobs "
            f"{tuple(behaviour_logprobs.shape)}, versions {tuple(versions.shape)}: give one entry "
            "for each token"
        )
    staleness = (current_version - versions).clamp(min=0).to(torch.float32)
    # lerp is exact at its ends, and garbage at padded positions stays where it is.
    return torch.lerp(
        behaviour_logprobs.detach().float(),
        logprobs.detach().float(),
        staleness / (staleness + 1),
    )


def _log_weight(tokens: Tokens) -> Tensor:
    policy_N = tokens.policy_N if tokens.proximal_N is None else tokens.proximal_N
    return log_ratio(policy_N.detach(), tokens.behaviour_N)
