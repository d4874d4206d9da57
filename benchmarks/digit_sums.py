"""Rewards for sums of one-digit numbers; any version of this system can import them alone."""

import re
from collections.abc import Sequence
from typing import Any

_RESULT = re.compile(r"(?:=|\bis|\bequals|\bequal to)\W{0,4}(\d+)\b")
"""A number as the result of something, as an equation or in words."""


def format_reward(prompts: object, completions: Sequence[Any], *_: object, **__: object) -> Any:
    """1 for an answer that names one result, else 0."""
    return [float(len(results(each)) == 1) for each in completions]


def correctness_reward(
    prompts: object,
    completions: Sequence[Any],
    *_: object,
    ground_truth: Sequence[str],
    **__: object,
) -> Any:
    """1 for an answer that names the right result alone, else 0."""
    return [
        float(results(each) == {truth})
        for each, truth in zip(completions, ground_truth, strict=True)
    ]


def results(completion: Any) -> set[str]:
    """Return the numbers that an answer gives as results."""
    return set(_RESULT.findall(text_of(completion)))


def text_of(completion: Any) -> str:
    """Return the text of a completion, which is a list of messages where the prompt is one."""
    return completion if isinstance(completion, str) else str(completion[-1]["content"])


def row(left: int, right: int) -> dict[str, Any]:
    """Return the row of a data file that asks for a sum."""
    question = f"What is {left} + {right}? Answer with the number only."
    return {
        "prompt": [{"role": "user", "content": question}],
        "ground_truth": str(left + right),
    }
