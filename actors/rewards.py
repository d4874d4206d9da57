"""Loading and calling reward functions with TRL's signature.

    f(prompts, completions, completion_ids, **columns) -> list[float | None]

plain or async; every argument is a list with one entry per rollout, ``columns`` are the data
set's further columns by name. None means "does not apply" and travels as NaN. Completions are
strings, or ``[{"role": "assistant", "content": ...}]`` where the prompt is a list of messages.
"""

import asyncio
import importlib
import importlib.util
import inspect
import math
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from actors.threads import in_daemon_thread
from protocol.config import RewardConfig
from protocol.errors import RewardError, brief
from protocol.groups import Floats

DEFAULT_MODULES = ("actors.tasks",)

RewardFunction = Callable[..., Any]


def load_reward(path: str, allowed_modules: Iterable[str], folder: Path) -> RewardFunction:
    """Import ``package.module:function``; raises `RewardError` with what to change.

    The path comes from the learner, so only modules below ``allowed_modules`` and modules that lie
    in ``folder`` (where the actor was started) are imported, and only functions defined there.
    """
    module_name, _, function_name = path.partition(":")
    allowed = any(f"{module_name}.".startswith(f"{name}.") for name in allowed_modules)
    try:
        # Looking for a module in a package imports the package.
        if not _lies_in(folder, module_name) and not allowed:
            top = module_name.partition(".")[0]
            if importlib.util.find_spec(top) is None:
                raise RewardError(
                    f"reward function {path}: there is no module {top}, neither in {folder} nor "
                    "installed"
                )
            raise RewardError(
                f"reward function {path}: module {module_name} is not allowed here; start the "
                f"actor in the folder that holds it, or with --allow-rewards {module_name}"
            )
        module = importlib.import_module(module_name)
    except RewardError:
        raise
    except (Exception, SystemExit) as error:
        raise RewardError(
            f"reward function {path} does not import: {type(error).__name__}: {brief(error)}"
        ) from error
    function = getattr(module, function_name, None)
    if not inspect.isfunction(function) or function.__module__ != module_name:
        raise RewardError(
            f"reward function {path}: {module_name} defines no function {function_name}"
        )
    return function


def _lies_in(folder: Path, module_name: str) -> bool:
    """Whether a module, as Python would import it, lies in ``folder``, its packages as well."""
    parts = module_name.split(".")
    name = parts[0]
    if not (folder / f"{name}.py").is_file() and not (folder / name).is_dir():
        return False
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    # A folder without __init__.py gives way to a module of its name that is installed.
    # Parents come first: looking for a module imports them.
    for end in range(1, len(parts) + 1):
        spec = importlib.util.find_spec(".".join(parts[:end]))
        origin = spec.origin if spec else None
        # A package without __init__.py has no origin, and no code either.
        if origin and not Path(origin).resolve().is_relative_to(folder.resolve()):
            return False
    return True


@dataclass(frozen=True, slots=True)
class _Reward:
    name: str
    function: RewardFunction


class RewardScorer:
    """Scores groups with the run's reward functions."""

    def __init__(
        self,
        rewards: Sequence[RewardConfig],
        *,
        allowed_modules: Iterable[str],
        folder: Path,
        timeout_s: float,
    ) -> None:
        self._timeout_s = timeout_s
        self._rewards = [
            _Reward(r.name, load_reward(r.function, allowed_modules, folder)) for r in rewards
        ]
        self.names = tuple(reward.name for reward in self._rewards)

    async def score(
        self, row: dict[str, Any], completions: list[str], completion_ids: list[list[int]]
    ) -> Floats:
        """Scores [G, K] of the completions of one data row; raises `RewardError`."""
        conversational = not isinstance(row["prompt"], str)
        arguments = {
            "prompts": [row["prompt"]] * len(completions),
            "completions": [
                [{"role": "assistant", "content": text}] if conversational else text
                for text in completions
            ],
            "completion_ids": completion_ids,
        }
        columns = {
            name: [value] * len(completions) for name, value in row.items() if name != "prompt"
        }
        scores = [
            await self._call(reward, {**columns, **arguments}, len(completions))
            for reward in self._rewards
        ]
        return np.array(scores, dtype=np.float32).T

    async def _call(
        self, reward: _Reward, arguments: dict[str, Any], num_rollouts: int
    ) -> list[float]:
        try:
            if inspect.iscoroutinefunction(reward.function):
                call = reward.function(**arguments)
            else:
                call = in_daemon_thread(partial(reward.function, **arguments))
            scores = await asyncio.wait_for(call, self._timeout_s)
        except TimeoutError as error:
            raise RewardError(
                f"reward {reward.name!r} took longer than {self._timeout_s:g} s"
            ) from error
        except Exception as error:
            raise RewardError(
                f"reward {reward.name!r} raised {type(error).__name__}: {brief(error)}"
                f"{_place(error)}"
            ) from error
        return [_valid(reward.name, score) for score in _of_length(reward, scores, num_rollouts)]


def _of_length(reward: _Reward, scores: Any, num_rollouts: int) -> list[Any]:
    if not isinstance(scores, Sequence) or len(scores) != num_rollouts:
        raise RewardError(
            f"reward {reward.name!r} returned {_size(scores)} instead of a list of {num_rollouts} "
            "scores, one for each completion"
        )
    return list(scores)


def _size(scores: Any) -> str:
    if isinstance(scores, Sequence) and not isinstance(scores, str):
        return f"a {type(scores).__name__} of {len(scores)}"
    return type(scores).__name__


def _place(error: Exception) -> str:
    """Where in the user's file it was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    if len(frames) < 2:
        return ""
    return f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})"


def _valid(name: str, score: Any) -> float:
    if score is None:
        return math.nan
    try:
        value = float(score)
    except (TypeError, ValueError, OverflowError) as error:
        shown = brief(ValueError(repr(score)), 100)
        raise RewardError(f"reward {name!r} returned {shown}, which is no number") from error
    if not math.isfinite(value) or abs(value) > float(np.finfo(np.float32).max):
        raise RewardError(
            f"reward {name!r} returned {value}; return None where the reward does not apply"
        )
    return value
