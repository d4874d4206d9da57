"""Statistics over the tokens that a mask selects.

Shapes: B sequences, T token positions. All results are 0-dim tensors on the input's device, so
that reading them, not computing them, is what waits for the device.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor


def effective_sample_size(weights_BT: Tensor, mask: Tensor) -> Tensor:
    """Share of the samples that the importance weights leave in effect, from 1/n to 1.

        ESS = (sum w)^2 / (n sum w^2),  over the n tokens of the mask

    Source: Kish, "Survey Sampling", 1965. With no token at all it is 1: nothing is weighted
    unevenly, and 0 would raise an alarm. Weights must not be negative.

    Raises ValueError where the shapes differ.
    """
    if weights_BT.shape != mask.shape:
        raise ValueError(
            f"mask has shape {tuple(mask.shape)}, weights {tuple(weights_BT.shape)}: "
            "give a mask with one entry for each weight"
        )
    mask_BT = mask.bool()
    if mask_BT.numel() == 0:
        return torch.ones((), device=weights_BT.device)
    kept_BT = torch.where(mask_BT, weights_BT.detach(), 0.0).float()
    # Relative to the largest, because squares of large weights overflow float32.
    relative_BT = kept_BT / kept_BT.amax().clamp(min=torch.finfo(torch.float32).tiny)
    count = mask_BT.sum()
    # The largest weight alone makes the sum of squares 1, unless every weight is 0.
    sum_of_squares = relative_BT.square().sum().clamp(min=1)
    ess = relative_BT.sum().square() / (count.clamp(min=1) * sum_of_squares)
    return torch.where(count > 0, ess, 1.0)


def masked_mean(values_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Mean over the tokens of the mask; 0 when there are none."""
    return torch.where(mask_BT, values_BT, 0.0).sum() / mask_BT.sum().clamp(min=1)


def masked_max(values_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Largest of non-negative values over the tokens of the mask; 0 when there are none."""
    return torch.where(mask_BT, values_BT, 0.0).amax()


@dataclass(frozen=True)
class TokenRecord:
    """What a loss did to each token of [B, T], without a gradient."""

    mask_BT: Tensor
    """bool, True where the policy chose the token; elsewhere the other fields mean nothing."""
    weight_BT: Tensor
    """w before it is truncated; rho where there was no pi_prox."""
    ratio_BT: Tensor
    """The ratio that carries the gradient, r or rho."""
    log_rho_BT: Tensor
    """log pi - log mu"""
    truncated_BT: Tensor
    """bool, as are those below: see `gdpo.corrections.Objective`."""
    clipped_low_BT: Tensor
    clipped_high_BT: Tensor
    masked_low_BT: Tensor
    masked_high_BT: Tensor


def token_metrics(record: TokenRecord) -> dict[str, Tensor]:
    """Compute 0-dim metrics over the tokens of the mask.

        ess, weight_mean, weight_max       of w before it is truncated; of rho without pi_prox
        weight_truncated_share             tokens whose weight was truncated
        ratio_mean, ratio_max              of the ratio that carries the gradient
        clip_low_share, clip_high_share    tokens whose gradient the clip removed, by the side ...
        mask_low_share, mask_high_share    ... on which they were out; those that a mask removed
        mismatch_kl                        mean of rho - log rho - 1 (k3, estimates KL(mu || pi))
        tokens                             their number

    Without any token, `ess` is 1 and the others 0.
    """
    mask_BT, log_rho_BT = record.mask_BT, record.log_rho_BT

    def share(chosen_BT: Tensor) -> Tensor:
        return masked_mean(chosen_BT.float(), mask_BT)

    return {
        "ess": effective_sample_size(record.weight_BT, mask_BT),
        "weight_mean": masked_mean(record.weight_BT, mask_BT),
        "weight_max": masked_max(record.weight_BT, mask_BT),
        "weight_truncated_share": share(record.truncated_BT),
        "ratio_mean": masked_mean(record.ratio_BT, mask_BT),
        "ratio_max": masked_max(record.ratio_BT, mask_BT),
        "clip_low_share": share(record.clipped_low_BT),
        "clip_high_share": share(record.clipped_high_BT),
        "mask_low_share": share(record.masked_low_BT),
        "mask_high_share": share(record.masked_high_BT),
        # expm1, because rho - log rho - 1 loses every digit where rho is nearly 1.
        "mismatch_kl": masked_mean(log_rho_BT.expm1() - log_rho_BT, mask_BT),
        "tokens": mask_BT.sum(),
    }


def metrics_by_staleness(
    records: Sequence[TokenRecord],
    staleness: Sequence[Tensor],
    buckets: Sequence[int] = (0, 1, 2, 4, 8, 16),
) -> dict[str, float]:
    """The metrics of `policy_loss` for the tokens of each range of staleness.

        staleness/<range>/<metric>      ranges 0, 1, 2-3, 4-7, 8-15, 16+ of the default buckets

    A range without tokens is left out. Ratios of means do not add up over microbatches, so this
    takes the records of all of them at once.

    Args:
        records: `PolicyLoss.record` of each microbatch.
        staleness: of each microbatch, integer [B] or [B, T], the trainer's version minus the
            version that sampled it. Masked positions may hold anything.
        buckets: the lowest staleness of each range, upwards from 0.

    Raises ValueError for buckets out of order, a negative staleness, or what does not match.
    """
    if list(buckets) != sorted(set(buckets)) or buckets[:1] not in ([0], (0,)):
        raise ValueError(f"buckets is {tuple(buckets)}: start at 0 and go up")
    if len(records) != len(staleness) or not records:
        raise ValueError(
            f"there are {len(records)} records and {len(staleness)} tensors of staleness: give "
            "one for each microbatch"
        )
    whole = _join(records)
    staleness_1N = torch.cat([_of_tokens(*pair) for pair in zip(records, staleness, strict=True)])[
        None
    ]
    if bool((whole.mask_BT & (staleness_1N < 0)).any()):
        raise ValueError("staleness is negative: a token claims a version that is yet to come")
    result: dict[str, float] = {}
    for low, high in zip(buckets, [*buckets[1:], None], strict=True):
        inside_1N = whole.mask_BT & (staleness_1N >= low)
        if high is not None:
            inside_1N &= staleness_1N < high
        if bool(inside_1N.any()):
            part = token_metrics(replace(whole, mask_BT=inside_1N))
            label = f"staleness/{_range_name(low, high)}"
            result |= {f"{label}/{name}": float(value) for name, value in part.items()}
    return result


def _join(records: Sequence[TokenRecord]) -> TokenRecord:
    """All tokens as one row: microbatches differ in length."""
    return TokenRecord(
        **{
            field.name: torch.cat([getattr(record, field.name).flatten() for record in records])[
                None
            ]
            for field in fields(TokenRecord)
        }
    )


def _of_tokens(record: TokenRecord, staleness: Tensor) -> Tensor:
    shape = record.mask_BT.shape
    if staleness.shape not in (shape, shape[:1]):
        raise ValueError(
            f"staleness has shape {tuple(staleness.shape)}, its record {tuple(shape)}: give one "
            "entry for each sequence or for each token"
        )
    staleness_BT = staleness[:, None] if staleness.dim() == 1 else staleness
    return staleness_BT.expand(shape).flatten()


def _range_name(low: int, high: int | None) -> str:
    if high is None:
        return f"{low}+"
    return str(low) if high == low + 1 else f"{low}-{high - 1}"
