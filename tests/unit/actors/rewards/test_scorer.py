"""Reward functions: which may be imported, and what becomes of what they return."""

import asyncio
import math
import sys
from pathlib import Path
from typing import Any

import pytest

from actors.rewards.functions import DEFAULT_MODULES, load_reward
from actors.rewards.messages import Call, Reply
from actors.rewards.worker import answer
from protocol.errors import RewardError
from protocol.messages import FinishReason

NAN = math.nan
ROW = {"prompt": "2 + 2", "answer": "4"}


@pytest.fixture(autouse=True)
def imports_are_undone(monkeypatch):
    """Neither the modules nor the folders of one test are seen by the next."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    before = {*sys.modules}
    yield
    for name in {*sys.modules} - before:
        del sys.modules[name]


def write_module(folder: Path, source: str, name: str = "my_rewards") -> Path:
    path = folder / f"{name}.py"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source)
    return path


def refusal(path: str, folder: Path, allowed: tuple[str, ...] = DEFAULT_MODULES) -> str:
    with pytest.raises(RewardError) as caught:
        load_reward(path, allowed, folder)
    message = str(caught.value)
    assert "\n" not in message
    assert path in message
    return message


# ---- Loading -----------------------------------------------------------------------------------


def test_the_functions_of_the_shipped_tasks_are_allowed(tmp_path):
    function = load_reward("actors.tasks.tool_calling:format_reward", DEFAULT_MODULES, tmp_path)
    assert function.__name__ == "format_reward"


def test_a_module_in_the_folder_is_allowed(tmp_path):
    write_module(tmp_path, "def one(completions, **_): return [1.0] * len(completions)")
    write_module(tmp_path, "async def two(**_): return []", "package/inner")
    assert load_reward("my_rewards:one", (), tmp_path)(completions=["a"]) == [1.0]
    assert asyncio.iscoroutinefunction(load_reward("package.inner:two", (), tmp_path))


@pytest.mark.parametrize(
    "path",
    ["os:system", "shutil:rmtree", "actors.actor:Actor", "actors.tasks_of_others:f"],
)
def test_a_module_outside_of_what_is_allowed_is_refused_without_import(tmp_path, path):
    message = refusal(path, tmp_path)
    module = path.partition(":")[0]
    assert f"module {module} is not allowed here" in message
    assert f"--allow-rewards {module}" in message
    assert module in ("os", "shutil", "actors.actor") or module not in sys.modules


def test_a_module_that_does_not_exist_is_said_not_to(tmp_path):
    message = refusal("my_reward:f", tmp_path)
    assert f"there is no module my_reward, neither in {tmp_path} nor installed" in message


def test_the_command_line_may_allow_a_module_and_what_is_below_it(tmp_path):
    assert callable(load_reward("json.tool:main", ("json",), tmp_path))
    # A name is no prefix of another.
    assert "is not allowed" in refusal("json.tool:main", tmp_path, ("js",))


def test_a_folder_of_the_same_name_does_not_open_a_module_that_lies_elsewhere(tmp_path):
    # Data folders called `json` or `datasets` are common; those modules are not the user's.
    (tmp_path / "json").mkdir()
    assert "is not allowed" in refusal("json.tool:main", tmp_path)


def test_a_module_in_the_folder_may_be_allowed_by_name_as_well(tmp_path):
    write_module(tmp_path, "def f(**_): return []")
    assert callable(load_reward("my_rewards:f", ("my_rewards",), tmp_path))


def test_a_package_that_is_spread_over_folders_opens_only_its_part_in_this_one(
    tmp_path, monkeypatch
):
    # Namespace packages, without __init__.py, like those that start with `google`.
    here, elsewhere = tmp_path / "here", tmp_path / "elsewhere"
    write_module(here, "def f(**_): return []", "spread/mine")
    write_module(elsewhere, "def f(**_): return []", "spread/others")
    monkeypatch.syspath_prepend(elsewhere)
    assert callable(load_reward("spread.mine:f", (), here))
    assert "is not allowed" in refusal("spread.others:f", here)


def test_a_function_that_a_module_only_imported_is_refused(tmp_path):
    write_module(tmp_path, "from shutil import rmtree\nfrom os import system")
    assert "defines no function rmtree" in refusal("my_rewards:rmtree", tmp_path)
    assert "defines no function system" in refusal("my_rewards:system", tmp_path)


@pytest.mark.parametrize("name", ["missing", "number", "Class", "__builtins__"])
def test_what_is_no_function_of_the_module_is_refused(tmp_path, name):
    write_module(tmp_path, "number = 3\nclass Class: pass")
    assert f"my_rewards defines no function {name}" in refusal(f"my_rewards:{name}", tmp_path)


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("import not_installed", "ModuleNotFoundError: No module named 'not_installed'"),
        ("def f(:", "SyntaxError"),
        ("raise RuntimeError('first\\nsecond')", "RuntimeError: first"),
        ("import sys; sys.exit('usage: ...')", "SystemExit: usage"),
    ],
)
def test_a_module_that_does_not_import_is_refused_with_its_error(tmp_path, source, problem):
    write_module(tmp_path, source)
    assert problem in refusal("my_rewards:f", tmp_path)


def test_a_package_that_does_not_import_is_refused_with_its_error(tmp_path):
    write_module(tmp_path, "raise RuntimeError('x')", "package/__init__")
    write_module(tmp_path, "def f(**_): return []", "package/inner")
    assert "RuntimeError: x" in refusal("package.inner:f", tmp_path)


# ---- Calling -----------------------------------------------------------------------------------


def call(folder: Path, source: str, *completions: str, row: dict[str, Any] = ROW) -> Reply:
    """The answer of the function f of ``source``, called in this process."""
    write_module(folder, source)
    finish: list[FinishReason] = ["stop" for _ in completions]
    request = Call("f", row, list(completions), [[1, 2] for _ in completions], finish)
    with asyncio.Runner() as runner:
        return answer(load_reward("my_rewards:f", (), folder), request, runner)


@pytest.mark.parametrize("kind", ["", "async "])
def test_plain_and_async_functions_give_scores_of_any_number_type(tmp_path, kind):
    body = "import numpy as np\n{kind}def f(**_): return (True, 2, None, 0.5, np.float32(3))"
    assert call(tmp_path, body.format(kind=kind), *"abcde") == Reply([1.0, 2.0, None, 0.5, 3.0])


def test_the_tensors_of_a_list_are_numbers(tmp_path):
    source = "import torch\ndef f(**_): return [torch.tensor(1.5), torch.tensor([2.0])]"
    assert call(tmp_path, source, "a", "b") == Reply([1.5, 2.0])


def test_async_functions_may_keep_what_belongs_to_their_loop(tmp_path):
    write_module(
        tmp_path, "import asyncio\nasync def f(**_): return [id(asyncio.get_event_loop())]"
    )
    function = load_reward("my_rewards:f", (), tmp_path)
    with asyncio.Runner() as runner:
        replies = [
            answer(function, Call("f", ROW, ["a"], [[1]], ["stop"]), runner) for _ in range(2)
        ]
    assert replies[0] == replies[1]


def test_functions_get_every_column_by_name_once_per_completion(tmp_path):
    source = """
def f(prompts, completions, completion_ids, answer, **rest):
    assert (prompts, completions) == (["2 + 2"] * 2, ["4", "5"]), (prompts, completions)
    assert completion_ids == [[1, 2], [1, 2]], completion_ids
    assert rest == {"level": [3, 3], "finish": ["stop", "stop"]}, rest
    return [float(a == c) for a, c in zip(answer, completions)]
"""
    assert call(tmp_path, source, "4", "5", row={**ROW, "level": 3}) == Reply([1.0, 0.0])


def test_functions_get_the_finish_of_each_completion_and_their_own_arguments(tmp_path):
    write_module(
        tmp_path,
        "def f(finish, scale, level, **_): return [scale * (x == 'length') for x in finish]",
    )
    request = Call(
        "f",
        {**ROW, "level": 3, "finish": "a column"},
        ["a", "b"],
        [[1], [2, 3]],
        ["stop", "length"],
        {"scale": 2.5},
    )
    with asyncio.Runner() as runner:
        reply = answer(load_reward("my_rewards:f", (), tmp_path), request, runner)
    assert reply == Reply([0.0, 2.5])


def test_the_completions_of_a_chat_are_messages(tmp_path):
    source = """
def f(prompts, completions, **_):
    assert prompts == [[{"role": "user", "content": "hi"}]] * 2, prompts
    assert [c[0]["role"] for c in completions] == ["assistant"] * 2
    return [len(c[0]["content"]) for c in completions]
"""
    row = {"prompt": [{"role": "user", "content": "hi"}]}
    assert call(tmp_path, source, "a", "bbb", row=row) == Reply([1.0, 3.0])


UNPRINTABLE = """
class Unprintable(Exception):
    def __str__(self): raise ValueError
def f(**_): raise Unprintable
"""


@pytest.mark.parametrize(
    ("body", "kind", "problem"),
    [
        ("return [1.0]", "invalid", "returned a list of 1 instead of a list of 2 scores"),
        ("return [1.0] * 3", "invalid", "returned a list of 3 instead of a list of 2 scores"),
        ("return [1.0] * 10_000_000", "invalid", "returned a list of 10000000 instead"),
        ("return None", "invalid", "returned NoneType"),
        ("return 1.0", "invalid", "returned float"),
        ("return {0: 1, 1: 2}", "invalid", "returned dict"),
        ("return (s for s in [1, 2])", "invalid", "returned generator"),
        ("return ['high', 1]", "invalid", "returned 'high', which is no number"),
        ("return [[1], 1]", "invalid", "which is no number"),
        ("return [1j, 1]", "invalid", "which is no number"),
        ("return [float('nan'), 1]", "invalid", "returned nan; return None where"),
        ("return [float('inf'), 1]", "invalid", "returned inf; return None where"),
        ("return [1e39, 1]", "invalid", "returned 1e+39; return None where"),
        ("return [10**400, 1]", "invalid", "which is no number"),
        ("return ['x\\ny' * 100_000, 1]", "invalid", "which is no number"),
        ("raise KeyError('answer')", "raised", "raised KeyError: 'answer' (my_rewards.py, line 1)"),
        ("raise ValueError('first\\nsecond')", "raised", "raised ValueError: first"),
        ("raise ValueError('x' * 1_000_000)", "raised", "raised ValueError: x"),
        ("assert completions == 'x' * 1_000_000", "raised", "raised AssertionError"),
        ("raise SystemExit(3)", "raised", "raised SystemExit: 3"),
        ("raise KeyboardInterrupt", "raised", "raised KeyboardInterrupt"),
        ("return g(g)", "raised", "raised RecursionError"),
    ],
)
@pytest.mark.parametrize("prefix", ["", "async "])
def test_what_is_no_list_of_scores_is_one_short_line(tmp_path, prefix, body, kind, problem):
    source = f"{prefix}def f(completions, **_): {body}\ndef g(h): return h(h)"
    reply = call(tmp_path, source, "a", "b")
    assert problem in reply.problem
    assert reply.kind == kind
    # It is sent to the learner and logged on both sides.
    assert "\n" not in reply.problem
    assert len(reply.problem) < 500


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("def f(**_): raise StopIteration(3)", "raised StopIteration: 3"),
        ("async def f(**_): raise StopIteration(3)", "raised RuntimeError: coroutine raised Stop"),
        ("def f(completions): return [1, 1]", "raised TypeError: f() got an unexpected keyword"),
        (UNPRINTABLE, "raised Unprintable: (its text cannot be shown)"),
    ],
)
def test_odd_errors_are_shown_too(tmp_path, source, problem):
    assert call(tmp_path, source, "a", "b").problem.startswith(problem)
