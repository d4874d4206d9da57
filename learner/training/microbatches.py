"""From the metrics of microbatches to those of a minibatch and of a step.

Shapes: B sequences of a microbatch, T predicted positions, N sampled tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

import gdpo


@dataclass(frozen=True, slots=True, eq=False)
class Microbatch:
    """What a microbatch leaves for the metrics."""

    record: gdpo.TokenRecord
    versions_BT: torch.Tensor
    """int32: version of the policy that sampled the token."""


def add_metrics(sums: dict[str, float], metrics: dict[str, torch.Tensor], *, share: float) -> None:
    """Add a microbatch's metrics: means by its share of the sequences, maxima as maxima.

    ``sums`` has to begin every entry at 0.
    """
    for name, value in metrics.items():
        if name.endswith("_max"):
            sums[name] = max(sums[name], value.item())
        elif name == "tokens":
            sums[name] += value.item()
        else:
            sums[name] += share * value.item()


def over_minibatches(history: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Reduce each metric of a step's minibatches to one number: the mean, or the largest."""
    return {
        name: max(values) if name.endswith("_max") else sum(values) / len(values)
        for name, values in history.items()
    }


def whole_ess(parts: Sequence[Microbatch]) -> float:
    """Effective sample size of a minibatch: it does not add up over its microbatches."""
    weights_N = torch.cat([part.record.weight_BT[part.record.mask_BT] for part in parts])
    if len(weights_N) == 0:
        return 1.0
    weights_1N = weights_N[None]
    return gdpo.effective_sample_size(weights_1N, torch.ones_like(weights_1N)).item()


def lag0_difference(parts: Sequence[Microbatch], version: int) -> float | None:
    """Largest |log rho| among tokens that were sampled from exactly this version."""
    differences = [
        part.record.log_rho_BT[fresh_BT].abs().max().item()
        for part in parts
        if (fresh_BT := part.record.mask_BT & (part.versions_BT == version)).any()
    ]
    return max(differences, default=None)


def metrics_by_staleness(parts: Sequence[Microbatch], version: int) -> dict[str, float]:
    """Metrics of a step by how many versions before ``version`` its tokens were sampled."""
    return gdpo.metrics_by_staleness(
        [part.record for part in parts], [version - part.versions_BT for part in parts]
    )
