"""Trees of random tokens: prompts of given lengths with completions of given lengths behind."""

from collections.abc import Sequence

import numpy as np

from learner.packing.probe import sampled_segment
from learner.packing.trees import Segment, TokenTree

Lengths = tuple[int, Sequence[int]]
"""Tokens of a prompt, and of each of its completions."""


def make_trees(lengths: Sequence[Lengths], vocabulary: int) -> list[TokenTree]:
    """Return random tokens, the same every time; completions are sampled."""
    random = np.random.default_rng(0)

    def segment(parent: int, length: int, sequence: int = -1) -> Segment:
        tokens = random.integers(0, vocabulary, length, dtype=np.int32)
        if sequence < 0:
            return Segment(parent, tokens)
        return sampled_segment(parent, tokens, sequence)

    return [
        TokenTree((segment(-1, prompt), *(segment(0, n, i) for i, n in enumerate(completions))))
        for prompt, completions in lengths
    ]
