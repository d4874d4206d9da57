"""The keys and values of one layer, in memory with room: rows and columns come and go in place.

Shapes: B rows, L columns, H heads, D numbers a head; see `actors.engines.padded_cache`.

    room    . . x x x x x . . .     x in use: ``rows``, and columns from ``start`` to ``stop``
            . . x x x x x . . .
            . . . . . . . . . .

A layer of transformers makes a new tensor for each token, which for a small model takes as long as
all of its products do.
"""

from typing import Any

import torch
from transformers.cache_utils import DynamicLayer

SPARE_COLUMNS = 64
"""Room for new tokens at least, each time that memory is taken."""
SPARE_SHARE = 8
"""One row is taken besides for each so many, and one column."""


class GrowingLayer(DynamicLayer):
    """``keys`` and ``values`` [B, H, L, D] are views of what is in use."""

    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self._rooms: tuple[torch.Tensor, torch.Tensor]
        self._rows = self._start = self._stop = 0

    @classmethod
    def of(cls, keys_BHLD: torch.Tensor, values_BHLD: torch.Tensor) -> "GrowingLayer":
        """A layer that has tensors of its own for its room, full so far."""
        layer = cls()
        layer.hold(keys_BHLD, values_BHLD)
        return layer

    def hold(self, keys_BHLD: torch.Tensor, values_BHLD: torch.Tensor) -> None:
        """Go on with these tensors instead."""
        self.dtype, self.device = keys_BHLD.dtype, keys_BHLD.device
        self.is_initialized = True
        self._rooms = keys_BHLD.contiguous(), values_BHLD.contiguous()
        self._use(len(keys_BHLD), 0, keys_BHLD.shape[2])

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append columns; returns all keys and values."""
        if not self.is_initialized:
            self.hold(key_states, value_states)
            return self.keys, self.values
        more = key_states.shape[2]
        if self._stop + more > self._rooms[0].shape[2]:
            self._take_room(self._rows, self._stop - self._start, more)
        keys_room, values_room = self._rooms
        keys_room.narrow(0, 0, self._rows).narrow(2, self._stop, more).copy_(key_states)
        values_room.narrow(0, 0, self._rows).narrow(2, self._stop, more).copy_(value_states)
        self._use(self._rows, self._start, self._stop + more)
        return self.keys, self.values

    def append_rows(self, other: "GrowingLayer", indices_B: torch.Tensor) -> None:
        """Take copies of rows of another layer; zeros come before the shorter ones."""
        length, others = self._stop - self._start, other.keys.shape[2]
        rows = self._rows + len(indices_B)
        if rows > len(self._rooms[0]) or others > self._stop:
            self._take_room(rows, max(length, others), 0)
        start = min(self._start, self._stop - others)
        for room, new in zip(self._rooms, (other.keys, other.values), strict=True):
            room[: self._rows, :, start : self._start] = 0
            room[self._rows : rows, :, start : self._stop - others] = 0
            room[self._rows : rows, :, self._stop - others : self._stop] = new[indices_B]
        self._use(rows, start, self._stop)

    def drop_rows(
        self, sources: torch.Tensor, targets: torch.Tensor, rows: int, first: int
    ) -> None:
        """Put some rows in the place of others, and forget all after ``rows``.

        Of the columns, those before ``first`` are forgotten.
        """
        for kept in (self.keys, self.values) if len(sources) else ():
            kept[targets] = kept[sources]
        self._use(rows, self._start + first, self._stop)

    def _use(self, rows: int, start: int, stop: int) -> None:
        self._rows, self._start, self._stop = rows, start, stop
        keys_room, values_room = self._rooms
        self.keys = keys_room.narrow(0, 0, rows).narrow(2, start, stop - start)
        self.values = values_room.narrow(0, 0, rows).narrow(2, start, stop - start)

    def _take_room(self, rows: int, columns: int, more: int) -> None:
        """Move to memory for rows that end in column ``columns``, and ``more`` after it."""
        used = self._stop - self._start
        rows = max(rows + rows // SPARE_SHARE, min(len(self._rooms[0]), 2 * rows))
        length = columns + more + max(SPARE_COLUMNS, columns // SPARE_SHARE)
        self._rooms = (self._moved(0, rows, columns, length), self._moved(1, rows, columns, length))
        self._use(self._rows, columns - used, columns)

    def _moved(self, which: int, rows: int, columns: int, length: int) -> torch.Tensor:
        old = (self.keys, self.values)[which]
        room = old.new_zeros(rows, old.shape[1], length, old.shape[3])
        room[: len(old), :, columns - old.shape[2] : columns] = old
        return room
