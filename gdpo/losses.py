"""The policy loss: a correction's per-token objective, added up into one number.

Shapes: N tokens that the policy chose, of B sequences; [B, T] where sequences are padded.

    policy_loss           padded sequences with a mask
    packed_policy_loss    tokens without padding, which is what the other one makes of them
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from gdpo.corrections import CORRECTIONS, DEFAULT_CORRECTION
from gdpo.metrics import TokenRecord, effective_sample_size, token_metrics
from gdpo.objectives import Correction, Objective
from gdpo.ratios import Tokens, behaviour_weight, log_ratio, padded_tokens
from gdpo.terms import EntropyTerm, EssScaling, KlTerm


@dataclass(frozen=True)
class PolicyLoss:
    """The result of `policy_loss`."""

    loss: Tensor
    """0-dim, to be minimised."""
    record: TokenRecord
    """What happened to each token, row by row, for `gdpo.metrics_by_staleness`."""

    @cached_property
    def metrics(self) -> dict[str, Tensor]:
        """0-dim tensors without a gradient: those of `gdpo.metrics.token_metrics`."""
        return token_metrics(self.record)


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
    tokens, chosen = padded_tokens(
        logprobs, advantages, mask, behaviour_logprobs, proximal_logprobs
    )
    if kl is not None:
        reference_N = chosen("reference_logprobs", kl.reference_logprobs)
        kl = replace(kl, reference_logprobs=reference_N)
    if entropy is not None:
        entropy = replace(entropy, entropy=chosen("entropy", entropy.entropy))
    return packed_policy_loss(
        tokens,
        correction=correction,
        aggregation=aggregation,
        kl=kl,
        entropy=entropy,
        ess_scaling=ess_scaling,
        max_length=max_length,
        denominator=denominator,
    )


def packed_policy_loss(
    tokens: Tokens,
    *,
    correction: Correction = DEFAULT_CORRECTION,
    aggregation: str = "token_mean",
    kl: KlTerm | None = None,
    entropy: EntropyTerm | None = None,
    ess_scaling: EssScaling | None = None,
    max_length: int | None = None,
    denominator: float | Tensor | None = None,
) -> PolicyLoss:
    """Compute what `policy_loss` does from tokens without padding; the terms hold tensors [N].

    Arguments and errors are those of `policy_loss`.
    """
    _check_needs(correction, aggregation, tokens)
    objective = correction.objective(tokens)
    value_N, reference_kl_N, entropy_N = objective.value_N, None, None
    if kl is not None:
        reference_kl_N = kl.per_token(tokens)
        value_N = value_N - kl.coefficient * reference_kl_N
    if entropy is not None:
        entropy_N = entropy.per_token(tokens)
        value_N = value_N + entropy.coefficient * entropy_N
    record = _record(tokens, objective, reference_kl_N, entropy_N)
    if denominator is None:
        denominator = loss_denominator(
            tokens.lengths_B, aggregation=aggregation, max_length=max_length
        )
    loss = -AGGREGATIONS[aggregation](value_N, tokens) / denominator
    if ess_scaling is not None:
        ess = effective_sample_size(record.weight_N) if ess_scaling.ess is None else ess_scaling.ess
        loss = loss * ess**0.5
    return PolicyLoss(loss=loss, record=record)


def loss_denominator(
    lengths: Tensor, *, aggregation: str = "token_mean", max_length: int | None = None
) -> Tensor:
    """Compute the divisor of a loss summed over these sequences: a 0-dim tensor, at least 1.

    `token_mean`: the number of tokens; `sequence_mean`: of sequences that have one; `constant`:
    B * max_length.

    Args:
        lengths: [B], tokens of each sequence that the policy chose: `mask.sum(-1)`.
        aggregation: a name in `gdpo.AGGREGATIONS`.
        max_length: tokens in the longest possible response.

    Raises ValueError where `constant` lacks its max_length, or lengths are not [B].
    """
    if lengths.dim() != 1:
        raise ValueError(f"lengths has shape {tuple(lengths.shape)}: give [sequences]")
    if aggregation == "constant":
        if max_length is None or max_length < 1:
            raise ValueError(
                f"aggregation 'constant' needs max_length, the tokens in the longest possible "
                f"response: got {max_length}"
            )
        return torch.tensor(float(max(len(lengths), 1) * max_length), device=lengths.device)
    counted_B = lengths > 0 if aggregation == "sequence_mean" else lengths
    return counted_B.sum().clamp(min=1)


def _sum_of_tokens(value_N: Tensor, tokens: Tokens) -> Tensor:
    return value_N.sum()


def _sum_of_sequence_means(value_N: Tensor, tokens: Tokens) -> Tensor:
    return (tokens.sums(value_N) / tokens.lengths_B.clamp(min=1)).sum()


AGGREGATIONS: dict[str, Callable[[Tensor, Tokens], Tensor]] = {
    "token_mean": _sum_of_tokens,
    "sequence_mean": _sum_of_sequence_means,
    "constant": _sum_of_tokens,
}
"""Every aggregation by the name that a configuration uses: how the values [N] are added up.

`token_mean` weighs all tokens alike (DAPO, arXiv 2503.14476), `sequence_mean` all sequences (GRPO,
arXiv 2402.03300, eq. 3), `constant` divides by B * max_length (Dr. GRPO, arXiv 2503.20783);
`gdpo.loss_denominator` has the divisors.
"""


def _record(
    tokens: Tokens,
    objective: Objective,
    reference_kl_N: Tensor | None,
    entropy_N: Tensor | None,
) -> TokenRecord:
    nowhere_N = torch.zeros_like(tokens.policy_N, dtype=torch.bool)

    def given(chosen_N: Tensor | None) -> Tensor:
        return nowhere_N if chosen_N is None else chosen_N

    return TokenRecord(
        weight_N=behaviour_weight(tokens),
        ratio_N=objective.ratio_N,
        log_rho_N=log_ratio(tokens.policy_N.detach(), tokens.behaviour_N),
        truncated_N=given(objective.truncated_N),
        clipped_low_N=given(objective.clipped_low_N),
        clipped_high_N=given(objective.clipped_high_N),
        masked_low_N=given(objective.masked_low_N),
        masked_high_N=given(objective.masked_high_N),
        reference_kl_N=None if reference_kl_N is None else reference_kl_N.detach(),
        entropy_N=None if entropy_N is None else entropy_N.detach(),
    )


def _check_needs(correction: Correction, aggregation: str, tokens: Tokens) -> None:
    if not isinstance(correction, Correction):
        raise TypeError(
            f"correction is {correction!r}: use one of {', '.join(CORRECTIONS)} as an object, such "
            "as gdpo.Icepop()"
        )
    if aggregation not in AGGREGATIONS:
        raise ValueError(
            f"unknown aggregation {aggregation!r}: use one of {', '.join(AGGREGATIONS)}"
        )
    if correction.needs_proximal and tokens.proximal_N is None:
        raise ValueError(
            f"correction {correction.name!r} needs proximal_logprobs: pass the log-probabilities "
            "of the tokens under the policy as it was at the start of this training batch (with "
            "one update per batch, logprobs.detach()), or `interpolated_proximal`"
        )
