"""The policy loss: a correction's per-token objective, added up into one number.

Shapes: B sequences, T token positions.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gdpo.corrections import (
    CORRECTIONS,
    Limits,
    Objective,
    Tokens,
    behaviour_weight,
    log_ratio,
)
from gdpo.metrics import effective_sample_size, masked_max, masked_mean


@dataclass(frozen=True)
class PolicyLoss:
    """The result of `policy_loss`."""

    loss: Tensor
    """0-dim, to be minimised."""
    metrics: dict[str, Tensor]
    """0-dim tensors without a gradient; `policy_loss` lists them."""


def policy_loss(
    logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    behaviour_logprobs: Tensor,
    proximal_logprobs: Tensor | None = None,
    correction: str = "decoupled_ppo",
    aggregation: str = "token_mean",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    weight_cap: float = 5.0,
    max_length: int | None = None,
    denominator: float | Tensor | None = None,
) -> PolicyLoss:
    """Compute the loss of a minibatch, and how far off policy its tokens are.

        loss = -sum_tokens objective / denominator

    The objective is that of the correction: `gdpo.corrections` has the formulae, their sources
    and the meaning of w, r and rho. Log ratios are limited to +-20 before exp.

    Args:
        logprobs: [B, T], log pi of each token, with a gradient.
        advantages: [B], one for each sequence.
        mask: [B, T] bool or 0/1, true where the policy chose the token. Positions outside it
            may hold anything, NaN included; with no position inside it the loss is 0.
        behaviour_logprobs: [B, T], log mu, as the actor recorded it.
        proximal_logprobs: [B, T], log pi_prox; `ppo` alone can do without.
        correction: a name in `CORRECTIONS`.
        aggregation: a name in `AGGREGATIONS`. `token_mean` weighs all tokens alike (DAPO, arXiv
            2503.14476), `sequence_mean` all sequences (GRPO, arXiv 2402.03300, eq. 3),
            `constant` divides by B * max_length (Dr. GRPO, arXiv 2503.20783).
        clip_low, clip_high: the ratio is clipped to [1 - clip_low, 1 + clip_high].
        weight_cap: C, the limit on w.
        max_length: tokens in the longest possible response; `constant` needs it.
        denominator: for a part of a minibatch, `loss_denominator` of the whole, so that the
            losses of the parts add up to the loss of the whole.

    Metrics, over the tokens of the mask: `ess`, `weight_mean`, `weight_max` of w before it is
    truncated (of rho where there is no pi_prox); `weight_truncated_share`; `ratio_mean`,
    `ratio_max` of the clipped ratio; `clip_low_share`, `clip_high_share`, the tokens whose
    gradient the clip removed; `mismatch_kl`, mean of rho - log rho - 1 (k3, an estimate of
    KL(mu || pi)); `tokens`, their number. Without any token, `ess` is 1 and the others 0.

    Raises ValueError for shapes that do not match, an unknown name, or a setting out of range.
    """
    _check_names(correction, aggregation)
    limits = _limits(clip_low, clip_high, weight_cap)
    tokens = _masked_tokens(logprobs, advantages, mask, behaviour_logprobs, proximal_logprobs)
    objective = CORRECTIONS[correction](tokens, limits)
    if denominator is None:
        denominator = loss_denominator(mask, aggregation=aggregation, max_length=max_length)
    total = AGGREGATIONS[aggregation](objective.value_BT, tokens.mask_BT)
    return PolicyLoss(loss=-total / denominator, metrics=_metrics(tokens, objective, limits))


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


def _metrics(tokens: Tokens, objective: Objective, limits: Limits) -> dict[str, Tensor]:
    with torch.no_grad():
        mask_BT, ratio_BT, advantage_BT = tokens.mask_BT, objective.ratio_BT, tokens.advantage_BT
        weight_BT = behaviour_weight(tokens)
        log_rho_BT = log_ratio(tokens.policy_BT, tokens.behaviour_BT)
        below_BT = (ratio_BT < 1 - limits.clip_low) & (advantage_BT < 0)
        above_BT = (ratio_BT > 1 + limits.clip_high) & (advantage_BT > 0)
        return {
            "ess": effective_sample_size(weight_BT, mask_BT),
            "weight_mean": masked_mean(weight_BT, mask_BT),
            "weight_max": masked_max(weight_BT, mask_BT),
            "weight_truncated_share": masked_mean(objective.truncated_BT.float(), mask_BT),
            "ratio_mean": masked_mean(ratio_BT, mask_BT),
            "ratio_max": masked_max(ratio_BT, mask_BT),
            "clip_low_share": masked_mean(below_BT.float(), mask_BT),
            "clip_high_share": masked_mean(above_BT.float(), mask_BT),
            # expm1, because rho - log rho - 1 loses every digit where rho is nearly 1.
            "mismatch_kl": masked_mean(log_rho_BT.expm1() - log_rho_BT, mask_BT),
            "tokens": mask_BT.sum(),
        }


def _check_names(correction: str, aggregation: str) -> None:
    if correction not in CORRECTIONS:
        raise ValueError(f"unknown correction {correction!r}: use one of {', '.join(CORRECTIONS)}")
    if aggregation not in AGGREGATIONS:
        raise ValueError(
            f"unknown aggregation {aggregation!r}: use one of {', '.join(AGGREGATIONS)}"
        )


def _limits(clip_low: float, clip_high: float, weight_cap: float) -> Limits:
    if not 0 <= clip_low <= 1:
        raise ValueError(f"clip_low is {clip_low}: give a number from 0 to 1")
    if not clip_high >= 0:
        raise ValueError(f"clip_high is {clip_high}: give a number of at least 0")
    if not weight_cap > 0:
        raise ValueError(f"weight_cap is {weight_cap}: give a positive number (inf for no limit)")
    return Limits(clip_low, clip_high, weight_cap)
