"""From trees of tokens to the tensors of one forward pass.

Shapes: R rows of L tokens in the pass, packed ones R = 1; N trained tokens, which the policy chose.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from learner.packing.layout import Layout
from learner.packing.trees import Segment, TokenTree

_Indices = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """The input of a forward pass, and what of its output is trained."""

    tokens_RL: torch.Tensor
    """int64"""
    positions_RL: torch.Tensor | None
    """int64: position of each token in its sequence; None: that in the row."""
    layout: Layout | None
    """Who sees whom in a packed row; None: each token what stands before it in its row."""
    source_N: torch.Tensor
    """int64: the place in the R * L tokens whose output predicts the token."""
    target_N: torch.Tensor
    """int64: the token."""
    sequence_N: torch.Tensor
    """int64: the sequence that it counts for."""
    behaviour_N: torch.Tensor
    """float32: its log-probability under the policy that sampled it."""
    versions_N: torch.Tensor
    """int32: version of that policy."""


def packed_row(trees: Sequence[TokenTree], device: torch.device) -> Rows:
    """Lay trees out one behind another: no padding, and what sequences share once."""
    parents: list[int] = []
    starts: list[int] = []
    lasts: list[int] = []  # Place of the last token of each segment, or of one before it.
    positions: list[_Indices] = []
    segments: list[Segment] = []
    sources: list[_Indices] = []
    size = 0
    for tree in trees:
        first = len(parents)
        for segment, before in zip(tree.segments, tree.lengths_before, strict=True):
            parent = first + segment.parent if segment.parent >= 0 else -1
            last = lasts[parent] if parent >= 0 else -1
            source = np.arange(size - 1, size - 1 + len(segment.tokens))
            source[:1] = last
            lasts.append(size + len(segment.tokens) - 1 if len(segment.tokens) else last)
            parents.append(parent)
            starts.append(size)
            positions.append(np.arange(before, before + len(segment.tokens)))
            segments.append(segment)
            sources.append(source)
            size += len(segment.tokens)
    layout = Layout(starts=tuple(starts), size=size, parents=tuple(parents))
    tokens = np.concatenate([segment.tokens for segment in segments]).astype(np.int64)
    return _rows(
        tokens[None],
        np.concatenate(positions)[None],
        layout,
        list(zip(segments, sources, strict=True)),
        device,
    )


def padded_rows(chains: Sequence[TokenTree], device: torch.device) -> Rows:
    """Lay out trees of one sequence each, a row for each, padded on the right.

    Causal attention does not see what stands there.
    """
    length = max(chain.num_tokens for chain in chains)
    tokens = np.zeros((len(chains), length), dtype=np.int64)
    sources: list[tuple[Segment, _Indices]] = []
    for row, chain in enumerate(chains):
        assert all(segment.parent == i - 1 for i, segment in enumerate(chain.segments))
        for segment, before in zip(chain.segments, chain.lengths_before, strict=True):
            stop = before + len(segment.tokens)
            tokens[row, before:stop] = segment.tokens
            sources.append((segment, row * length + np.arange(before - 1, stop - 1)))
    return _rows(tokens, None, None, sources, device)


def _rows(
    tokens: npt.NDArray[np.int64],
    positions: npt.NDArray[np.int64] | None,
    layout: Layout | None,
    sources: Sequence[tuple[Segment, _Indices]],
    device: torch.device,
) -> Rows:
    """Take the sampled tokens out of their segments."""
    trained = [(s, s.sampled, source) for s, source in sources if s.sampled is not None]

    def column(values: list[npt.NDArray[np.generic]], dtype: npt.DTypeLike) -> torch.Tensor:
        empty = np.zeros(0, dtype=dtype)
        joined = np.concatenate([empty, *values]).astype(dtype)
        return torch.from_numpy(joined).to(device)

    return Rows(
        tokens_RL=torch.from_numpy(tokens).to(device),
        positions_RL=None if positions is None else torch.from_numpy(positions).to(device),
        layout=layout,
        source_N=column([source[chosen] for _, chosen, source in trained], np.int64),
        target_N=column([s.tokens[chosen] for s, chosen, _ in trained], np.int64),
        sequence_N=column(
            [np.full(int(chosen.sum()), s.sequence) for s, chosen, _ in trained], np.int64
        ),
        behaviour_N=column([_at(s.logprobs, chosen) for s, chosen, _ in trained], np.float32),
        versions_N=column([_at(s.versions, chosen) for s, chosen, _ in trained], np.int32),
    )


def _at(values: npt.NDArray[Any] | None, chosen: npt.NDArray[np.bool_]) -> npt.NDArray[Any]:
    assert values is not None
    return values[chosen]
