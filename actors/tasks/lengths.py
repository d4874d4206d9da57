"""Rewards of the length of completions, for any task."""

from collections.abc import Sequence
from typing import Any


def soft_overlong(
    prompts: object,
    completions: object,
    completion_ids: Sequence[Sequence[int]],
    *,
    longest: int,
    cache: int,
    **columns: Any,
) -> list[float]:
    """The soft overlong punishment: 0 for a completion with room to spare, -1 at the longest.

        0                                   n <= longest - cache
        (longest - cache - n) / cache       up to longest
        -1                                  beyond

    for n tokens. Source: DAPO, arXiv 2503.14476, eq. 13, where ``longest`` is 20,480 and ``cache``
    4,096. Both are the reward's ``arguments``.

    Raises ValueError unless 0 < cache <= longest.
    """
    if not 0 < cache <= longest:
        raise ValueError(f"cache = {cache} and longest = {longest}: give 0 < cache <= longest")
    return [min(0.0, max(-1.0, (longest - cache - len(ids)) / cache)) for ids in completion_ids]
