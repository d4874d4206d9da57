"""From the groups of a training batch to what the loss needs of them.

Shapes: P groups, G rollouts each, K rewards; B = P * G sequences, group by group.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch

from learner.packing.trees import TokenTree, tree_of
from learner.training.overlong import Overlong, cut_off, trained_on
from protocol.groups import Group


@dataclass(frozen=True, eq=False)
class Batch:
    """The groups of a training batch, as trees of tokens."""

    groups: Sequence[Group]
    overlong: Overlong

    @cached_property
    def scores_PGK(self) -> torch.Tensor:
        """Raw scores, float32; NaN = does not apply."""
        return torch.from_numpy(np.stack([group.scores for group in self.groups]))

    @cached_property
    def cut_PG(self) -> torch.Tensor:
        """bool: the rollout reached the longest completion there may be."""
        return cut_off(self.groups)

    @property
    def num_rollouts(self) -> int:
        """Rollouts of each group, G."""
        return len(self.groups[0].rollouts)

    @property
    def num_tokens(self) -> int:
        """Sampled tokens, those that the loss leaves out included."""
        return sum(group.num_tokens for group in self.groups)

    @cached_property
    def trees(self) -> list[TokenTree]:
        """[P], with sequences numbered through the batch."""
        return [
            _without_untrained(tree_of(group, index * self.num_rollouts), trained_G.tolist())
            for index, (group, trained_G) in enumerate(
                zip(self.groups, self._trained_PG, strict=True)
            )
        ]

    @cached_property
    def lengths_PG(self) -> torch.Tensor:
        """int64: tokens of each sequence that the loss takes."""
        lengths = [[len(rollout.tokens) for rollout in group.rollouts] for group in self.groups]
        return torch.tensor(lengths) * self._trained_PG

    @cached_property
    def _trained_PG(self) -> torch.Tensor:
        return trained_on(self.cut_PG, self.overlong)


def _without_untrained(tree: TokenTree, trained: Sequence[bool]) -> TokenTree:
    """Leave out the completions that the loss does not take: nothing depends on them."""
    if all(trained):
        return tree
    prompt, *completions = tree.segments
    kept = [each for each, use in zip(completions, trained, strict=True) if use]
    return replace(tree, segments=(prompt, *kept))
