"""The policy loss: a correction's per-token objective, added up into one number.

Shapes: B sequences, T token positions.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gdpo.corrections import CORRECTIONS, Limits, Objective
from gdpo.metrics import TokenRecord, masked_mean, token_metrics
from gdpo.penalties import kl_penalty
from gdpo.ratios import Tokens, behaviour_weight, log_ratio


@dataclass(frozen=True)
class PolicyLoss:
    """The result of `policy_loss`."""

    loss: Tensor
    """0-dim, to be minimised."""
    metrics: dict[str, Tensor]
    """0-dim tensors without a gradient; `policy_loss` lists them."""
    record: TokenRecord
    """What happened to each token, for `metrics_by_staleness`."""


def policy_loss(
    logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    behaviour_logprobs: Tensor,
    proximal_logprobs: Tensor | None = None,
    correction: str = "icepop",
    aggregation: str = "token_mean",
    clip_low: float | None = None,
    clip_high: float | None = None,
    weight_floor: float | None = None,
    weight_cap: float | None = None,
    tv_limit: float | None = None,
    log_ratio_penalty: float | None = None,
    second_moment_limit: float | None = None,
    reference_logprobs: Tensor | None = None,
    kl_kind: str = "k3",
    kl_coefficient: float = 0.0,
    entropy: Tensor | None = None,
    entropy_coefficient: float = 0.0,
    scale_by_ess: bool = False,
    ess: float | Tensor | None = None,
    max_length: int | None = None,
    denominator: float | Tensor | None = None,
) -> PolicyLoss:
    """Compute the loss of a minibatch, and how far off policy its tokens are.

        loss = -sum_tokens (objective - c_kl KL + c_entropy H) / denominator  [* sqrt(ESS)]

    The objective is that of the correction: `gdpo.corrections` has the formulae, their sources
    and the meaning of w, r and rho. Log ratios are limited to +-20 before exp.

    Args:
        logprobs: [B, T], log pi of each token, with a gradient.
        advantages: [B], one for each sequence.
        mask: [B, T] bool or 0/1, true where the policy chose the token. Positions outside it
            may hold anything, NaN included; with no position inside it the loss is 0.
        behaviour_logprobs: [B, T], log mu, as the actor recorded it.
        proximal_logprobs: [B, T], log pi_prox, recomputed or `interpolated_proximal`;
            `CORRECTIONS` says which correction can do without.
        correction: a name in `CORRECTIONS`. The default is the one that lost least to staleness in
            the project's own sweep (README).
        aggregation: a name in `AGGREGATIONS`. `token_mean` weighs all tokens alike (DAPO, arXiv
            2503.14476), `sequence_mean` all sequences (GRPO, arXiv 2402.03300, eq. 3),
            `constant` divides by B * max_length (Dr. GRPO, arXiv 2503.20783).
        clip_low, clip_high, weight_floor, weight_cap, tv_limit, log_ratio_penalty,
            second_moment_limit: see `gdpo.corrections.Limits`. None for what the correction
            takes by default; those it has no use for are ignored.
        reference_logprobs: [B, T], log-probabilities of the reference model.
        kl_kind: a name in `KL_PENALTIES`.
        kl_coefficient, entropy_coefficient: of the two extra terms.
        entropy: [B, T], of the policy at each position, with a gradient: `token_entropy`.
        scale_by_ess: multiply the loss by sqrt(ESS of w), so that a minibatch of which few
            tokens count moves the policy less (VCPO, arXiv 2602.17616, which scales the learning
            rate: do that with the metric `ess` where the optimiser undoes a constant scale, as
            Adam does).
        ess: for a part of a minibatch, the ESS of the whole.
        max_length: tokens in the longest possible response; `constant` needs it.
        denominator: for a part of a minibatch, `loss_denominator` of the whole, so that the
            losses of the parts add up to the loss of the whole.

    Metrics, over the tokens of the mask: `ess`, `weight_mean`, `weight_max` of w before it is
    truncated (of rho where there is no pi_prox); `weight_truncated_share`; `ratio_mean`,
    `ratio_max` of the ratio that carries the gradient; `clip_low_share`, `clip_high_share`, the
    tokens whose gradient the clip removed, and `mask_low_share`, `mask_high_share`, those that a
    mask removed, by the side on which they were out; `mismatch_kl`, mean of rho - log rho - 1
    (k3, an estimate of KL(mu || pi)); `tokens`, their number; `reference_kl` and `entropy` where
    given, their means. Without any token, `ess` is 1 and the others 0.

    Raises ValueError for shapes that do not match, an unknown name, or a setting out of range.
    """
    limits = _limits(
        correction,
        clip_low=clip_low,
        clip_high=clip_high,
        weight_floor=weight_floor,
        weight_cap=weight_cap,
        tv_limit=tv_limit,
        log_ratio_penalty=log_ratio_penalty,
        second_moment_limit=second_moment_limit,
    )
    _check_needs(correction, aggregation, proximal_logprobs)
    tokens = _masked_tokens(logprobs, advantages, mask, behaviour_logprobs, proximal_logprobs)
    objective = CORRECTIONS[correction].objective(tokens, limits)
    record = _record(tokens, objective)
    value_BT, metrics = objective.value_BT, token_metrics(record)

    reference_BT = _extra(tokens, "reference_logprobs", reference_logprobs, kl_coefficient)
    if reference_BT is not None:
        kl_BT = kl_penalty(tokens.policy_BT, reference_BT, kl_kind)
        value_BT = value_BT - kl_coefficient * kl_BT
        metrics["reference_kl"] = masked_mean(kl_BT.detach(), tokens.mask_BT)
    entropy_BT = _extra(tokens, "entropy", entropy, entropy_coefficient)
    if entropy_BT is not None:
        value_BT = value_BT + entropy_coefficient * entropy_BT
        metrics["entropy"] = masked_mean(entropy_BT.detach(), tokens.mask_BT)

    if denominator is None:
        denominator = loss_denominator(mask, aggregation=aggregation, max_length=max_length)
    loss = -AGGREGATIONS[aggregation](value_BT, tokens.mask_BT) / denominator
    if scale_by_ess:
        loss = loss * (metrics["ess"] if ess is None else ess) ** 0.5
    return PolicyLoss(loss=loss, metrics=metrics, record=record)


def loss_denominator(
    mask: Tensor, *, aggregation: str = "token_mean", max_length: int | None = None
) -> Tensor:
    """What the sum of a loss over these tokens is divided by; at least 1.

    `token_mean`: the number of tokens; `sequence_mean`: of sequences that have one; `constant`:
    B * max_length. Raises ValueError where `constant` lacks its max_length.
    """
    if aggregation == "constant":
        if max_length is None or max_length < 1:
            raise ValueError(
                f"aggregation 'constant' needs max_length, the tokens in the longest possible "
                f"response: got {max_length}"
            )
        return torch.tensor(float(max(mask.shape[0], 1) * max_length), device=mask.device)
    counted = mask.bool().any(dim=-1) if aggregation == "sequence_mean" else mask.bool()
    return counted.sum().clamp(min=1)


def _sum_of_tokens(value_BT: Tensor, mask_BT: Tensor) -> Tensor:
    return value_BT.sum()


def _sum_of_sequence_means(value_BT: Tensor, mask_BT: Tensor) -> Tensor:
    return (value_BT.sum(dim=-1) / mask_BT.sum(dim=-1).clamp(min=1)).sum()


AGGREGATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "token_mean": _sum_of_tokens,
    "sequence_mean": _sum_of_sequence_means,
    "constant": _sum_of_tokens,
}
"""Every aggregation by the name that a configuration uses; `loss_denominator` has the divisors."""


def _masked_tokens(
    logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    behaviour_logprobs: Tensor,
    proximal_logprobs: Tensor | None,
) -> Tokens:
    """Check the shapes, and put 0 where the mask is false.

    Replacing the inputs, not the result, is what keeps garbage out of the gradient: 0 times the
    derivative of exp at NaN would still be NaN.
    """
    if logprobs.dim() != 2 or logprobs.numel() == 0:
        raise ValueError(
            f"logprobs has shape {tuple(logprobs.shape)}: give [sequences, tokens], "
            "with at least one of each"
        )
    by_token = {"mask": mask, "behaviour_logprobs": behaviour_logprobs}
    if proximal_logprobs is not None:
        by_token["proximal_logprobs"] = proximal_logprobs
    for name, tensor in by_token.items():
        if tensor.shape != logprobs.shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}, logprobs {tuple(logprobs.shape)}: "
                "give one entry for each token"
            )
    if advantages.shape != logprobs.shape[:1]:
        raise ValueError(
            f"advantages has shape {tuple(advantages.shape)}, logprobs {tuple(logprobs.shape)}: "
            "give one advantage for each sequence"
        )
    mask_BT = mask.bool()
    dtype = torch.promote_types(logprobs.dtype, torch.float32)

    def masked(values: Tensor) -> Tensor:
        return torch.where(mask_BT, values.to(dtype), 0.0)

    return Tokens(
        policy_BT=masked(logprobs),
        behaviour_BT=masked(behaviour_logprobs.detach()),
        proximal_BT=None if proximal_logprobs is None else masked(proximal_logprobs.detach()),
        advantage_BT=masked(advantages.detach()[:, None].expand_as(mask_BT)),
        mask_BT=mask_BT,
    )


def _extra(tokens: Tokens, name: str, values: Tensor | None, coefficient: float) -> Tensor | None:
    """The input of a further term of the loss, 0 where the mask is false; None if not given."""
    if not 0 <= coefficient < math.inf:
        raise ValueError(f"the coefficient of {name} is {coefficient}: give a number of at least 0")
    if values is None:
        if coefficient > 0:
            raise ValueError(f"the coefficient of {name} is {coefficient}: pass {name}, or use 0")
        return None
    if values.shape != tokens.mask_BT.shape:
        raise ValueError(
            f"{name} has shape {tuple(values.shape)}, logprobs {tuple(tokens.mask_BT.shape)}: "
            "give one entry for each token"
        )
    return torch.where(tokens.mask_BT, values.to(tokens.policy_BT.dtype), 0.0)


def _record(tokens: Tokens, objective: Objective) -> TokenRecord:
    nowhere_BT = torch.zeros_like(tokens.mask_BT)

    def given(chosen_BT: Tensor | None) -> Tensor:
        return nowhere_BT if chosen_BT is None else chosen_BT

    return TokenRecord(
        mask_BT=tokens.mask_BT,
        weight_BT=behaviour_weight(tokens),
        ratio_BT=objective.ratio_BT,
        log_rho_BT=log_ratio(tokens.policy_BT.detach(), tokens.behaviour_BT),
        truncated_BT=given(objective.truncated_BT),
        clipped_low_BT=given(objective.clipped_low_BT),
        clipped_high_BT=given(objective.clipped_high_BT),
        masked_low_BT=given(objective.masked_low_BT),
        masked_high_BT=given(objective.masked_high_BT),
    )


def _check_needs(correction: str, aggregation: str, proximal_logprobs: Tensor | None) -> None:
    if aggregation not in AGGREGATIONS:
        raise ValueError(
            f"unknown aggregation {aggregation!r}: use one of {', '.join(AGGREGATIONS)}"
        )
    if CORRECTIONS[correction].needs_proximal and proximal_logprobs is None:
        raise ValueError(
            f"correction {correction!r} needs proximal_logprobs: pass the log-probabilities of "
            "the tokens under the policy as it was at the start of this training batch (with "
            "one update per batch, logprobs.detach()), or `interpolated_proximal`"
        )


def _limits(correction: str, **given: float | None) -> Limits:
    """The correction's own limits, but for those that were given."""
    if correction not in CORRECTIONS:
        raise ValueError(f"unknown correction {correction!r}: use one of {', '.join(CORRECTIONS)}")
    chosen = {name: value for name, value in given.items() if value is not None}
    return replace(CORRECTIONS[correction].limits, **chosen)
