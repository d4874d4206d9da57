"""Rewards for sums of one-digit numbers; any version of this system can import them alone."""

import re
from collections.abc import Sequence
from typing import Any

_ANSWER = re.compile(r"\s*<answer>\s*(\d+)\s*</answer>\s*")


def format_reward(prompts: object, completions: Sequence[Any], *_: object, **__: object) -> Any:
    """1 for an answer that is nothing but ``<answer>NUMBER</answer>``, else 0."""
    return [float(_ANSWER.fullmatch(text_of(each)) is not None) for each in completions]


def correctness_reward(
    prompts: object,
    completions: Sequence[Any],
    *_: object,
    ground_truth: Sequence[str],
    **__: object,
) -> Any:
    """1 for the right number in an answer of the right form, else 0."""
    found = [_ANSWER.fullmatch(text_of(each)) for each in completions]
    return [
        float(match is not None and match[1] == truth)
        for match, truth in zip(found, ground_truth, strict=True)
    ]


def text_of(completion: Any) -> str:
    """Return the text of a completion, which is a list of messages where the prompt is one."""
    return completion if isinstance(completion, str) else str(completion[-1]["content"])


def row(left: int, right: int) -> dict[str, Any]:
    """Return the row of a data file that asks for a sum."""
    question = (
        f"What is {left} + {right}? Answer with the number in answer tags and nothing else, "
        "like <answer>12</answer>"
    )
    return {
        "prompt": [{"role": "user", "content": question}],
        "ground_truth": str(left + right),
    }
