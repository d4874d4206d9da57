"""Per-token objectives: how a policy learns from tokens that an older policy sampled.

Shapes: B sequences, T token positions. mu, pi_prox, pi and their ratios w, r, rho are those of
`gdpo.ratios`. A = advantage.

A correction turns `Tokens` into an `Objective`, to be maximised. Advantages depend on rewards
only, so every correction goes with every estimator.

A token that is masked or truncated stays in the denominator of the loss. Masking multiplies by 0,
so that a NaN in what was masked is still seen.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gdpo.ratios import Tokens, behaviour_weight, log_ratio, sequence_ratio, sequence_weight


@dataclass(frozen=True)
class Limits:
    """How far a token may be off policy before it stops counting."""

    clip_low: float = 0.2
    """The clip's lower end is 1 - clip_low."""
    clip_high: float = 0.2
    """The clip's upper end is 1 + clip_high."""
    weight_floor: float = 0.5
    """`icepop`: tokens of smaller w are masked."""
    weight_cap: float = 5.0
    """Tokens of larger w are truncated to it; by `icepop` masked."""
    tv_limit: float = 0.2
    """`dppo_tv`: limit on |pi - mu|."""
    log_ratio_penalty: float = 1e-3
    """`dppo_tv`: coefficient of (log rho)^2."""
    second_moment_limit: float = 0.04
    """`m2po`: limit on the mean of (log rho)^2."""

    def __post_init__(self) -> None:
        for name, low, high in (
            ("clip_low", 0, 1),
            ("clip_high", 0, math.inf),
            ("weight_floor", 0, math.inf),
            ("weight_cap", 0, math.inf),
            ("tv_limit", 0, 1),
            ("log_ratio_penalty", 0, math.inf),
            ("second_moment_limit", 0, math.inf),
        ):
            value = getattr(self, name)
            if not low <= value <= high:
                raise ValueError(f"{name} is {value}: give a number from {low} to {high}")
        if not self.weight_cap > 0:
            raise ValueError(f"weight_cap is {self.weight_cap}: give a positive number, or inf")


@dataclass(frozen=True)
class Objective:
    """What a correction makes of each token; all but the value without a gradient."""

    value_BT: Tensor
    """The objective, to be maximised."""
    ratio_BT: Tensor
    """The ratio that carries the gradient: r or rho."""
    truncated_BT: Tensor | None = None
    """bool, True where an importance weight was cut down; None for nowhere, as below."""
    clipped_low_BT: Tensor | None = None
    """bool, True where the clip removed the gradient because the ratio was low ..."""
    clipped_high_BT: Tensor | None = None
    """... or high."""
    masked_low_BT: Tensor | None = None
    """bool, True where a mask removed the token because a ratio was low ..."""
    masked_high_BT: Tensor | None = None
    """... or high."""


def decoupled_ppo(tokens: Tokens, limits: Limits) -> Objective:
    """Clip against the proximal policy, and weight by how it differs from the behaviour policy.

        min(w, C) * min(r A, clip(r, 1 - e_low, 1 + e_high) A),  no gradient through w

    Source: AReaL, arXiv 2505.24298, its decoupled PPO objective (after Hilton et al., arXiv
    2110.00641), with w truncated at C.
    """
    return _truncate(_clip_to_proximal(tokens, limits), behaviour_weight(tokens), limits)


def tis_sequence(tokens: Tokens, limits: Limits) -> Objective:
    """As `tis`, with one weight for each sequence.

        min(prod_t w_t, C) * min(r A, clip(r, 1 - e_low, 1 + e_high) A)

    Source: as `tis`, with the sequence level of verl: unbiased but for the truncation, where
    token weights ignore what the earlier tokens did, at the price of a weight that soon vanishes
    or explodes with length.
    """
    return _truncate(_clip_to_proximal(tokens, limits), sequence_weight(tokens), limits)


def icepop(tokens: Tokens, limits: Limits) -> Objective:
    """Mask the tokens whose weight is out of bounds, instead of truncating it.

        w * min(r A, clip(r, 1 - e_low, 1 + e_high) A)  if a <= w <= b else 0

    Source: IcePop, in Ring-1T, arXiv 2510.18855; a = 0.5 and b = 5 as in NeMo-RL and OpenRLHF.
    """
    clipped, weight_BT = _clip_to_proximal(tokens, limits), behaviour_weight(tokens)
    low_BT, high_BT = weight_BT < limits.weight_floor, weight_BT > limits.weight_cap
    return Objective(
        value_BT=clipped.value_BT * weight_BT * ~(low_BT | high_BT),
        ratio_BT=clipped.ratio_BT,
        clipped_low_BT=clipped.clipped_low_BT,
        clipped_high_BT=clipped.clipped_high_BT,
        masked_low_BT=low_BT,
        masked_high_BT=high_BT,
    )


def ppo(tokens: Tokens, limits: Limits) -> Objective:
    """Clip against the behaviour policy itself; the proximal policy is not used.

        min(rho A, clip(rho, 1 - e_low, 1 + e_high) A)

    Source: PPO, arXiv 1707.06347, eq. 7, with mu in the place of the old policy.
    """
    return _clip(log_ratio(tokens.policy_BT, tokens.behaviour_BT).exp(), tokens, limits)


def none(tokens: Tokens, limits: Limits) -> Objective:
    """Take stale tokens as if the proximal policy had sampled them: the naive baseline.

        min(r A, clip(r, 1 - e_low, 1 + e_high) A)

    Source: PPO, arXiv 1707.06347, eq. 7, with pi_prox as the old policy; mu is ignored.
    """
    return _clip_to_proximal(tokens, limits)


def gspo(tokens: Tokens, limits: Limits) -> Objective:
    """Clip one ratio for the whole sequence, the geometric mean of its tokens'.

        min(s A, clip(s, 1 - e_low, 1 + e_high) A),  s = exp(mean_t log r_t)

    Source: GSPO, arXiv 2507.18071, eq. 5 to 7, with pi_prox as the old policy; e = 3e-4 and
    4e-4. With the aggregation `sequence_mean` the loss is the paper's. As in `none`, mu is ignored.
    """
    log_ratio_BT = log_ratio(tokens.policy_BT, _proximal(tokens))
    return _clip(sequence_ratio(log_ratio_BT, tokens.mask_BT), tokens, limits)


def cispo(tokens: Tokens, limits: Limits) -> Objective:
    """Clip the weight of a policy gradient step instead of the step: no token is dropped.

        stop_grad(clip(rho, 1 - e_low, 1 + e_high)) A log pi

    Source: CISPO, in MiniMax-M1, arXiv 2506.13585, eq. 4 and 5, with mu as the old policy. By
    default rho is only cut above, at 5, as the paper has no lower limit.
    """
    ratio_BT = log_ratio(tokens.policy_BT, tokens.behaviour_BT).exp().detach()
    weight_BT = ratio_BT.clamp(1 - limits.clip_low, 1 + limits.clip_high)
    return Objective(
        value_BT=weight_BT * tokens.advantage_BT * tokens.policy_BT,
        ratio_BT=ratio_BT,
        truncated_BT=weight_BT != ratio_BT,
    )


def dppo_tv(tokens: Tokens, limits: Limits) -> Objective:
    """Mask the tokens whose probability already moved far enough, and pull all towards mu.

        rho A m - c (log rho)^2,  m = 0 where A > 0 and pi - mu > d, or A <= 0 and pi - mu < -d

    Source: DPPO with binary total variation, arXiv 2602.04879; d = 0.2 and c = 1e-3 as in
    prime-rl. A ratio clip binds on rare tokens, whose ratio moves easily, and hardly on likely
    ones; the difference of probabilities binds on those that matter.
    """
    log_rho_BT = log_ratio(tokens.policy_BT, tokens.behaviour_BT)
    ratio_BT = log_rho_BT.exp()
    moved_BT = tokens.policy_BT.detach().exp() - tokens.behaviour_BT.exp()
    high_BT = (tokens.advantage_BT > 0) & (moved_BT > limits.tv_limit)
    low_BT = (tokens.advantage_BT <= 0) & (moved_BT < -limits.tv_limit)
    surrogate_BT = ratio_BT * tokens.advantage_BT * ~(low_BT | high_BT)
    return Objective(
        value_BT=surrogate_BT - limits.log_ratio_penalty * log_rho_BT.square(),
        ratio_BT=ratio_BT.detach(),
        masked_low_BT=low_BT,
        masked_high_BT=high_BT,
    )


def m2po(tokens: Tokens, limits: Limits) -> Objective:
    """Mask the fewest tokens that bring the second moment of log rho under its limit.

        rho A m,  m = 0 for the largest (log rho)^2, until the mean of the others < limit

    Source: M2PO, arXiv 2510.01161. Decided here:

    1. Tokens with the same (log rho)^2 are masked together, so that their order does not matter.
    2. The mean is over the tokens of one call: of a microbatch, where minibatches are split.
    """
    log_rho_BT = log_ratio(tokens.policy_BT, tokens.behaviour_BT)
    ratio_BT = log_rho_BT.exp()
    square_BT = log_rho_BT.detach().square()
    cut_BT = square_BT > _largest_kept(square_BT, tokens.mask_BT, limits.second_moment_limit)
    return Objective(
        value_BT=ratio_BT * tokens.advantage_BT * ~cut_BT,
        ratio_BT=ratio_BT.detach(),
        masked_low_BT=cut_BT & (ratio_BT < 1),
        masked_high_BT=cut_BT & (ratio_BT > 1),
    )


def _largest_kept(square_BT: Tensor, mask_BT: Tensor, limit: float) -> Tensor:
    """The largest value, 0-dim, such that those up to it have a mean under the limit; else -1."""
    square_N = square_BT.masked_fill(~mask_BT, torch.inf).flatten().to(torch.float64).sort().values
    count_N = torch.arange(1, len(square_N) + 1, device=square_N.device)
    # Sorted upwards, the running means only grow: a prefix of them is under the limit. A value
    # that goes on beyond that prefix is not kept at all.
    under_N = square_N.cumsum(0) / count_N < limit
    first_cut = square_N[under_N.sum().clamp(max=len(square_N) - 1)]
    kept_N = under_N & ((square_N < first_cut) | under_N.all())
    return torch.where(kept_N, square_N, -1.0).amax()


def _clip_to_proximal(tokens: Tokens, limits: Limits) -> Objective:
    return _clip(log_ratio(tokens.policy_BT, _proximal(tokens)).exp(), tokens, limits)


def _clip(ratio_BT: Tensor, tokens: Tokens, limits: Limits) -> Objective:
    """min(ratio A, clip(ratio, 1 - e_low, 1 + e_high) A): PPO, arXiv 1707.06347, eq. 7."""
    low, high = 1 - limits.clip_low, 1 + limits.clip_high
    advantage_BT = tokens.advantage_BT
    fixed_BT = ratio_BT.detach()
    return Objective(
        value_BT=torch.minimum(ratio_BT * advantage_BT, ratio_BT.clamp(low, high) * advantage_BT),
        ratio_BT=fixed_BT,
        clipped_low_BT=(fixed_BT < low) & (advantage_BT < 0),
        clipped_high_BT=(fixed_BT > high) & (advantage_BT > 0),
    )


def _truncate(clipped: Objective, weight_BT: Tensor, limits: Limits) -> Objective:
    """The objective times min(weight, C)."""
    return Objective(
        value_BT=clipped.value_BT * weight_BT.clamp(max=limits.weight_cap),
        ratio_BT=clipped.ratio_BT,
        truncated_BT=weight_BT > limits.weight_cap,
        clipped_low_BT=clipped.clipped_low_BT,
        clipped_high_BT=clipped.clipped_high_BT,
    )


def _proximal(tokens: Tokens) -> Tensor:
    assert tokens.proximal_BT is not None, "policy_loss checks this"
    return tokens.proximal_BT


@dataclass(frozen=True)
class Correction:
    """A correction, and what it takes unless told otherwise."""

    objective: Callable[[Tokens, Limits], Objective]
    needs_proximal: bool
    limits: Limits = field(default_factory=Limits)


CORRECTIONS: dict[str, Correction] = {
    "decoupled_ppo": Correction(decoupled_ppo, needs_proximal=True),
    "ppo": Correction(ppo, needs_proximal=False),
    # Truncated importance sampling (Yao et al., "Your efficient RL framework secretly brings you
    # off-policy RL training", 2025) has the formula of decoupled_ppo, with C = 2.
    "tis": Correction(decoupled_ppo, needs_proximal=True, limits=Limits(weight_cap=2.0)),
    "tis_sequence": Correction(tis_sequence, needs_proximal=True, limits=Limits(weight_cap=2.0)),
    "icepop": Correction(icepop, needs_proximal=True),
    "dppo_tv": Correction(dppo_tv, needs_proximal=False),
    "gspo": Correction(gspo, needs_proximal=True, limits=Limits(clip_low=3e-4, clip_high=4e-4)),
    "cispo": Correction(cispo, needs_proximal=False, limits=Limits(clip_low=1.0, clip_high=4.0)),
    "m2po": Correction(m2po, needs_proximal=False),
    "none": Correction(none, needs_proximal=True),
}
"""Every correction by the name that a configuration uses."""
