"""Rewards of length."""

import pytest

from actors.tasks.lengths import soft_overlong


def punished(*lengths: int, longest: int = 10, cache: int = 4) -> list[float]:
    return soft_overlong([], [], [[0] * n for n in lengths], longest=longest, cache=cache)


def test_the_punishment_begins_in_the_cache_and_ends_at_the_longest():
    # (10 - 4 - n) / 4 between 6 and 10 tokens
    assert punished(1, 6, 7, 8, 10, 11) == [0, 0, -0.25, -0.5, -1, -1]
    # DAPO's own figures: 20,480 and 4,096.
    assert punished(16_384, 18_432, longest=20_480, cache=4_096) == [0, -0.5]


@pytest.mark.parametrize("cache", [0, 11])
def test_a_cache_that_makes_no_sense_is_an_error(cache):
    with pytest.raises(ValueError, match="give 0 < cache <= longest"):
        punished(1, cache=cache)
