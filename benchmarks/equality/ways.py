"""Log-probabilities and gradients of one model, computed in every way."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.equality.data import LONGEST, chains, make_forest, singles
from benchmarks.equality.families import Family, make_family
from learner.packing.attention import PACKED
from learner.packing.choice import PLAIN, choose
from learner.packing.forward import Forward, Way
from learner.packing.trees import TokenTree
from learner.training.memory import prepare_layers

EXACT = "eager"
"""The attention of transformers that leaves nothing out."""
TEMPERATURE = 0.8


@dataclass(frozen=True, slots=True)
class Difference:
    """The largest difference between two ways."""

    logprobs: float
    gradients: float


@dataclass(frozen=True, slots=True)
class Ways:
    """What was found of a family."""

    way: Way
    """The learner's own."""
    shared: Difference
    alone: Difference | None
    padded: Difference | None
    """None where the family cannot be computed so."""
    head: Difference
    checkpointed: Difference


def compare_ways(family: Family) -> Ways:
    """Compute the same trees in every way that the family has."""
    model = make_family(family)
    way = choose(model, LONGEST)
    own = model.config._attn_implementation
    forest = make_forest()
    truth = compute(model, PLAIN, EXACT, singles(forest))
    passes = singles(forest) if way.max_sequences else forest
    shared = compute(model, way, own, passes)
    plain_head = compute(model, replace(way, fused_head=not way.fused_head), own, passes)
    alone = padded = None
    if way.packed:
        alone = difference(truth, compute(model, way, PACKED, chains(forest)))
    if not way.max_sequences:
        rows = replace(way, packed=False)
        padded = difference(truth, compute(model, rows, EXACT, forest))
    prepare_layers(model, checkpointed=True, compiled=False)
    return Ways(
        way=way,
        shared=difference(truth, shared),
        alone=alone,
        padded=padded,
        head=difference(shared, plain_head),
        checkpointed=difference(shared, compute(model, way, own, passes)),
    )


Passes = Sequence[Sequence[TokenTree]]
"""What goes through the model at once."""
Computed = tuple[Tensor, Tensor]
"""Log-probabilities [N] in the order of sequences, and the gradient of all weights."""


def compute(
    model: Any, way: Way, attention: str, passes: Sequence[Sequence[TokenTree]]
) -> Computed:
    """Log-probabilities, and the gradient of their sum with random weights."""
    model.set_attn_implementation(attention)
    model.zero_grad()
    forward = Forward(way, TEMPERATURE)
    rows = [forward.rows(trees, torch.device("cpu")) for trees in passes]
    sizes = [len(each.target_N) for each in rows]
    weight_N = torch.randn(sum(sizes), generator=torch.Generator().manual_seed(0))
    logprobs: list[Tensor] = []
    for each, weight_n in zip(rows, torch.split(weight_N, sizes), strict=True):
        part_N = forward.logprobs(model, each)
        torch.dot(part_N, weight_n).backward()
        logprobs.append(part_N.detach())
    gradients = [
        torch.zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in model.parameters()
    ]
    return torch.cat(logprobs), torch.cat(gradients)


def difference(truth: Computed, other: Computed) -> Difference:
    logprobs = (truth[0] - other[0]).abs().max().item()
    gradients = (truth[1] - other[1]).abs().max() / truth[1].abs().max()
    return Difference(logprobs, gradients.item())
