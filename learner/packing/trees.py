"""What is trained on, as small trees of tokens: a prompt once, its completions behind it.

    group ──► TokenTree ──► pieces that fit into a budget ──► microbatches of equal work
                                                                 │
                                            `learner.packing.rows` makes tensors of each

A segment is a run of tokens. Its tokens see its ancestors and those before them in the segment, so
that a sequence is the path from a root to a leaf, and what sequences share is computed once.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt

from protocol.groups import Group, Rollout

Ints = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True, eq=False)
class Segment:
    """A run of T tokens."""

    parent: int
    """Index of the segment before it, -1 at a root."""
    tokens: Ints
    """[T] token ids."""
    sequence: int = -1
    """The sequence that its sampled tokens count for; -1 if it has none."""
    sampled: Mask | None = None
    """[T], the tokens that the policy chose; None for none of them."""
    logprobs: Floats | None = None
    """[T], where sampled: log-probability under the policy that sampled the token."""
    versions: Ints | None = None
    """[T], where sampled: version of that policy."""

    def __post_init__(self) -> None:
        if self.sampled is not None:
            assert self.logprobs is not None
            assert self.versions is not None


@dataclass(frozen=True, eq=False)
class TokenTree:
    """Segments in depth-first order, so that the descendants of each stand right behind it.

    A sampled token of a segment with several children counts for the sequence of its first leaf.
    """

    segments: tuple[Segment, ...]

    @cached_property
    def num_tokens(self) -> int:
        """Tokens that are computed."""
        return sum(len(segment.tokens) for segment in self.segments)

    @cached_property
    def num_pairs(self) -> int:
        """Pairs of a token and a token that it sees: what attention computes."""
        before = self.lengths_before
        return sum(
            len(s.tokens) * (before[i] + (len(s.tokens) + 1) // 2)
            for i, s in enumerate(self.segments)
        )

    @cached_property
    def lengths_before(self) -> list[int]:
        """Tokens of the ancestors of each segment: the position of its first token."""
        before: list[int] = []
        for segment in self.segments:
            parent = segment.parent
            above = before[parent] + len(self.segments[parent].tokens) if parent >= 0 else 0
            before.append(above)
        return before

    def pieces(self, max_tokens: int) -> Iterator["TokenTree"]:
        """Cut into trees of whole sequences with at most this many tokens, if one alone fits.

        Together they train the same tokens: a sampled token that pieces share stays with the first.
        """
        if self.num_tokens <= max_tokens:
            yield self
            return
        parents = {segment.parent for segment in self.segments}
        done: set[int] = set()
        chosen: list[int] = []
        size = 0
        for leaf in (i for i in range(len(self.segments)) if i not in parents):
            path = self._path(leaf)
            more = sum(len(self.segments[i].tokens) for i in path if i not in chosen)
            if chosen and size + more > max_tokens:
                yield self._part(chosen, done)
                done.update(chosen)
                chosen, size = [], 0
                more = sum(len(self.segments[i].tokens) for i in path)
            chosen += [i for i in path if i not in chosen]
            size += more
        yield self._part(chosen, done)

    def chains(self) -> Iterator["TokenTree"]:
        """Each sequence as a tree of its own."""
        return self.pieces(0)

    def _path(self, index: int) -> list[int]:
        path: list[int] = []
        while index >= 0:
            path.append(index)
            index = self.segments[index].parent
        return path[::-1]

    def _part(self, chosen: Sequence[int], trained: set[int]) -> "TokenTree":
        place = {-1: -1} | {index: new for new, index in enumerate(chosen)}
        return TokenTree(
            tuple(
                replace(
                    self.segments[i],
                    parent=place[self.segments[i].parent],
                    sampled=None if i in trained else self.segments[i].sampled,
                )
                for i in chosen
            )
        )


NOTHING = TokenTree((Segment(-1, np.zeros(1, dtype=np.int32)),))
"""Nothing to train: for whoever has to take part in a pass that others need."""


def tree_of(group: Group, first_sequence: int) -> TokenTree:
    """The prompt, and each rollout behind it; they are sequences from ``first_sequence`` on."""
    prompt = Segment(-1, group.prompt_tokens)
    return TokenTree(
        (
            prompt,
            *(
                Segment(
                    parent=0,
                    tokens=rollout.tokens,
                    sequence=first_sequence + index,
                    sampled=np.ones(len(rollout.tokens), dtype=np.bool_),
                    logprobs=rollout.logprobs,
                    versions=_token_versions(rollout),
                )
                for index, rollout in enumerate(group.rollouts)
            ),
        )
    )


def microbatches(
    trees: Iterable[TokenTree],
    max_tokens: int,
    cost: Callable[[TokenTree], float],
    multiple_of: int = 1,
) -> list[list[TokenTree]]:
    """Share trees out to as few parts of at most ``max_tokens`` as will do, of similar cost.

    Their number is a multiple of ``multiple_of``; if that is more than 1, some may be empty.

    The dearest first, each to the cheapest part that has room: within 4/3 of the best there is
    where room does not matter (Graham, "Bounds on multiprocessing timing anomalies", 1969).
    """
    pieces = [piece for tree in trees for piece in tree.pieces(max_tokens)]
    pieces.sort(key=cost, reverse=True)
    number = max(1, -(-sum(piece.num_tokens for piece in pieces) // max_tokens))
    number += -number % multiple_of
    while (parts := _share_out(pieces, number, max_tokens, cost)) is None:
        number += multiple_of
    return [part for part in parts if part or multiple_of > 1]


def _share_out(
    pieces: Sequence[TokenTree],
    number: int,
    max_tokens: int,
    cost: Callable[[TokenTree], float],
) -> list[list[TokenTree]] | None:
    """Give each piece to the cheapest part that has room; None if one finds no room."""
    parts: list[list[TokenTree]] = [[] for _ in range(number)]
    costs, sizes = [0.0] * number, [0] * number
    for piece in pieces:
        room = [
            i for i, size in enumerate(sizes) if not size or size + piece.num_tokens <= max_tokens
        ]
        if not room:
            return None
        part = min(room, key=costs.__getitem__)
        parts[part].append(piece)
        costs[part] += cost(piece)
        sizes[part] += piece.num_tokens
    return parts


def _token_versions(rollout: Rollout) -> Ints:
    versions = np.empty(len(rollout.tokens), dtype=np.int32)
    for start, version in rollout.spans:
        versions[start:] = version
    return versions
