"""Rows and columns that come and go in place, against a list of sequences."""

from random import Random

import pytest
import torch

from actors.engines.growing_layer import SPARE_COLUMNS, GrowingLayer
from actors.engines.padded_cache import PaddedCache


class Model:
    """Puts the numbers of each row, counted from 1, where keys go; values are their negatives."""

    def __init__(self, seed: int) -> None:
        self.random = Random(seed)
        self.next = 1.0

    def numbers(self, rows: int, columns: int) -> torch.Tensor:
        count = rows * columns
        numbers = torch.arange(self.next, self.next + count).view(rows, 1, columns, 1)
        self.next += count
        return numbers

    def feed(self, cache: PaddedCache, columns: int) -> torch.Tensor:
        new = self.numbers(len(cache.mask_BL), columns)
        keys, values = cache.past.update(new, -new, 0)
        assert torch.equal(keys, -values)
        assert keys.shape[2] == cache.mask_BL.shape[1]
        return new[:, 0, :, 0]

    def begin(self, lengths: list[int]) -> tuple[PaddedCache, list[list[float]]]:
        longest = max(lengths)
        mask_BL = torch.tensor([[0] * (longest - n) + [1] * n for n in lengths])
        cache = PaddedCache(mask_BL)
        rows_BL = self.feed(cache, longest)
        return cache, [row[longest - n :] for row, n in zip(rows_BL.tolist(), lengths, strict=True)]


def held(cache: PaddedCache) -> list[list[float]]:
    """What each row holds, without its padding."""
    keys_BL = cache.past.layers[0].keys[:, 0, :, 0]
    return [row[mask].tolist() for row, mask in zip(keys_BL, cache.mask_BL.bool(), strict=True)]


@pytest.mark.parametrize("seed", range(20))
def test_rows_that_come_grow_and_go_are_those_of_a_list(seed):
    model = Model(seed)
    random = model.random
    cache, rows = model.begin([random.randint(1, 9) for _ in range(4)])
    for _ in range(150):
        what = random.choice(["token", "token", "token", "drop", "append"])
        if what == "token":
            cache.mask_BL = torch.nn.functional.pad(cache.mask_BL, (0, 1), value=1)
            new = model.feed(cache, 1)[:, 0].tolist()
            rows = [[*row, number] for row, number in zip(rows, new, strict=True)]
        elif what == "drop" and len(rows) > 1:
            gone = sorted(random.sample(range(len(rows)), random.randint(1, len(rows) - 1)))
            order = cache.drop(gone)
            assert sorted(order) == [row for row in range(len(rows)) if row not in gone]
            rows = [rows[index] for index in order]
            # No column is padding in all rows.
            assert cache.mask_BL.shape[1] == max(map(len, rows))
        elif what == "append" and len(rows) < 40:
            other, others = model.begin([random.randint(1, 90) for _ in range(3)])
            indices = [random.randrange(3) for _ in range(random.randint(1, 5))]
            cache.append(other, indices)
            rows += [list(others[index]) for index in indices]
        assert held(cache) == rows


def test_memory_is_taken_for_many_tokens_at_a_time():
    model = Model(0)
    cache, _ = model.begin([3, 5])
    addresses = set()
    for _ in range(SPARE_COLUMNS):
        cache.mask_BL = torch.nn.functional.pad(cache.mask_BL, (0, 1), value=1)
        model.feed(cache, 1)
        addresses.add(cache.past.layers[0].keys.data_ptr())
    assert len(addresses) == 1


def test_what_is_beside_a_row_is_zero():
    """Not what another row had there: 0 times what is not a number would not be 0."""
    nan = torch.full((1, 1, 2, 1), torch.nan)
    layer = GrowingLayer.of(torch.cat([nan, torch.ones(1, 1, 2, 1)]), torch.ones(2, 1, 2, 1))
    one = torch.ones(2, 1, 1, 1)
    layer.update(one, one)
    layer.drop_rows(torch.tensor([1]), torch.tensor([0]), rows=1, first=0)
    layer.drop_rows(torch.tensor([]), torch.tensor([]), rows=1, first=2)
    short, long = torch.ones(1, 1, 1, 1), torch.ones(1, 1, 3, 1)
    for new in (short, long):
        layer.append_rows(GrowingLayer.of(new, new), torch.tensor([0]))
    assert layer.keys[:, 0, :, 0].tolist() == [[0, 0, 1], [0, 0, 1], [1, 1, 1]]
