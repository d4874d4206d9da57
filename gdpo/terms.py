"""What a policy loss may have besides its objective.

Shapes: B sequences, T token positions.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gdpo.penalties import KL_PENALTIES, kl_penalty
from gdpo.ratios import Tokens


@dataclass(frozen=True, eq=False)
class KlTerm:
    """A penalty on leaving a reference model: -coefficient * KL(pi || pi_ref) at each token.

    Raises ValueError for a negative coefficient or an unknown kind.
    """

    reference_logprobs: Tensor
    """[B, T], log-probabilities of the tokens under the reference model."""
    coefficient: float = 0.0
    """0 only measures the divergence."""
    kind: str = "k3"
    """A name in `gdpo.KL_PENALTIES`."""

    def __post_init__(self) -> None:
        _check_coefficient("reference_logprobs", self.coefficient)
        if self.kind not in KL_PENALTIES:
            raise ValueError(
                f"unknown KL penalty {self.kind!r}: use one of {', '.join(KL_PENALTIES)}"
            )

    def per_token(self, tokens: Tokens) -> Tensor:
        """Estimate the divergence [B, T]; raises ValueError where the shapes differ."""
        reference_BT = _masked("reference_logprobs", self.reference_logprobs, tokens)
        return kl_penalty(tokens.policy_BT, reference_BT, self.kind)


@dataclass(frozen=True, eq=False)
class EntropyTerm:
    """A bonus for an undecided policy: +coefficient * H(pi) at each token.

    Raises ValueError for a negative coefficient.
    """

    entropy: Tensor
    """[B, T], in nats, of the policy at each position, with a gradient: `gdpo.token_entropy`."""
    coefficient: float = 0.0
    """0 only measures the entropy."""

    def __post_init__(self) -> None:
        _check_coefficient("entropy", self.coefficient)

    def per_token(self, tokens: Tokens) -> Tensor:
        """Take the entropy [B, T], 0 outside the mask; raises ValueError where shapes differ."""
        return _masked("entropy", self.entropy, tokens)


@dataclass(frozen=True, eq=False)
class EssScaling:
    """A factor sqrt(ESS of w) on the loss: a minibatch of which few tokens count moves less.

    Source: VCPO, arXiv 2602.17616, which scales the learning rate. Do that with the metric `ess`
    where the optimiser undoes a constant scale, as Adam does.
    """

    ess: float | Tensor | None = None
    """For a part of a minibatch, the ESS of the whole; None for the part's own."""


def _check_coefficient(name: str, coefficient: float) -> None:
    if not 0 <= coefficient < math.inf:
        raise ValueError(f"the coefficient of {name} is {coefficient}: give a number of at least 0")


def _masked(name: str, values: Tensor, tokens: Tokens) -> Tensor:
    """The input of a term, 0 where the mask is false."""
    if values.shape != tokens.mask_BT.shape:
        raise ValueError(
            f"{name} has shape {tuple(values.shape)}, logprobs {tuple(tokens.mask_BT.shape)}: "
            "give one entry for each token"
        )
    return torch.where(tokens.mask_BT, values.to(tokens.policy_BT.dtype), 0.0)
