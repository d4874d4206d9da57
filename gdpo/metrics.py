"""Statistics over the tokens that the policy chose.

Shapes: N tokens. All results are 0-dim tensors on the input's device, so that reading them, not
computing them, is what waits for the device.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor


def effective_sample_size(weights: Tensor, mask: Tensor | None = None) -> Tensor:
    """Share of the samples that the importance weights leave in effect, from 1/n to 1.

        ESS = (sum w)^2 / (n sum w^2),  over the n tokens of the mask, or all

    Source: Kish, "Survey Sampling", 1965. With no token at all it is 1: nothing is weighted
    unevenly, and 0 would raise an alarm. Weights must not be negative.

    Raises ValueError where the shapes differ.
    """
    if mask is not None and weights.shape != mask.shape:
        raise ValueError(
            f"mask has shape {tuple(mask.shape)}, weights {tuple(weights.shape)}: "
            "give a mask with one entry for each weight"
        )
    kept_N = weights.detach().flatten() if mask is None else weights.detach()[mask.bool()]
    if len(kept_N) == 0:
        return torch.ones((), device=weights.device)
    # Relative to the largest, because squares of large weights overflow float32.
    kept_N = kept_N.float()
    relative_N = kept_N / kept_N.amax().clamp(min=torch.finfo(torch.float32).tiny)
    # The largest weight alone makes the sum of squares 1, unless every weight is 0.
    sum_of_squares = relative_N.square().sum().clamp(min=1)
    return relative_N.sum().square() / (len(kept_N) * sum_of_squares)


def mean_or_zero(values_N: Tensor) -> Tensor:
    """Mean of the values; 0 when there are none."""
    return values_N.sum() / max(len(values_N), 1)


def max_or_zero(values_N: Tensor) -> Tensor:
    """Largest of the values; 0 when there are none."""
    return values_N.amax() if len(values_N) else values_N.new_zeros(())


@dataclass(frozen=True)
class TokenRecord:
    """What a loss did to each of its N tokens, without a gradient."""

    weight_N: Tensor
    """w before it is truncated; rho where there was no pi_prox."""
    ratio_N: Tensor
    """The ratio that carries the gradient, r or rho."""
    log_rho_N: Tensor
    """log pi - log mu"""
    truncated_N: Tensor
    """bool, as are those below: see `gdpo.objectives.Objective`."""
    clipped_low_N: Tensor
    clipped_high_N: Tensor
    masked_low_N: Tensor
    masked_high_N: Tensor
    reference_kl_N: Tensor | None = None
    """The estimate of the divergence from a reference, where the loss had that term."""
    entropy_N: Tensor | None = None
    """The entropy in nats, where the loss had that term."""

    def where(self, chosen_N: Tensor) -> "TokenRecord":
        """The tokens for which this is true."""
        given = {name: x for name, x in self._tensors().items() if x is not None}
        return replace(self, **{name: x[chosen_N] for name, x in given.items()})

    def _tensors(self) -> dict[str, Tensor | None]:
        return {field.name: getattr(self, field.name) for field in fields(self)}


def join_records(records: Sequence[TokenRecord]) -> TokenRecord:
    """All tokens of losses that have the same terms; there must be one at least.

    Metrics of a minibatch are those of its joined parts: ratios of means do not add up.
    """
    parts: list[dict[str, Any]] = [record._tensors() for record in records]
    given = [name for name, values in parts[0].items() if values is not None]
    joined: dict[str, Any] = {name: torch.cat([part[name] for part in parts]) for name in given}
    return replace(records[0], **joined)


def token_metrics(record: TokenRecord) -> dict[str, Tensor]:
    """Compute 0-dim metrics over the tokens.

        ess, weight_mean, weight_max       of w before it is truncated; of rho without pi_prox
        weight_truncated_share             tokens whose weight was truncated
        ratio_mean, ratio_max              of the ratio that carries the gradient
        clip_low_share, clip_high_share    tokens whose gradient the clip removed, by the side ...
        mask_low_share, mask_high_share    ... on which they were out; those that a mask removed
        mismatch_kl                        mean of rho - log rho - 1 (k3, estimates KL(mu || pi))
        reference_kl, entropy              their means, where the loss had these terms
        tokens                             their number

    Without any token, `ess` is 1 and the others 0.
    """
    log_rho_N = record.log_rho_N

    def share(chosen_N: Tensor) -> Tensor:
        return mean_or_zero(chosen_N.float())

    metrics = {
        "ess": effective_sample_size(record.weight_N),
        "weight_mean": mean_or_zero(record.weight_N),
        "weight_max": max_or_zero(record.weight_N),
        "weight_truncated_share": share(record.truncated_N),
        "ratio_mean": mean_or_zero(record.ratio_N),
        "ratio_max": max_or_zero(record.ratio_N),
        "clip_low_share": share(record.clipped_low_N),
        "clip_high_share": share(record.clipped_high_N),
        "mask_low_share": share(record.masked_low_N),
        "mask_high_share": share(record.masked_high_N),
        # expm1, because rho - log rho - 1 loses every digit where rho is nearly 1.
        "mismatch_kl": mean_or_zero(log_rho_N.expm1() - log_rho_N),
        "tokens": torch.tensor(len(log_rho_N)),
    }
    if record.reference_kl_N is not None:
        metrics["reference_kl"] = mean_or_zero(record.reference_kl_N)
    if record.entropy_N is not None:
        metrics["entropy"] = mean_or_zero(record.entropy_N)
    return metrics


def metrics_by_staleness(
    record: TokenRecord, staleness_N: Tensor, buckets: Sequence[int] = (0, 1, 2, 4, 8, 16)
) -> dict[str, float]:
    """The metrics of `policy_loss` for the tokens of each range of staleness.

        staleness/<range>/<metric>      ranges 0, 1, 2-3, 4-7, 8-15, 16+ of the default buckets

    A range without tokens is left out.

    Args:
        record: of the whole step: `gdpo.join_records` of `PolicyLoss.record` of each microbatch.
        staleness_N: integer, the trainer's version minus the version that sampled the token.
        buckets: the lowest staleness of each range, upwards from 0.

    Raises ValueError for buckets out of order, a negative staleness, or what does not match.
    """
    if list(buckets) != sorted(set(buckets)) or buckets[:1] not in ([0], (0,)):
        raise ValueError(f"buckets is {tuple(buckets)}: start at 0 and go up")
    if staleness_N.shape != record.log_rho_N.shape:
        raise ValueError(
            f"staleness has shape {tuple(staleness_N.shape)}, its record "
            f"{tuple(record.log_rho_N.shape)}: give one entry for each token"
        )
    if bool((staleness_N < 0).any()):
        raise ValueError("staleness is negative: a token claims a version that is yet to come")
    result: dict[str, float] = {}
    for low, high in zip(buckets, [*buckets[1:], None], strict=True):
        inside_N = staleness_N >= low
        if high is not None:
            inside_N &= staleness_N < high
        if bool(inside_N.any()):
            part = token_metrics(record.where(inside_N))
            label = f"staleness/{_range_name(low, high)}"
            result |= {f"{label}/{name}": float(value) for name, value in part.items()}
    return result


def _range_name(low: int, high: int | None) -> str:
    if high is None:
        return f"{low}+"
    return str(low) if high == low + 1 else f"{low}-{high - 1}"
