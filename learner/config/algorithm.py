"""Section ``[algorithm]`` of the configuration, and the objects of `gdpo` that it stands for.

Nothing here imports torch: a configuration is read without it. `AlgorithmConfig.make_correction`
and its like do, when they are called.
"""

from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from protocol.config import StrictModel

if TYPE_CHECKING:
    from torch import Tensor

    import gdpo

EstimatorName = Literal[
    "gdpo", "grpo", "grpo_no_std", "grpo_batch_norm", "dvao", "corr_grpo", "gd2po"
]
CorrectionName = Literal[
    "decoupled_ppo",
    "ppo",
    "tis",
    "tis_sequence",
    "icepop",
    "dppo_tv",
    "gspo",
    "cispo",
    "m2po",
    "none",
]
KlName = Literal["k3", "mse"]
AggregationName = Literal["token_mean", "sequence_mean", "constant"]

_CLIP = ("clip_low", "clip_high")
LIMITS: dict[CorrectionName, tuple[str, ...]] = {
    "decoupled_ppo": (*_CLIP, "weight_cap"),
    "ppo": _CLIP,
    "tis": (*_CLIP, "weight_cap"),
    "tis_sequence": (*_CLIP, "weight_cap"),
    "icepop": (*_CLIP, "weight_floor", "weight_cap"),
    "dppo_tv": ("tv_limit", "log_ratio_penalty"),
    "gspo": _CLIP,
    "cispo": _CLIP,
    "m2po": ("second_moment_limit",),
    "none": _CLIP,
}
"""The limits that each correction has: the fields of its class in `gdpo`."""


class AlgorithmConfig(StrictModel):
    """Advantages and loss; see the package `gdpo`."""

    estimator: EstimatorName = "gdpo"
    """How the rewards of a group become advantages; formulae in `gdpo.advantages`."""
    advantage_eps: PositiveFloat = 1e-6
    """Added to every standard deviation that is divided by."""
    min_std: NonNegativeFloat = 0.0
    """A reward whose standard deviation in a group is not above it counts as constant there."""
    advantage_clamp: PositiveFloat | None = None
    """Limit on the size of an advantage; None for no limit."""
    exclude_dead_from_batch_std: bool = False
    """Leave groups without any signal out of the batch's standard deviation."""
    batch_std_ema: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the batches before in the batch's standard deviation."""
    no_signal: Literal["keep", "refill"] = "keep"
    """Groups all of whose advantages are 0: ``refill`` leaves them out and puts other prompts in
    their place, so that every group of a batch teaches something (DAPO's dynamic sampling)."""
    max_refills: PositiveInt = 10
    """Batches' worth of groups without signal that one batch may cost; then the run ends with an
    error, as it would generate for nothing."""

    correction: CorrectionName = "icepop"
    """How the loss learns from stale tokens; formulae in `gdpo.corrections`."""
    proximal: Literal["recomputed", "interpolated"] = "recomputed"
    """``interpolated`` by the tokens' versions saves a forward pass over all minibatches but the
    first."""
    clip_low: Annotated[float, Field(gt=0, le=1)] | None = None
    """Ratios are clipped below 1 - clip_low. For this limit and those below, None takes the
    correction's own default; a limit that the correction does not have is an error."""
    clip_high: PositiveFloat | None = None
    """Ratios are clipped above 1 + clip_high."""
    weight_floor: NonNegativeFloat | None = None
    """Tokens of smaller importance weight are masked."""
    weight_cap: PositiveFloat | None = None
    """Tokens of larger importance weight are masked (``icepop``) or truncated to it."""
    tv_limit: Annotated[float, Field(gt=0, le=1)] | None = None
    """Tokens whose probability moved further than this are masked."""
    log_ratio_penalty: NonNegativeFloat | None = None
    """Coefficient of the squared log ratio to the policy that sampled."""
    second_moment_limit: PositiveFloat | None = None
    """Tokens are masked until the mean squared log ratio is below it."""
    scale_lr_by_ess: bool = False
    """Scale each optimiser step by the square root of the effective sample size (VCPO)."""

    aggregation: AggregationName = "token_mean"
    """How the tokens' objectives are averaged: all tokens alike, all sequences alike, or divided
    by a constant, the tokens of the longest possible responses."""
    overlong: Literal["keep", "mask"] = "keep"
    """Completions that were cut off at ``sampling.max_tokens``: ``mask`` leaves their tokens out of
    the loss, but not their scores out of the group's statistics. To penalise long ones, add the
    reward ``actors.tasks.lengths:soft_overlong``."""
    kl_coefficient: NonNegativeFloat = 0.0
    """Weight of the KL divergence to the model that training began with; above 0 keeps a copy of
    it."""
    kl_kind: KlName = "k3"
    """Estimate of that divergence; formulae in `gdpo.penalties`."""
    entropy_coefficient: float = 0.0
    """Weight of the policy's entropy as a bonus."""

    @model_validator(mode="after")
    def _limits_are_those_of_the_correction(self) -> Self:
        known = LIMITS[self.correction]
        if strange := [name for name in self._limits() if name not in known]:
            raise ValueError(
                f"the correction {self.correction} has no {' and no '.join(strange)}; "
                f"its limits are {' and '.join(known)}"
            )
        return self

    def make_correction(self) -> "gdpo.Correction":
        """Build the correction, with the limits that are set."""
        import gdpo

        return gdpo.CORRECTIONS[self.correction](**self._limits())

    def make_kl_term(self, reference_logprobs_N: "Tensor") -> "gdpo.KlTerm":
        """Build the penalty on leaving the model of these log-probabilities [N]."""
        import gdpo

        return gdpo.KlTerm(reference_logprobs_N, self.kl_coefficient, self.kl_kind)

    def make_entropy_term(self, entropy_N: "Tensor") -> "gdpo.EntropyTerm":
        """Build the bonus for the policy's entropy [N], in nats."""
        import gdpo

        return gdpo.EntropyTerm(entropy_N, self.entropy_coefficient)

    def _limits(self) -> dict[str, float]:
        names = dict.fromkeys(name for limits in LIMITS.values() for name in limits)
        values = {name: getattr(self, name) for name in names}
        return {name: value for name, value in values.items() if value is not None}
