"""Trees of tokens of any shape, for properties of what packs them."""

from collections.abc import Sequence

import numpy as np
import torch
from hypothesis import strategies as st

from learner.packing.layout import Layout
from learner.packing.rows import packed_row
from learner.packing.trees import Segment, TokenTree

VOCAB = 97


@st.composite
def trees(draw, max_segments: int = 7, max_length: int = 9) -> TokenTree:
    """Depth-first trees whose segments may be empty or sampled in part, but for the root."""
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    num_segments = draw(st.integers(1, max_segments))
    segments: list[Segment] = []
    path: list[int] = []
    for index in range(num_segments):
        parent = -1
        if index:
            # Depth-first: a segment hangs on the one before it or on an ancestor of that.
            path = path[: draw(st.integers(1, len(path)))]
            parent = path[-1]
        path.append(index)
        length = draw(st.integers(0 if index else 1, max_length))
        sampled = random.random(length) < 0.7 if index else np.zeros(length, dtype=np.bool_)
        segments.append(
            Segment(
                parent=parent,
                tokens=random.integers(0, VOCAB, length, dtype=np.int32),
                sequence=index,
                sampled=sampled,
                logprobs=random.random(length, dtype=np.float32),
                versions=random.integers(0, 9, length, dtype=np.int32),
            )
        )
    return TokenTree(tuple(segments))


def layout_of(forest: Sequence[TokenTree]) -> Layout:
    """The layout of trees in one packed row."""
    layout = packed_row(forest, torch.device("cpu")).layout
    assert layout is not None
    return layout


def contexts(tree: TokenTree) -> list[tuple[tuple[int, ...], int, int, float, int]]:
    """Every trained token: those before it, itself, its sequence, log-probability and version."""
    result = []
    for index, segment in enumerate(tree.segments):
        if segment.sampled is None:
            continue
        assert segment.logprobs is not None
        assert segment.versions is not None
        before: list[int] = []
        above = segment.parent
        while above >= 0:
            before = tree.segments[above].tokens.tolist() + before
            above = tree.segments[above].parent
        for place in np.flatnonzero(segment.sampled):
            context = tuple(before + tree.segments[index].tokens[:place].tolist())
            result.append(
                (
                    context,
                    int(segment.tokens[place]),
                    segment.sequence,
                    float(segment.logprobs[place]),
                    int(segment.versions[place]),
                )
            )
    return result
