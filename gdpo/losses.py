"""The policy loss: a correction's per-token objective, added up into one number.

Shapes: B sequences, T token positions.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gdpo.corrections import CORRECTIONS, DEFAULT_CORRECTION
from gdpo.metrics import TokenRecord, masked_mean, token_metrics
from gdpo.objectives import Correction, Objective
from gdpo.ratios import Tokens, behaviour_weight, log_ratio
from gdpo.terms import EntropyTerm, EssScaling, KlTerm


@dataclass(frozen=True)
class PolicyLoss:
    """The result of `policy_loss`."""

    loss: Tensor
    """0-dim, to be minimised."""
    metrics: dict[str, Tensor]
    """0-dim tensors without a gradient: those of `gdpo.metrics.token_metrics`, and `reference_kl`
    and `entropy` where given, their means over the tokens of the mask."""
    record: TokenRecord
    """What happened to each token, for `gdpo.metrics_by_staleness`."""


def policy_loss(
    logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    behaviour_logprobs: Tensor,
    proximal_logprobs: Tensor | None = None,
    correction: Correction = DEFAULT_CORRECTION,
    aggregation: str = "token_mean",
    kl: KlTerm | None = None,
    entropy: EntropyTerm | None = None,
    ess_scaling: EssScaling | None = None,
    max_length: int | None = None,
    denominator: float | Tensor | None = None,
) -> PolicyLoss:
    """Compute the loss of a minibatch, and how far off policy its tokens are.

        loss = -sum_tokens (objective - c_kl KL + c_entropy H) / denominator  [* sqrt(ESS)]

    The objective is that of the correction: `gdpo.corrections` has the formulae and sources,
    `gdpo.ratios` the meaning of mu, pi_prox and pi. Log ratios are limited to +-20 before exp.

    Args:
        logprobs: [B, T], log pi of each token, with a gradient.
        advantages: [B], one for each sequence.
        mask: [B, T] bool or 0/1, true where the policy chose the token. Positions outside it
            may hold anything, NaN included; with no position inside it the loss is 0.
        behaviour_logprobs: [B, T], log mu, as the actor recorded it.
        proximal_logprobs: [B, T], log pi_prox, recomputed or `gdpo.interpolated_proximal`; for a
            correction with `needs_proximal`.
        correction: with its limits, such as `gdpo.Icepop(weight_cap=3.0)`.
        aggregation: a name in `gdpo.AGGREGATIONS`.
        kl: a penalty on leaving a reference model.
        entropy: a bonus for an undecided policy.
        ess_scaling: a smaller loss where few tokens count.
        max_length: tokens in the longest possible response; the aggregation `constant` needs it.
        denominator: for a part of a minibatch, `gdpo.loss_denominator` of the whole, so that the
            losses of the parts add up to the loss of the whole.

    Raises ValueError for shapes that do not match, an unknown aggregation, or a missing input;
    TypeError for a correction that is none.
    """
    _check_needs(correction, aggregation, proximal_logprobs)
    tokens = _masked_tokens(logprobs, advantages, mask, behaviour_logprobs, proximal_logprobs)
    objective = correction.objective(tokens)
    record = _record(tokens, objective)
    value_BT, term_metrics = _add_terms(objective.value_BT, tokens, kl, entropy)
    metrics = token_metrics(record) | term_metrics
    if denominator is None:
        denominator = loss_denominator(mask, aggregation=aggregation, max_length=max_length)
    loss = -AGGREGATIONS[aggregation](value_BT, tokens.mask_BT) / denominator
    if ess_scaling is not None:
        loss = loss * (metrics["ess"] if ess_scaling.ess is None else ess_scaling.ess) ** 0.5
    return PolicyLoss(loss=loss, metrics=metrics, record=record)


def loss_denominator(
    mask: Tensor, *, aggregation: str = "token_mean", max_length: int | None = None
) -> Tensor:
    """Compute the divisor of a loss summed over these tokens: a 0-dim tensor, at least 1.

    `token_mean`: the number of tokens; `sequence_mean`: of sequences that have one; `constant`:
    B * max_length.

    Args:
        mask: [B, T] bool or 0/1, true where the policy chose the token.
        aggregation: a name in `gdpo.AGGREGATIONS`.
        max_length: tokens in the longest possible response.

    Raises ValueError where `constant` lacks its max_length.
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
"""Every aggregation by the name that a configuration uses: how the values [B, T] are added up.

`token_mean` weighs all tokens alike (DAPO, arXiv 2503.14476), `sequence_mean` all sequences (GRPO,
arXiv 2402.03300, eq. 3), `constant` divides by B * max_length (Dr. GRPO, arXiv 2503.20783);
`gdpo.loss_denominator` has the divisors.
"""


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


def _add_terms(
    value_BT: Tensor, tokens: Tokens, kl: KlTerm | None, entropy: EntropyTerm | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """The objective with its further terms, and the mean of each."""
    metrics: dict[str, Tensor] = {}
    if kl is not None:
        kl_BT = kl.per_token(tokens)
        value_BT = value_BT - kl.coefficient * kl_BT
        metrics["reference_kl"] = masked_mean(kl_BT.detach(), tokens.mask_BT)
    if entropy is not None:
        entropy_BT = entropy.per_token(tokens)
        value_BT = value_BT + entropy.coefficient * entropy_BT
        metrics["entropy"] = masked_mean(entropy_BT.detach(), tokens.mask_BT)
    return value_BT, metrics


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


def _check_needs(
    correction: Correction, aggregation: str, proximal_logprobs: Tensor | None
) -> None:
    if not isinstance(correction, Correction):
        raise TypeError(
            f"correction is {correction!r}: use one of {', '.join(CORRECTIONS)} as an object, such "
            "as gdpo.Icepop()"
        )
    if aggregation not in AGGREGATIONS:
        raise ValueError(
            f"unknown aggregation {aggregation!r}: use one of {', '.join(AGGREGATIONS)}"
        )
    if correction.needs_proximal and proximal_logprobs is None:
        raise ValueError(
            f"correction {correction.name!r} needs proximal_logprobs: pass the log-probabilities "
            "of the tokens under the policy as it was at the start of this training batch (with "
            "one update per batch, logprobs.detach()), or `interpolated_proximal`"
        )
