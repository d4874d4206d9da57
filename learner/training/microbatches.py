"""From the records of microbatches to the metrics of a step, whatever the split.

Shapes: N tokens of a microbatch.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch

import gdpo
from learner.training.ranks import Ranks


@dataclass(frozen=True, slots=True, eq=False)
class Microbatch:
    """What a microbatch leaves for the metrics."""

    record: gdpo.TokenRecord
    versions_N: torch.Tensor
    """int32: version of the policy that sampled the token."""


def of_all_ranks(parts: list[Microbatch], ranks: Ranks) -> list[Microbatch]:
    """The microbatches of all ranks, which have the same number of them; one for each rank."""
    if ranks.size == 1 or not parts:
        return parts
    record = gdpo.join_records([part.record for part in parts])
    given = {
        field.name: values
        for field in fields(record)
        if (values := getattr(record, field.name)) is not None
    }
    columns = [torch.cat([part.versions_N for part in parts])]
    for values_N in given.values():
        # As int32, bit by bit: a rank without a token must not turn them into something else.
        is_bool = values_N.dtype == torch.bool
        columns.append(values_N.int() if is_bool else values_N.float().view(torch.int32))
    joined = []
    for versions_N, *received in ranks.join(torch.stack(columns)):
        theirs = {
            name: each_N.bool() if own_N.dtype == torch.bool else each_N.view(torch.float32)
            for (name, own_N), each_N in zip(given.items(), received, strict=True)
        }
        joined.append(Microbatch(replace(record, **theirs), versions_N))
    return joined


def whole_ess(parts: Sequence[Microbatch]) -> float:
    """Effective sample size of a minibatch: it does not add up over its microbatches."""
    if not parts:
        return 1.0
    weights_N = torch.cat([part.record.weight_N for part in parts])
    return gdpo.effective_sample_size(weights_N).item()


def lag0_difference(parts: Sequence[Microbatch], version: int) -> float | None:
    """Largest |log rho| among tokens that were sampled from exactly this version."""
    differences = [
        part.record.log_rho_N[fresh_N].abs().max().item()
        for part in parts
        if (fresh_N := part.versions_N == version).any()
    ]
    return max(differences, default=None)


def step_metrics(parts: Sequence[Microbatch], version: int) -> dict[str, float]:
    """Metrics of all tokens of a step, and by how many versions before ``version`` they are.

    Empty if it had none.
    """
    if not parts:
        return {}
    record = gdpo.join_records([part.record for part in parts])
    versions_N = torch.cat([part.versions_N for part in parts])
    metrics = {name: value.item() for name, value in gdpo.token_metrics(record).items()}
    return metrics | gdpo.metrics_by_staleness(record, version - versions_N)
