"""Rewards for tool calling: the format and the correctness of ToolRL.

ToolRL is arXiv 2504.13958; the GDPO paper (arXiv 2601.05242) trains the two against each other.

An answer has three sections, in this order, with any whitespace between them:

    <think> ... </think>
    <tool_call>
    {"name": "weather", "parameters": {"city": "Paris", "unit": "C"}}
    </tool_call>
    <response> ... </response>

A ground truth is a string in the same frame (its think section may be missing). An answer has to
hold what it holds: tool calls, one JSON object a line, or a response, or both.

Both rewards take TRL's signature and read the column `ground_truth`. Neither sees what the
other measures: format looks at the tags alone, correctness at the inside of the tool_call
section alone. A ground truth of None means that the reward does not apply, and gives None.

Departures from ToolRL's published code:
1. Calls are matched to the ground truth by the best assignment, not greedily.
2. An answer to a ground truth without calls is scored by the same formula (3 for no call, -3 for
   any), where that code gives 0.
3. Values are compared as JSON, in which true is not 1.
4. Whitespace between sections is free, and no tag may stand twice.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

WORST = -3.0

_TAG = re.compile(r"(</?(?:think|tool_call|response)>)")
_TOOL_CALLS = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)


@dataclass(frozen=True)
class Call:
    """One tool call, as parsed JSON."""

    name: str
    parameters: dict[str, Any]


def format_reward(
    prompts: object,
    completions: Sequence[Any],
    completion_ids: object,
    *,
    ground_truth: Sequence[str | None],
    **columns: object,
) -> list[float | None]:
    """1 where an answer has exactly the sections of its ground truth, else 0.

    They come in order, each once, after one think section and with nothing but whitespace between
    them. As in ToolRL, what the sections hold does not matter: calls that cannot be read cost the
    correctness reward.
    """
    return [
        None if truth is None else float(_well_formed(_text(completion), truth))
        for completion, truth in zip(completions, ground_truth, strict=True)
    ]


def correctness_reward(
    prompts: object,
    completions: Sequence[Any],
    completion_ids: object,
    *,
    ground_truth: Sequence[str | None],
    **columns: object,
) -> list[float | None]:
    """How far the calls of an answer are those of its ground truth, in [-3, 3]: see `score_calls`.

    Only the first `<tool_call>...</tool_call>` of an answer is read, wherever it stands: a broken
    frame costs the format reward alone. Without one no call was made. A section that is never
    closed, or that holds a line other than a call, scores -3.

    Raises ValueError for a ground truth whose own calls cannot be read.
    """
    return [
        None if truth is None else _correctness(_text(completion), truth)
        for completion, truth in zip(completions, ground_truth, strict=True)
    ]


def score_calls(expected: list[Call], made: list[Call]) -> float:
    """6 R / S - 3, with R = r_name + r_param + r_value under the best matching (ToolRL, eq. 3-6).

    - r_name: common names over all names, counted as multisets (|N_G & N_P| / |N_G | N_P|).
    - Calls are matched one to one among those of the same name, so that r_param + r_value is
      greatest: per matched pair, r_param adds the common keys over all keys, r_value one for
      every expected parameter whose value is equal.
    - S = 1 + sum over expected calls of (1 + its number of parameters), the R of a perfect answer.

    Nothing over nothing counts as 1: two calls without parameters agree, and so do an expected
    and a made list that are both empty.
    """
    expected_names, made_names = _by_name(expected), _by_name(made)
    matched = sum(
        _best_matching(expected_names[name], made_names[name])
        for name in expected_names.keys() & made_names.keys()
    )
    name_score = _overlap(Counter(c.name for c in expected), Counter(c.name for c in made))
    perfect = 1 + sum(1 + len(call.parameters) for call in expected)
    return 6 * (name_score + matched) / perfect - 3


def parse_calls(text: str) -> list[Call]:
    """The calls inside a tool_call section: a JSON object a line, blank lines skipped.

    If a key is given twice the last value counts, as everywhere in Python's json. Raises ValueError
    for anything else than `{"name": string, "parameters": object}`; further keys are ignored.
    """
    return [_parse_call(line) for line in text.split("\n") if line.strip()]


def _text(completion: Any) -> str:
    """The model's text: a string, or the assistant turns of TRL's list of messages."""
    if isinstance(completion, str):
        return completion
    turns = [message for message in completion if message.get("role") == "assistant"]
    return "".join(_content(turn.get("content")) for turn in turns)


def _content(content: Any) -> str:
    """The text of a message's content: a string, None, or a list of typed parts."""
    if isinstance(content, list):
        return "".join(part.get("text") or "" for part in content)
    return content or ""


def _well_formed(text: str, truth: str) -> bool:
    """Whether the tags of a text are those that a ground truth asks for, with nothing between."""
    sections = ["think"] + [s for s in ("tool_call", "response") if f"<{s}>" in truth]
    pieces = _TAG.split(text)  # text, tag, text, tag, ..., text
    tags, between_sections = pieces[1::2], pieces[::4]
    wanted = [tag for s in sections for tag in (f"<{s}>", f"</{s}>")]
    return tags == wanted and not any(piece.strip() for piece in between_sections)


def _correctness(text: str, truth: str) -> float:
    try:
        expected = _calls_of(truth)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"a ground truth holds no readable calls ({error}); write one JSON object a line, "
            f'{{"name": ..., "parameters": {{...}}}}, between its tool_call tags: {truth[:200]!r}'
        ) from error
    try:
        return score_calls(expected, _calls_of(text))
    except (ValueError, RecursionError):
        return WORST


def _calls_of(text: str) -> list[Call]:
    found = _TOOL_CALLS.search(text)
    if found is None:
        if "<tool_call>" in text:
            raise ValueError("the tool_call section is never closed")
        return []
    return parse_calls(found.group(1))


def _parse_call(line: str) -> Call:
    call = json.loads(line, parse_constant=_refuse_constant)
    match call:
        case {"name": str(name), "parameters": dict(parameters)}:
            return Call(name, parameters)
    raise ValueError('a call is {"name": string, "parameters": object}')


def _refuse_constant(literal: str) -> NoReturn:
    raise ValueError(f"{literal} is not JSON")


def _by_name(calls: list[Call]) -> dict[str, list[Call]]:
    grouped: dict[str, list[Call]] = {}
    for call in calls:
        grouped.setdefault(call.name, []).append(call)
    return grouped


def _best_matching(expected: list[Call], made: list[Call]) -> float:
    """The greatest sum of pair scores over one-to-one matchings of calls of one name."""
    scores = [[_pair_score(e, m) for m in made] for e in expected]
    if len(expected) == 1 or len(made) == 1:
        return max(score for row in scores for score in row)
    from scipy.optimize import linear_sum_assignment  # slow to import, and seldom needed

    rows, columns = linear_sum_assignment(scores, maximize=True)
    return float(sum(scores[row][column] for row, column in zip(rows, columns, strict=True)))


def _pair_score(expected: Call, made: Call) -> float:
    want, got = expected.parameters, made.parameters
    equal_values = sum(key in got and _same_json(want[key], got[key]) for key in want)
    return _overlap(Counter(want.keys()), Counter(got.keys())) + equal_values


def _overlap(left: Counter[str], right: Counter[str]) -> float:
    """|left & right| / |left | right| of multisets, 1 where both are empty."""
    union = (left | right).total()
    return (left & right).total() / union if union else 1.0


def _same_json(left: Any, right: Any) -> bool:
    """Equality of JSON values: 1 equals 1.0, and neither equals true."""
    if isinstance(left, bool) or isinstance(right, bool):
        return left is right
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(_same_json(left[k], right[k]) for k in left)
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(map(_same_json, left, right))
    return bool(left == right)
