"""Cutting and sharing out trees of tokens."""

from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from learner.packing.budget import Budget
from learner.packing.forward import Way
from learner.packing.split import Work, split
from learner.packing.trees import microbatches, tree_of
from protocol.groups import Group, Rollout
from tests.unit.learner.packing.random_trees import contexts, trees

PADDED = Way(packed=False, fused_head=True)


def all_contexts(parts):
    return Counter(context for tree in parts for context in contexts(tree))


def num_sequences(tree) -> int:
    parents = {segment.parent for segment in tree.segments}
    return sum(i not in parents for i in range(len(tree.segments)))


@given(trees(), st.integers(0, 40))
def test_pieces_train_the_same_tokens_in_the_same_contexts(tree, max_tokens):
    pieces = list(tree.pieces(max_tokens))
    assert all_contexts(pieces) == all_contexts([tree])
    assert sum(num_sequences(piece) for piece in pieces) == num_sequences(tree)
    for piece in pieces:
        assert piece.num_tokens <= max_tokens or num_sequences(piece) == 1


@given(trees())
def test_chains_have_one_sequence_each(tree):
    chains = list(tree.chains())
    assert [num_sequences(chain) for chain in chains] == [1] * num_sequences(tree)
    assert all_contexts(chains) == all_contexts([tree])


@given(trees())
def test_pairs_are_those_that_attention_computes(tree):
    pairs = 0
    for segment, before in zip(tree.segments, tree.lengths_before, strict=True):
        length = len(segment.tokens)
        pairs += sum(before + place + 1 for place in range(length))
    # Half a token for each segment is rounded away.
    assert abs(tree.num_pairs - pairs) <= sum(len(s.tokens) for s in tree.segments)


@given(st.lists(trees(), min_size=1, max_size=5), st.integers(1, 60), st.booleans())
def test_a_split_loses_nothing_and_keeps_to_its_budget(forest, max_tokens, packed):
    way = Way(packed=True, fused_head=True) if packed else PADDED
    parts = split(forest, way, Budget(max_tokens, max_tokens), Work(pair=0.01))
    assert all_contexts([tree for part in parts for tree in part]) == all_contexts(forest)
    for part in parts:
        tokens = sum(tree.num_tokens for tree in part)
        if not packed:
            tokens = len(part) * max(tree.num_tokens for tree in part)
        assert tokens <= max_tokens or (len(part) == 1 and num_sequences(part[0]) == 1)


@given(
    st.lists(trees(), min_size=1, max_size=5),
    st.integers(1, 60),
    st.booleans(),
    st.integers(2, 4),
)
def test_ranks_get_as_many_parts_each_that_cost_alike(forest, max_tokens, packed, ranks):
    way = Way(packed=True, fused_head=True) if packed else PADDED
    cost = Work(pair=0.01)
    parts = split(forest, way, Budget(max_tokens, max_tokens), cost, ranks)
    assert len(parts) % ranks == 0
    assert all_contexts([tree for part in parts for tree in part]) == all_contexts(forest)
    if packed:
        costs = [sum(map(cost, part)) for part in parts]
        assert costs == sorted(costs, reverse=True)
    # Nobody waits for a rank that has all of it, where there is something to share.
    if sum(map(num_sequences, forest)) > 1:
        assert sum(1 for part in parts[:ranks] if part) > 1


@given(st.lists(trees(), min_size=1, max_size=5), st.integers(1, 60), st.integers(0, 60))
def test_a_pass_is_quick_unless_that_repeats_too_much(forest, quick, more):
    """The smallest number of tokens with little to compute twice; or what the memory holds."""
    budget = Budget(most=quick + more, quick=quick)
    whole = sum(tree.num_tokens for tree in forest)

    def computed(tokens: int) -> int:
        return sum(piece.num_tokens for tree in forest for piece in tree.pieces(tokens))

    tokens = budget.of(forest)
    assert quick <= tokens <= budget.most
    assert tokens == budget.most or computed(tokens) <= 1.15 * whole
    assert tokens == quick or computed(quick) > 1.15 * whole


@given(st.lists(trees(), min_size=1, max_size=5))
def test_where_one_sequence_is_allowed_there_is_one(forest):
    way = Way(packed=False, fused_head=True, max_sequences=1)
    parts = split(forest, way, Budget(10_000, 10_000), Work(pair=0.01))
    assert [len(part) for part in parts] == [1] * sum(map(num_sequences, forest))


@given(st.lists(st.integers(1, 400), min_size=8, max_size=60))
def test_microbatches_cost_about_the_same(lengths):
    rollouts = [
        Rollout(
            tokens=np.zeros(length, dtype=np.int32),
            logprobs=np.zeros(length, dtype=np.float32),
            spans=((0, 0),),
            finish="stop",
        )
        for length in lengths
    ]
    prompt, scores = np.zeros(1, dtype=np.int32), np.zeros((1, 1), dtype=np.float32)
    forest = [
        tree_of(Group(i, prompt, (rollout,), ("a",), scores), i)
        for i, rollout in enumerate(rollouts)
    ]
    cost = Work(pair=0.0)
    parts = microbatches(forest, 1000, cost)
    costs = [sum(map(cost, part)) for part in parts]
    # The last tree of the dearest part came when that was the cheapest.
    assert max(costs) - min(costs) <= max(map(cost, forest))


def test_a_group_is_its_prompt_once_and_its_rollouts():
    rollout = Rollout(
        tokens=np.array([3, 4, 5, 6], dtype=np.int32),
        logprobs=np.array([-1, -2, -3, -4], dtype=np.float32),
        spans=((0, 2), (3, 5)),
        finish="stop",
    )
    scores = np.zeros((2, 1), dtype=np.float32)
    group = Group(1, np.array([8, 9], dtype=np.int32), (rollout, rollout), ("a",), scores)
    tree = tree_of(group, 10)
    assert tree.num_tokens == 2 + 2 * 4
    assert contexts(tree)[:4] == [
        ((8, 9), 3, 10, -1.0, 2),
        ((8, 9, 3), 4, 10, -2.0, 2),
        ((8, 9, 3, 4), 5, 10, -3.0, 2),
        ((8, 9, 3, 4, 5), 6, 10, -4.0, 5),
    ]
    assert {context[2] for context in contexts(tree)[4:]} == {11}
