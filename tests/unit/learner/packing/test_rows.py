"""Rows hold every trained token in its own context, packed or padded."""

from collections import Counter

import torch
from hypothesis import given
from hypothesis import strategies as st

from learner.packing.layout import Layout
from learner.packing.rows import packed_row, padded_rows
from tests.unit.learner.packing.random_trees import contexts, layout_of, trees

CPU = torch.device("cpu")


def seen_by(layout: Layout, place: int) -> list[int]:
    """The places that a token of a packed row sees, from its path."""
    segment = max(i for i, start in enumerate(layout.starts) if start <= place < layout.stops[i])
    ranges = layout.path(segment)
    return [i for start, stop in ranges for i in range(start, stop) if i <= place]


def trained(rows, context_of):
    return Counter(
        (context_of(source), target, sequence, behaviour, version)
        for source, target, sequence, behaviour, version in zip(
            rows.source_N.tolist(),
            rows.target_N.tolist(),
            rows.sequence_N.tolist(),
            rows.behaviour_N.tolist(),
            rows.versions_N.tolist(),
            strict=True,
        )
    )


@given(st.lists(trees(), min_size=1, max_size=3))
def test_a_packed_row_has_each_token_in_its_context(forest):
    rows = packed_row(forest, CPU)
    layout, positions_RL = rows.layout, rows.positions_RL
    assert layout is not None
    assert positions_RL is not None
    tokens = rows.tokens_RL[0].tolist()
    assert len(tokens) == sum(tree.num_tokens for tree in forest)

    def context(source: int) -> tuple[int, ...]:
        places = seen_by(layout, source)
        # Positions are those in the sequence.
        assert positions_RL[0, places].tolist() == list(range(len(places)))
        return tuple(tokens[place] for place in places)

    expected = Counter(each for tree in forest for each in contexts(tree))
    assert trained(rows, context) == expected


@given(st.lists(trees(), min_size=1, max_size=3))
def test_padded_rows_have_each_token_in_its_context(forest):
    rows = padded_rows([chain for tree in forest for chain in tree.chains()], CPU)
    width = rows.tokens_RL.shape[1]

    def context(source: int) -> tuple[int, ...]:
        row, place = divmod(source, width)
        return tuple(rows.tokens_RL[row, : place + 1].tolist())

    expected = Counter(each for tree in forest for each in contexts(tree))
    assert trained(rows, context) == expected


@given(st.lists(trees(), min_size=1, max_size=3))
def test_chains_and_varlen_say_the_same_as_the_paths(forest):
    layout = layout_of(forest)
    seen = {place: seen_by(layout, place) for place in range(layout.size)}
    chains, varlen = layout.chains(CPU), layout.varlen(CPU)
    assert chains.index_CL.flatten()[chains.place_N].tolist() == list(range(layout.size))
    for place in range(layout.size):
        row, column = divmod(int(chains.place_N[place]), chains.index_CL.shape[1])
        assert chains.index_CL[row, : column + 1].tolist() == seen[place]
    queries, keys = varlen.query_offsets.tolist(), varlen.key_offsets.tolist()
    for index in range(len(queries) - 1):
        num_queries, num_keys = queries[index + 1] - queries[index], keys[index + 1] - keys[index]
        every = varlen.key_index_K[keys[index] : keys[index + 1]].tolist()
        for offset in range(num_queries):
            # The mask stands at the lower right.
            visible = every[: num_keys - num_queries + offset + 1]
            assert visible == seen[queries[index] + offset]
    assert varlen.longest_key == layout.longest
