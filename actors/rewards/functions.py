"""The search for reward functions. Imports nothing heavy: every reward process begins with it.

    f(prompts, completions, completion_ids, finish, **columns) -> list[float | None]

plain or async, TRL's signature; every argument is a list with one entry per rollout. ``finish`` is
"stop" or "length", ``columns`` are the data set's further columns by name, and the reward's own
``arguments`` come beside them as they are. None means "does not apply". Completions are strings,
or ``[{"role": "assistant", "content": ...}]`` where the prompt is a list of messages.
"""

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from protocol.errors import RewardError, brief

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
