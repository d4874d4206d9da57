"""Completions as a run keeps them."""

import random
from typing import Any

from learner.completions.files import Completion

_COMPLETION: dict[str, Any] = {
    "step": 1,
    "prompt_index": 7,
    "rollout": 0,
    "prompt": "2 + 3 =",
    "completion": "5",
    "tokens": 2,
    "finish": "stop",
    "oldest_version": 0,
    "newest_version": 0,
    "advantage": 0.5,
    "scores": {"format": 1.0, "correctness": 0.25},
}


def make_completion(step: int = 1, **changes: Any) -> Completion:
    return Completion(**_COMPLETION | {"step": step} | changes)


def make_long_completion(step: int, *, size: int, **changes: Any) -> Completion:
    """One whose text does not compress."""
    text = random.Random(f"{step}/{changes}").randbytes(size // 2).hex()
    return make_completion(step, completion=text, **changes)
