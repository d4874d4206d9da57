"""Groups of random tokens as one packed row: prompts once, or in front of every completion.

Shapes: N tokens in the row, S segments, T tokens that are predicted.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Group:
    """A prompt and its completions, each a vector of tokens."""

    prompt: Tensor
    completions: Sequence[Tensor]


def make_groups(
    lengths: Sequence[tuple[int, Sequence[int]]], vocabulary: int, device: torch.device
) -> list[Group]:
    """Return random tokens, the same every time, for lengths of prompts and completions."""
    generator = torch.Generator().manual_seed(0)

    def tokens(length: int) -> Tensor:
        return torch.randint(vocabulary, (length,), generator=generator).to(device)

    return [Group(tokens(p), [tokens(length) for length in cs]) for p, cs in lengths]


@dataclass(frozen=True, eq=False)
class Row:
    """Segments of tokens; each sees the whole of its parent, and itself causally."""

    tokens_N: Tensor
    positions_N: Tensor
    segments: tuple[tuple[int, int, int], ...]
    """First token, the one after the last, and index of the parent, -1 without one."""
    source_T: Tensor
    """Where the output is that predicts a token."""
    target_T: Tensor
    """That token."""

    def keys(self, index: int) -> list[tuple[int, int]]:
        """Return the ranges of tokens that a segment sees."""
        start, stop, parent = self.segments[index]
        return [*([self.segments[parent][:2]] if parent >= 0 else []), (start, stop)]

    @cached_property
    def num_pairs(self) -> int:
        """Pairs of a token and one that it sees."""
        pairs = 0
        for index, (start, stop, _) in enumerate(self.segments):
            own = stop - start
            seen = sum(b - a for a, b in self.keys(index))
            pairs += own * (seen - own) + own * (own + 1) // 2
        return pairs

    @cached_property
    def key_index(self) -> Tensor:
        """Places of all keys, segment after segment."""
        device = self.tokens_N.device
        ranges = [r for index in range(len(self.segments)) for r in self.keys(index)]
        return torch.cat([torch.arange(*r, device=device) for r in ranges])

    @cached_property
    def lengths(self) -> tuple[list[int], list[int]]:
        """Numbers of queries and of keys of every segment."""
        queries = [stop - start for start, stop, _ in self.segments]
        keys = [sum(b - a for a, b in self.keys(i)) for i in range(len(self.segments))]
        return queries, keys

    @cached_property
    def offsets(self) -> tuple[Tensor, Tensor]:
        """Two of int32 [S + 1]: where the queries and the keys of a segment begin."""
        device = self.tokens_N.device
        first, second = (
            torch.tensor([0, *lengths], device=device).cumsum(0).int() for lengths in self.lengths
        )
        return first, second

    @cached_property
    def owners(self) -> tuple[Tensor, Tensor]:
        """[N] each: the segment of every token, and the parent of that, -2 without one."""
        queries = torch.tensor(self.lengths[0])
        parents = torch.tensor([p if p >= 0 else -2 for _, _, p in self.segments])
        device = self.tokens_N.device
        own = torch.arange(len(queries)).repeat_interleave(queries).to(device)
        return own, parents.repeat_interleave(queries).to(device)

    def mask(self) -> Tensor:
        """Return bool [N, N]: whether the first token sees the second; for short rows."""
        own, parent = self.owners
        place = torch.arange(len(own), device=own.device)
        causal = (own[:, None] == own[None]) & (place[:, None] >= place[None])
        return causal | (parent[:, None] == own[None])


def shared_row(groups: Sequence[Group]) -> Row:
    """Each prompt once, its completions behind it."""
    builder = _Builder()
    for group in groups:
        root = builder.add(group.prompt, -1, 0)
        last = builder.size - 1
        for completion in group.completions:
            begin = builder.size
            builder.add(completion, root, len(group.prompt))
            builder.predict([last, *range(begin, builder.size - 1)], completion)
    return builder.row()


def plain_row(groups: Sequence[Group]) -> Row:
    """Each sequence whole."""
    builder = _Builder()
    for group in groups:
        for completion in group.completions:
            begin = builder.size + len(group.prompt) - 1
            builder.add(torch.cat([group.prompt, completion]), -1, 0)
            builder.predict(list(range(begin, builder.size - 1)), completion)
    return builder.row()


class _Builder:
    def __init__(self) -> None:
        self.size = 0
        self._tokens: list[Tensor] = []
        self._positions: list[Tensor] = []
        self._segments: list[tuple[int, int, int]] = []
        self._sources: list[int] = []
        self._targets: list[Tensor] = []

    def add(self, tokens: Tensor, parent: int, position: int) -> int:
        """Append a segment; returns its index."""
        positions = torch.arange(position, position + len(tokens), device=tokens.device)
        self._tokens.append(tokens)
        self._positions.append(positions)
        self._segments.append((self.size, self.size + len(tokens), parent))
        self.size += len(tokens)
        return len(self._segments) - 1

    def predict(self, sources: list[int], targets: Tensor) -> None:
        self._sources += sources
        self._targets.append(targets)

    def row(self) -> Row:
        tokens = torch.cat(self._tokens)
        return Row(
            tokens,
            torch.cat(self._positions),
            tuple(self._segments),
            torch.tensor(self._sources, device=tokens.device),
            torch.cat(self._targets),
        )
