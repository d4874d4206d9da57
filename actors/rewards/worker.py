"""The inside of a reward process: imports reward functions, calls them, checks what they return.

Whatever a function does in here (raise, print, leave threads or children behind) ends in a `Reply`
or in the end of the process; see `actors.rewards.guard` for what is around it.
"""

import asyncio
import inspect
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

from actors.rewards.functions import RewardFunction, load_reward
from actors.rewards.messages import LENGTH_BYTES, Call, Load, Reply, decode_request, frame
from protocol.errors import RewardError, brief

_LARGEST_FLOAT32 = 3.4028234663852886e38

Functions = dict[str, RewardFunction]


class NotScores(Exception):
    """A reward function returned something other than scores; the text says what."""


def serve(requests: BinaryIO, replies: BinaryIO) -> None:
    """Answer requests until the actor hangs up."""
    functions: Functions = {}
    pid = os.getpid()
    # One loop for all calls: clients that async functions keep belong to the loop they began in.
    with asyncio.Runner() as runner:
        while header := requests.read(LENGTH_BYTES):
            request = decode_request(requests.read(int.from_bytes(header, "little")))
            if isinstance(request, Load):
                reply = _load(functions, request)
            else:
                reply = answer(functions[request.reward], request, runner)
            if os.getpid() != pid:
                # This is a fork, made by the function, that returned too: the original answers.
                os._exit(0)
            replies.write(frame(reply))
            replies.flush()


def _load(functions: Functions, request: Load) -> Reply:
    try:
        functions[request.reward] = load_reward(
            request.function, request.allowed_modules, Path(request.folder)
        )
    except RewardError as error:
        return Reply(problem=str(error))
    return Reply()


def answer(function: RewardFunction, call: Call, runner: asyncio.Runner) -> Reply:
    """Call a reward function; never raises."""
    try:
        scores = function(**_arguments(call))
        if inspect.iscoroutine(scores):
            scores = runner.run(scores)
        return Reply(scores=_valid_scores(scores, len(call.completions)))
    except NotScores as problem:
        return Reply(problem=f"returned {problem}", kind="invalid")
    except BaseException as error:
        # SystemExit and its like too: what ends one group must not end this process.
        return Reply(problem=f"raised {type(error).__name__}: {_text(error)}{_place(error)}")


def _arguments(call: Call) -> dict[str, Any]:
    """Lists with one entry per completion, and the reward's own arguments as they are."""
    num_rollouts = len(call.completions)
    conversational = not isinstance(call.row["prompt"], str)
    columns = {name: [value] * num_rollouts for name, value in call.row.items()}
    return {
        **{name: values for name, values in columns.items() if name != "prompt"},
        "prompts": columns["prompt"],
        "completions": [
            [{"role": "assistant", "content": text}] if conversational else text
            for text in call.completions
        ],
        "completion_ids": call.completion_ids,
        "finish": call.finish,
        **call.arguments,
    }


def _valid_scores(scores: Any, num_rollouts: int) -> list[float | None]:
    if not isinstance(scores, Sequence) or len(scores) != num_rollouts:
        raise NotScores(
            f"{_size(scores)} instead of a list of {num_rollouts} scores, one for each completion"
        )
    return [_valid_score(score) for score in scores]


def _size(scores: Any) -> str:
    if isinstance(scores, Sequence) and not isinstance(scores, str):
        return f"a {type(scores).__name__} of {len(scores)}"
    return type(scores).__name__


def _valid_score(score: Any) -> float | None:
    if score is None:
        return None
    try:
        value = float(score)
    except (TypeError, ValueError, OverflowError) as error:
        shown = brief(ValueError(repr(score)), 100)
        raise NotScores(f"{shown}, which is no number") from error
    if not math.isfinite(value) or abs(value) > _LARGEST_FLOAT32:
        raise NotScores(f"{value}; return None where the reward does not apply")
    return value


def _text(error: BaseException) -> str:
    try:
        return brief(error)
    except Exception:
        # An error's own __str__ is the user's code too.
        return "(its text cannot be shown)"


def _place(error: BaseException) -> str:
    """The place in the user's file where an error was raised."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None or trace.tb_frame.f_code.co_filename == __file__:
        return ""
    return f" ({Path(trace.tb_frame.f_code.co_filename).name}, line {trace.tb_lineno})"
