"""What a policy loss may have besides its objective.

Shapes: N tokens that the policy chose; [B, T] where sequences are padded.
"""

import math
from dataclasses import dataclass

from torch import Tensor

from gdpo.penalties import KL_PENALTIES, kl_penalty
from gdpo.ratios import Tokens


@dataclass(frozen=True, eq=False)
class KlTerm:
    """A penalty on leaving a reference model: -coefficient * KL(pi || pi_ref) at each token.

    Raises ValueError for a negative coefficient or an unknown kind.
    """

    reference_logprobs: Tensor
    """[N] or [B, T] as those of the loss: log-probabilities under the reference model."""
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
        """Estimate the divergence [N]; raises ValueError where the shapes differ."""
        reference_N = _checked("reference_logprobs", self.reference_logprobs, tokens)
        return kl_penalty(tokens.policy_N, reference_N, self.kind)


@dataclass(frozen=True, eq=False)
class EntropyTerm:
    """A bonus for an undecided policy: +coefficient * H(pi) at each token.

    Raises ValueError for a negative coefficient.
    """

    entropy: Tensor
    """[N] or [B, T], in nats, of the policy at each position, with a gradient."""
    coefficient: float = 0.0
    """0 only measures the entropy."""

    def __post_init__(self) -> None:
        _check_coefficient("entropy", self.coefficient)

    def per_token(self, tokens: Tokens) -> Tensor:
        """Take the entropy [N]; raises ValueError where shapes differ."""
        return _checked("entropy", self.entropy, tokens)


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


def _checked(name: str, values: Tensor, tokens: Tokens) -> Tensor:
    if values.shape != tokens.policy_N.shape:
        raise ValueError(
            f"{name} has shape {tuple(values.shape)}, logprobs {tuple(tokens.policy_N.shape)}: "
            "give one entry for each token"
        )
    return values.to(tokens.policy_N.dtype)
