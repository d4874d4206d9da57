"""Random groups and trees, small enough for a mask and larger ones."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.equality.families import VOCAB_SIZE
from learner.packing.trees import Segment, TokenTree, tree_of
from protocol.groups import Group, Rollout

LONGEST = 80
REWARDS = ("format", "correctness")
PROMPTS, ROLLOUTS = (20, 40, 33), 4
"""Tokens of each prompt; completions of each."""
COMPLETIONS = ((3, 13), (12, 40))
"""Shortest and longest completion: trees that attention masks at once, and larger ones."""


def make_forest() -> list[list[TokenTree]]:
    """What goes through a model at once, in three passes: small groups, large ones, deep trees."""
    groups = [make_groups(limits, seed) for seed, limits in enumerate(COMPLETIONS)]
    return [
        *([tree_of(g, i * ROLLOUTS) for i, g in enumerate(each)] for each in groups),
        [deep_tree()],
    ]


def deep_tree() -> TokenTree:
    """Turns of a conversation that part more than once; some of their tokens are sampled."""
    random = np.random.default_rng(9)

    def segment(parent: int, length: int, sequence: int) -> Segment:
        return Segment(
            parent,
            random.integers(0, VOCAB_SIZE, length, dtype=np.int32),
            sequence,
            sampled=random.random(length) < (0.7 if parent >= 0 else 0),
            logprobs=np.zeros(length, dtype=np.float32),
            versions=np.zeros(length, dtype=np.int32),
        )

    return TokenTree(
        tuple(
            segment(*each)
            for each in ((-1, 22, 0), (0, 9, 0), (1, 12, 0), (1, 17, 1), (0, 1, 2), (4, 20, 2))
        )
    )


def make_groups(limits: tuple[int, int], seed: int) -> list[Group]:
    """Groups of random tokens and scores."""
    random = np.random.default_rng(seed)

    def ids(number: int) -> Any:
        return random.integers(0, VOCAB_SIZE, number, dtype=np.int32)

    def rollout(length: int) -> Rollout:
        logprobs = random.normal(-np.log(VOCAB_SIZE), 0.3, length).astype(np.float32)
        return Rollout(ids(length), logprobs, ((0, 0),), "stop")

    return [
        Group(
            lease=index,
            prompt_tokens=ids(prompt),
            rollouts=tuple(rollout(int(n)) for n in random.integers(*limits, ROLLOUTS)),
            reward_names=REWARDS,
            scores=random.random((ROLLOUTS, len(REWARDS)), dtype=np.float32),
        )
        for index, prompt in enumerate(PROMPTS)
    ]


def chains(forest: Sequence[Sequence[TokenTree]]) -> list[list[TokenTree]]:
    """Each sequence as a tree of its own, in the same passes."""
    return [[chain for tree in trees for chain in tree.chains()] for trees in forest]


def singles(forest: Sequence[Sequence[TokenTree]]) -> list[list[TokenTree]]:
    """Each sequence in a pass of its own."""
    return [[chain] for trees in chains(forest) for chain in trees]
