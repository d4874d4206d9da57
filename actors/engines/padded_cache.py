"""Keys and values of sequences of different lengths, padded on the left.

Shapes: B rows, L cached positions, H heads, D numbers a head. The newest position of every row is
the last column:

    row 0   . . p p p t t        . padding   p prompt   t sampled token
    row 1   p p p p p p t

Within a row nothing is padding but its beginning: the distance of two columns is that of the two
tokens, which is what the window of an attention goes by.
"""

from collections.abc import Sequence
from typing import Any, Self

import torch
from transformers.cache_utils import Cache

from actors.engines.growing_layer import GrowingLayer


class PaddedCache:
    """The cache of a batch, and which of its columns hold tokens."""

    def __init__(self, mask_BL: torch.Tensor, layers: list[GrowingLayer] | None = None) -> None:
        """``mask_BL`` is 1 where there is, or soon will be, a token; without layers: none yet."""
        self.mask_BL = mask_BL
        # Layers without a window, in every model: one with it would forget columns, and each its
        # own, while rows come and go.
        self.past: Any = (
            Cache(layers=[*layers]) if layers else Cache(layer_class_to_replicate=GrowingLayer)
        )

    def rows(self, indices: Sequence[int]) -> Self:
        """Copies of some of the rows, in any order and number, without columns none of them has."""
        rows_B = torch.tensor(list(indices), device=self.mask_BL.device)
        mask_BL = self.mask_BL[rows_B]
        first = _first_column(mask_BL)
        layers = [
            GrowingLayer.of(layer.keys[rows_B, :, first:], layer.values[rows_B, :, first:])
            for layer in self.past.layers
        ]
        return type(self)(mask_BL[:, first:], layers)

    def drop(self, gone: list[int]) -> list[int]:
        """Drop rows; the last ones take their places.

        Returns which row each of those left has been before.
        """
        count = len(self.mask_BL)
        left = count - len(gone)
        order = list(range(left))
        targets = [row for row in gone if row < left]
        sources = sorted(set(range(left, count)).difference(gone))
        for source, target in zip(sources, targets, strict=True):
            order[target] = source
        device = self.mask_BL.device
        mask_BL = self.mask_BL[torch.tensor(order, device=device)]
        first = _first_column(mask_BL)
        self.mask_BL = mask_BL[:, first:]
        sources_B = torch.tensor(sources, dtype=torch.long, device=device)
        targets_B = torch.tensor(targets, dtype=torch.long, device=device)
        for layer in self.past.layers:
            layer.drop_rows(sources_B, targets_B, left, first)
        return order

    def append(self, other: Self, indices: Sequence[int]) -> None:
        """Take copies of rows of another cache, in any order and number."""
        rows_B = torch.tensor(list(indices), device=self.mask_BL.device)
        length = max(self.mask_BL.shape[1], other.mask_BL.shape[1])
        self.mask_BL = torch.cat(
            [_padded(self.mask_BL, length), _padded(other.mask_BL[rows_B], length)]
        )
        for ours, theirs in zip(self.past.layers, other.past.layers, strict=True):
            ours.append_rows(theirs, rows_B)

    def move_right(self, columns: list[int]) -> None:
        """Move each row by as many columns as are padding at its end; they come in at its front."""
        if not any(columns):
            return
        moves_B1 = torch.tensor(columns, device=self.mask_BL.device)[:, None]
        length = self.mask_BL.shape[1]
        source_BL = (torch.arange(length, device=self.mask_BL.device) - moves_B1) % length
        self.mask_BL = self.mask_BL.gather(1, source_BL)
        source_BHLD = source_BL[:, None, :, None]
        for layer in self.past.layers:
            layer.hold(
                layer.keys.gather(2, source_BHLD.expand_as(layer.keys)),
                layer.values.gather(2, source_BHLD.expand_as(layer.values)),
            )


def _first_column(mask_BL: torch.Tensor) -> int:
    """The first column in which a row has a token."""
    return int(mask_BL.any(dim=0).nonzero()[0])


def _padded(mask_BL: torch.Tensor, length: int) -> torch.Tensor:
    """A mask with zeros on its left, up to ``length``."""
    return torch.nn.functional.pad(mask_BL, (length - mask_BL.shape[1], 0))
