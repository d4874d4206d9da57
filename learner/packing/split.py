"""From the trees of a minibatch to passes that fit into memory and cost about the same.

A pass is bounded by its tokens, padding included: activations grow with them. Its cost is what
tokens and pairs of tokens cost in the model at hand.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from learner.packing.budget import Budget
from learner.packing.forward import Way
from learner.packing.trees import TokenTree, microbatches


@dataclass(frozen=True, slots=True)
class Work:
    """What a tree costs, in units of a token without attention."""

    pair: float
    """A pair of a token and one that it sees."""

    @classmethod
    def of(cls, model: Any) -> "Work":
        """From a model's shape: 2 operations a parameter and token, 4 a pair, layer and channel."""
        config = model.config.get_text_config()
        embeddings = model.get_input_embeddings().weight.numel()
        parameters = sum(parameter.numel() for parameter in model.parameters()) - embeddings
        width, layers = config.hidden_size, config.num_hidden_layers
        return cls(pair=4 * width * layers / (2 * max(parameters, 1)))

    def __call__(self, tree: TokenTree) -> float:
        """Estimate the cost of computing a tree."""
        return tree.num_tokens + self.pair * tree.num_pairs


def split(
    trees: Sequence[TokenTree],
    way: Way,
    budget: Budget,
    cost: Callable[[TokenTree], float],
    ranks: int = 1,
) -> list[list[TokenTree]]:
    """Share trees out to passes within a budget, one sequence at least in each.

    For several ranks, which wait for each other in every pass: as many for each, what costs alike
    side by side. So rank r takes every ``ranks``-th from the r-th on. Some may be empty.
    """
    if way.packed:
        fair = -(-sum(tree.num_tokens for tree in trees) // ranks)
        parts = microbatches(trees, min(budget.of(trees), fair), cost, ranks)
        if ranks > 1:
            parts.sort(key=lambda part: sum(map(cost, part)), reverse=True)
        return parts
    parts = _padded(trees, way, budget, ranks)
    return parts + [[]] * (-len(parts) % ranks)


def _padded(
    trees: Sequence[TokenTree], way: Way, budget: Budget, ranks: int
) -> list[list[TokenTree]]:
    chains = [chain for tree in trees for chain in tree.chains()]
    # Of similar length together: less padding to compute.
    chains.sort(key=lambda chain: chain.num_tokens, reverse=True)
    parts: list[list[TokenTree]] = []
    limit = min(way.max_sequences or len(chains), -(-len(chains) // ranks))
    for chain in chains:
        rows = len(parts[-1]) + 1 if parts else limit + 1
        if rows > limit or rows * parts[-1][0].num_tokens > budget.quick:
            parts.append([])
        parts[-1].append(chain)
    return parts
