"""Keys and values of sequences of different lengths, padded on the left.

Shapes: B rows, L cached positions, H heads, D numbers a head. The newest position of every row is
the last column:

    row 0   . . p p p t t        . padding   p prompt   t sampled token
    row 1   p p p p p p t

Within a row nothing is padding but its beginning: the distance of two columns is that of the two
tokens, which is what the window of an attention goes by.
"""

from typing import Any, Self

import torch
from transformers import DynamicCache


class PaddedCache:
    """The cache of a batch, and which of its columns hold tokens."""

    def __init__(self, mask_BL: torch.Tensor, past: DynamicCache | None = None) -> None:
        """``mask_BL`` is 1 where there is, or soon will be, a token; ``past`` begins empty."""
        self.mask_BL = mask_BL
        # Without the model's configuration: layers with a window would forget columns, and each
        # its own, while rows come and go.
        self.past = DynamicCache() if past is None else past

    def rows(self, indices: list[int]) -> Self:
        """Copies of some of the rows, in any order and number, without columns none of them has."""
        rows, start, mask_BL = self._chosen(indices)
        chosen = DynamicCache()
        for index, layer in enumerate(_layers(self.past)):
            chosen.update(layer.keys[rows, :, start:], layer.values[rows, :, start:], index)
        return type(self)(mask_BL, chosen)

    def keep(self, indices: list[int]) -> None:
        """Drop all other rows, layer by layer: no second cache is ever there."""
        rows, start, self.mask_BL = self._chosen(indices)
        for layer in _layers(self.past):
            layer.keys = layer.keys[rows, :, start:]
            layer.values = layer.values[rows, :, start:]

    def append(self, other: Self) -> None:
        """Take the rows of another cache, layer by layer."""
        length = max(self.mask_BL.shape[1], other.mask_BL.shape[1])
        self.mask_BL = torch.cat(
            [_padded(self.mask_BL, length, 1), _padded(other.mask_BL, length, 1)]
        )
        for ours, theirs in zip(_layers(self.past), _layers(other.past), strict=True):
            ours.keys = torch.cat([_padded(ours.keys, length), _padded(theirs.keys, length)])
            ours.values = torch.cat([_padded(ours.values, length), _padded(theirs.values, length)])

    def move_right(self, columns: list[int]) -> None:
        """Move each row by as many columns as are padding at its end; they come in at its front."""
        if not any(columns):
            return
        moves_B1 = torch.tensor(columns, device=self.mask_BL.device)[:, None]
        length = self.mask_BL.shape[1]
        source_BL = (torch.arange(length, device=self.mask_BL.device) - moves_B1) % length
        self.mask_BL = self.mask_BL.gather(1, source_BL)
        for layer in _layers(self.past):
            source_BHLD = source_BL[:, None, :, None].expand_as(layer.keys)
            layer.keys = layer.keys.gather(2, source_BHLD)
            source_BHLD = source_BL[:, None, :, None].expand_as(layer.values)
            layer.values = layer.values.gather(2, source_BHLD)

    def _chosen(self, indices: list[int]) -> tuple[torch.Tensor, int, torch.Tensor]:
        """Rows as a tensor, the first column that one of them needs, and their mask from there."""
        rows = torch.tensor(indices, device=self.mask_BL.device)
        mask_BL = self.mask_BL[rows]
        start = int(mask_BL.any(dim=0).nonzero()[0])
        return rows, start, mask_BL[:, start:]


def _layers(cache: DynamicCache) -> list[Any]:
    """Layers with ``keys`` and ``values`` [B, H, L, D]."""
    return list(cache.layers)


def _padded(tensor: torch.Tensor, length: int, dim: int = 2) -> torch.Tensor:
    """Zero-pad on the left of ``dim`` up to ``length``."""
    missing = length - tensor.shape[dim]
    if missing == 0:
        return tensor
    shape = list(tensor.shape)
    shape[dim] = missing
    return torch.cat([tensor.new_zeros(shape), tensor], dim)
