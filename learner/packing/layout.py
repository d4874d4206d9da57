"""Who sees whom in a packed row, in the forms that kernels of attention take.

Shapes: N tokens in the row, S segments, C sequences of at most L tokens.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch


@dataclass(frozen=True, eq=False)
class Layout:
    """Segments of a row in depth-first order: each sees its ancestors, and itself causally."""

    starts: tuple[int, ...]
    """[S] first token of each segment; it ends where the next one starts."""
    size: int
    """N"""
    parents: tuple[int, ...]
    """[S] the segment before it, -1 at the root of a tree."""

    @cached_property
    def stops(self) -> tuple[int, ...]:
        """[S] where each segment ends."""
        return (*self.starts[1:], self.size)

    @cached_property
    def family_stops(self) -> tuple[int, ...]:
        """[S] where the descendants of each segment end, which begin where it ends itself."""
        stops = list(self.stops)
        for segment in range(len(stops) - 1, -1, -1):
            parent = self.parents[segment]
            if parent >= 0:
                stops[parent] = max(stops[parent], stops[segment])
        return tuple(stops)

    @cached_property
    def lengths_before(self) -> tuple[int, ...]:
        """[S] tokens of the ancestors of each segment."""
        before: list[int] = []
        for parent in self.parents:
            own = self.stops[parent] - self.starts[parent]
            before.append(before[parent] + own if parent >= 0 else 0)
        return tuple(before)

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        lengths = np.subtract(self.stops, self.starts)
        return int(np.max(lengths + np.asarray(self.lengths_before), initial=0))

    @cached_property
    def leaves(self) -> tuple[int, ...]:
        """The segments that nothing stands behind."""
        parents = set(self.parents)
        return tuple(i for i in range(len(self.parents)) if i not in parents)

    def path(self, segment: int) -> list[tuple[int, int]]:
        """The ranges of tokens that a segment sees, its own last."""
        ranges = []
        while segment >= 0:
            ranges.append((self.starts[segment], self.stops[segment]))
            segment = self.parents[segment]
        return ranges[::-1]

    def varlen(self, device: torch.device) -> "Varlen":
        """As sequences of different length for queries and for keys; made once for each device."""
        if device not in self._varlen:
            self._varlen[device] = Varlen.of(self, device)
        return self._varlen[device]

    def chains(self, device: torch.device) -> "Chains":
        """As a padded batch of sequences; made once for each device."""
        if device not in self._chains:
            self._chains[device] = Chains.of(self, device)
        return self._chains[device]

    @cached_property
    def _varlen(self) -> dict[torch.device, "Varlen"]:
        return {}

    @cached_property
    def _chains(self) -> dict[torch.device, "Chains"]:
        return {}

    def segments(self) -> Iterator[tuple[int, int, int, bool]]:
        """Each segment that has a token: its first one, where it ends, where its descendants do.

        The last is whether nothing stands before it in the tree.
        """
        for start, stop, family_stop, before in zip(
            self.starts, self.stops, self.family_stops, self.lengths_before, strict=True
        ):
            if stop > start:
                yield start, stop, family_stop, before == 0


@dataclass(frozen=True, slots=True, eq=False)
class Varlen:
    """Each segment as a sequence of queries; its keys are gathered along its path.

    With causal masks aligned at the lower right, as in flash attention, that is the tree's.
    """

    key_index_K: torch.Tensor
    """int64: places in the row of all keys."""
    query_offsets: torch.Tensor
    """int32 [S + 1]"""
    key_offsets: torch.Tensor
    """int32 [S + 1]"""
    longest_query: int
    longest_key: int

    @classmethod
    def of(cls, layout: Layout, device: torch.device) -> "Varlen":
        """Lay out the segments that have a token."""
        paths = [
            layout.path(i) for i in range(len(layout.starts)) if layout.stops[i] > layout.starts[i]
        ]
        keys = [np.concatenate([np.arange(*range_) for range_ in path]) for path in paths]
        queries = [path[-1][1] - path[-1][0] for path in paths]

        def offsets(lengths: list[int]) -> torch.Tensor:
            return torch.tensor(np.cumsum([0, *lengths]), dtype=torch.int32, device=device)

        lengths = [len(key) for key in keys]
        return cls(
            key_index_K=torch.from_numpy(np.concatenate(keys)).to(device),
            query_offsets=offsets(queries),
            key_offsets=offsets(lengths),
            longest_query=max(queries),
            longest_key=max(lengths),
        )


@dataclass(frozen=True, slots=True, eq=False)
class Chains:
    """Each sequence as a row of its own, with what it shares, padded on the right."""

    index_CL: torch.Tensor
    """int64: place in the packed row; 0 where there is padding."""
    place_N: torch.Tensor
    """int64: where each token of the packed row stands in the C * L, for the first time."""

    @classmethod
    def of(cls, layout: Layout, device: torch.device) -> "Chains":
        """Lay out the path to each leaf of the trees."""
        paths = [
            np.concatenate([np.arange(*range_) for range_ in layout.path(leaf)])
            for leaf in layout.leaves
        ]
        length = max(len(path) for path in paths)
        index = np.zeros((len(paths), length), dtype=np.int64)
        place = np.zeros(layout.size, dtype=np.int64)
        # Backwards, so that the first of several is what stays.
        for row, path in reversed(list(enumerate(paths))):
            index[row, : len(path)] = path
            place[path] = row * length + np.arange(len(path))
        return cls(torch.from_numpy(index).to(device), torch.from_numpy(place).to(device))
