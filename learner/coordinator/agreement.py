"""Whether an engine computes the learner's policy, from log-probabilities of the same tokens.

Shapes: N tokens. What two implementations of one model may differ by is rounding, and how much that
is depends on type, depth and scale of the model: so it is measured. The learner's model is computed
in float32, which is the truth here, and once more in the type of the engine, whose difference from
the truth is the yardstick. Rounding has two more marks: it leans to no side, and does not grow with
the logits. What a wrong temperature or a truncated distribution does is seen by these where it is
smaller than rounding.
"""

import math
from dataclasses import dataclass

import torch

SMALLEST_LIMIT = 1e-3
"""Mean absolute difference, in nats, that is always allowed: kernels add in other orders."""
TIMES_ROUNDING = 2.0
"""How much larger the mean difference may be than that of the learner's own rounding. Engines of
the same type came out at 0.7 to 1.2 of it, a temperature of 0.9 for 1 at 3 and more."""
LARGEST = 25.0
"""The largest difference may be this many times the limit of the mean."""
CERTAIN = 6.0
"""Standard errors from which on a lean is none of chance."""
SMALLEST_GAIN = 0.02
"""Relative error of the temperature that is always allowed."""
LEAN = 0.25
"""Share of the limit up to which all differences may lean to one side."""


@dataclass(frozen=True, slots=True, eq=False)
class TokenScores:
    """What engine and learner make of the same tokens."""

    engine_N: torch.Tensor
    """Log-probabilities that the engine recorded."""
    learner_N: torch.Tensor
    """Those of the learner's model with the same weights, computed in float32."""
    rounded_N: torch.Tensor
    """The same, computed in the engine's type."""
    gain_N: torch.Tensor
    """Derivative of ``learner_N`` by the logarithm of 1 / temperature."""


@dataclass(frozen=True, slots=True)
class Agreement:
    """Differences of an engine's log-probabilities from the learner's."""

    num_tokens: int
    mean: float
    """Mean of the absolute differences."""
    largest: float
    lean: float
    """Mean of the signed differences."""
    gain: float
    """Share by which the engine's logits seem to be larger; 0 if rounding may have made it so."""
    gain_explains: bool
    """Whether ``gain`` makes up most of the differences."""
    leans: bool
    """Whether ``lean`` is more than rounding."""
    rounding: float
    """Mean of the absolute differences that rounding made in the learner's own model."""
    limit: float
    """Largest ``mean`` that is allowed."""
    strict: bool
    """Whether gain and lean count: with a limit of the user's they do not."""

    @property
    def agrees(self) -> bool:
        """Whether the engine computes the learner's policy."""
        # Not "is above": a NaN is no agreement.
        small = self.mean <= self.limit and self.largest <= LARGEST * self.limit
        return small and not (self.strict and (self.gain or self.leans))


def compare(scores: TokenScores, check_limit: float | None) -> Agreement:
    """Compare at least one token; ``check_limit`` takes the place of the measured limit."""
    differences_N = (scores.engine_N - scores.learner_N).double()
    rounding_N = (scores.rounded_N - scores.learner_N).double()
    num_tokens = len(differences_N)
    rounding = rounding_N.abs().mean().item()
    # Of few tokens, both means are uncertain.
    factor = TIMES_ROUNDING * (1 + 2 / math.sqrt(num_tokens))
    limit = check_limit or max(SMALLEST_LIMIT, factor * rounding)
    lean = differences_N.mean().item()
    spread = max(_rms(differences_N - lean), _rms(rounding_N))
    gain_N = scores.gain_N.double()
    gain = _gain(differences_N, rounding_N, gain_N)
    leans = abs(lean) > max(LEAN * limit, CERTAIN * spread / math.sqrt(num_tokens))
    return Agreement(
        num_tokens=num_tokens,
        mean=differences_N.abs().mean().item(),
        largest=differences_N.abs().max().item(),
        lean=lean,
        gain=gain,
        gain_explains=_rms(differences_N - gain * gain_N) < 0.7 * _rms(differences_N),
        leans=leans,
        rounding=rounding,
        limit=limit,
        strict=check_limit is None,
    )


def _gain(differences_N: torch.Tensor, rounding_N: torch.Tensor, gain_N: torch.Tensor) -> float:
    """Least squares of the differences on ``gain_N``; 0 where chance may have made it."""
    square = gain_N.square().sum().item()
    if square == 0:
        return 0.0
    gain = (differences_N @ gain_N).item() / square
    spread = max(_rms(differences_N - gain * gain_N), _rms(rounding_N))
    certain = abs(gain) > max(SMALLEST_GAIN, CERTAIN * spread / math.sqrt(square))
    return gain if certain else 0.0


def _rms(values_N: torch.Tensor) -> float:
    return values_N.square().mean().sqrt().item()
