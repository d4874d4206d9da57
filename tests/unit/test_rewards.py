"""Reward functions: which may be imported, and what becomes of what they return."""

import asyncio
import math
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from actors.rewards import DEFAULT_MODULES, RewardScorer, load_reward
from protocol.config import RewardConfig
from protocol.errors import RewardError

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
    ["os:system", "shutil:rmtree", "actors.app:Actor", "actors.tasks_of_others:f"],
)
def test_a_module_outside_of_what_is_allowed_is_refused_without_import(tmp_path, path):
    message = refusal(path, tmp_path)
    module = path.partition(":")[0]
    assert f"module {module} is not allowed here" in message
    assert f"--allow-rewards {module}" in message
    assert module in ("os", "shutil", "actors.app") or module not in sys.modules


def test_a_module_that_does_not_exist_is_said_not_to(tmp_path):
    message = refusal("my_reward:f", tmp_path)
    assert f"there is no module my_reward, neither in {tmp_path} nor installed" in message


def test_the_command_line_may_allow_a_module_and_what_is_below_it(tmp_path):
    assert load_reward("json.tool:main", ("json",), tmp_path)
    # A name is no prefix of another.
    assert "is not allowed" in refusal("json.tool:main", tmp_path, ("js",))


def test_a_folder_of_the_same_name_does_not_open_a_module_that_lies_elsewhere(tmp_path):
    # Data folders called `json` or `datasets` are common; those modules are not the user's.
    (tmp_path / "json").mkdir()
    assert "is not allowed" in refusal("json.tool:main", tmp_path)


def test_a_module_in_the_folder_may_be_allowed_by_name_as_well(tmp_path):
    write_module(tmp_path, "def f(**_): return []")
    assert load_reward("my_rewards:f", ("my_rewards",), tmp_path)


def test_a_package_that_is_spread_over_folders_opens_only_its_part_in_this_one(
    tmp_path, monkeypatch
):
    # Namespace packages, without __init__.py, like those that start with `google`.
    here, elsewhere = tmp_path / "here", tmp_path / "elsewhere"
    write_module(here, "def f(**_): return []", "spread/mine")
    write_module(elsewhere, "def f(**_): return []", "spread/others")
    monkeypatch.syspath_prepend(elsewhere)
    assert load_reward("spread.mine:f", (), here)
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


# ---- Scoring -----------------------------------------------------------------------------------


def make_scorer(tmp_path: Path, source: str, *names: str, timeout_s: float = 5.0) -> RewardScorer:
    """A scorer for functions of a module in ``tmp_path``; each reward has its function's name."""
    write_module(tmp_path, source)
    return RewardScorer(
        [RewardConfig(name=name, function=f"my_rewards:{name}") for name in names],
        allowed_modules=(),
        folder=tmp_path,
        timeout_s=timeout_s,
    )


async def score(scorer: RewardScorer, *completions: str, row: dict = ROW) -> list:
    ids = [[1, 2] for _ in completions]
    return (await scorer.score(row, list(completions), ids)).tolist()


async def test_plain_and_async_functions_score_side_by_side(tmp_path):
    source = """
import asyncio
def plain(completions, **_): return [float(len(c)) for c in completions]
async def waiting(completions, **_):
    await asyncio.sleep(0)
    return [True, 2]
"""
    scorer = make_scorer(tmp_path, source, "plain", "waiting")
    assert scorer.names == ("plain", "waiting")
    scores = await scorer.score(ROW, ["a", "bbb"], [[1], [2]])
    assert scores.dtype == np.float32
    assert scores.tolist() == [[1, 1], [3, 2]]


async def test_none_means_does_not_apply(tmp_path):
    scorer = make_scorer(tmp_path, "def f(**_): return [None, 0.5]", "f")
    np.testing.assert_array_equal(await score(scorer, "a", "b"), [[NAN], [0.5]])


async def test_functions_get_every_column_by_name_once_per_completion(tmp_path):
    source = """
def f(prompts, completions, completion_ids, answer, **rest):
    assert (prompts, completions) == (["2 + 2"] * 2, ["4", "5"]), (prompts, completions)
    assert completion_ids == [[1, 2], [1, 2]], completion_ids
    assert rest == {"level": [3, 3]}, rest
    return [float(a == c) for a, c in zip(answer, completions)]
"""
    row = {**ROW, "level": 3}
    assert await score(make_scorer(tmp_path, source, "f"), "4", "5", row=row) == [[1], [0]]


async def test_the_completions_of_a_chat_are_messages(tmp_path):
    source = """
def f(prompts, completions, **_):
    assert prompts == [[{"role": "user", "content": "hi"}]] * 2, prompts
    assert [c[0]["role"] for c in completions] == ["assistant"] * 2
    return [len(c[0]["content"]) for c in completions]
"""
    row = {"prompt": [{"role": "user", "content": "hi"}]}
    assert await score(make_scorer(tmp_path, source, "f"), "a", "bbb", row=row) == [[1], [3]]


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ("return [1.0]", "returned a list of 1 instead of a list of 2 scores"),
        ("return [1.0] * 3", "returned a list of 3 instead of a list of 2 scores"),
        ("return None", "returned NoneType"),
        ("return 1.0", "returned float"),
        ("return {0: 1, 1: 2}", "returned dict"),
        ("return (s for s in [1, 2])", "returned generator"),
        ("return ['high', 1]", "returned 'high', which is no number"),
        ("return [[1], 1]", "which is no number"),
        ("return [1j, 1]", "which is no number"),
        ("return [float('nan'), 1]", "returned nan; return None where"),
        ("return [float('inf'), 1]", "returned inf; return None where"),
        ("return [1e39, 1]", "returned 1e+39; return None where"),
        ("return [10**400, 1]", "which is no number"),
        ("raise KeyError('answer')", "raised KeyError: 'answer'"),
        ("raise ValueError('first\\nsecond')", "raised ValueError: first"),
        ("return ['x\\ny' * 100_000, 1]", "which is no number"),
        ("raise ValueError('x' * 1_000_000)", "raised ValueError: x"),
        ("assert completions == 'x' * 1_000_000", "raised AssertionError"),
    ],
)
@pytest.mark.parametrize("kind", ["", "async "])
async def test_what_is_no_list_of_scores_fails_in_one_short_line(tmp_path, kind, body, problem):
    scorer = make_scorer(tmp_path, f"{kind}def f(completions, **_): {body}", "f", timeout_s=1)
    with pytest.raises(RewardError) as caught:
        await score(scorer, "a", "b")
    message = str(caught.value)
    assert message.startswith("reward 'f' ")
    assert problem in message
    # It is sent to the learner and logged on both sides.
    assert "\n" not in message
    assert len(message) < 2000


@pytest.mark.parametrize("error", ["StopIteration", "SystemExit"])
async def test_a_plain_function_cannot_end_anything_but_its_group(tmp_path, error):
    scorer = make_scorer(tmp_path, f"def f(**_): raise {error}(3)", "f", timeout_s=1)
    with pytest.raises(RewardError, match=error):
        await score(scorer, "a", "b")


async def test_a_function_that_does_not_take_the_columns_fails(tmp_path):
    scorer = make_scorer(tmp_path, "def f(completions): return [1, 1]", "f")
    with pytest.raises(RewardError, match=r"raised TypeError.*unexpected keyword"):
        await score(scorer, "a", "b")


@pytest.mark.parametrize(
    "source",
    [
        "import asyncio\nasync def f(**_): await asyncio.sleep(9)",
        "import time\ndef f(**_): time.sleep(0.3)",
    ],
    ids=["async", "plain"],
)
async def test_a_function_that_takes_too_long_fails_after_its_time(tmp_path, source):
    scorer = make_scorer(tmp_path, source, "f", timeout_s=0.05)
    started = time.monotonic()
    with pytest.raises(RewardError, match=r"reward 'f' took longer than 0\.05 s"):
        await score(scorer, "a", "b")
    assert time.monotonic() - started < 0.3


def test_a_function_that_ends_after_the_loop_is_closed_is_no_error(tmp_path, monkeypatch):
    errors = []
    monkeypatch.setattr(threading, "excepthook", errors.append)
    scorer = make_scorer(tmp_path, "import time\ndef f(**_): time.sleep(0.2)", "f", timeout_s=0.01)
    before = {*threading.enumerate()}
    with pytest.raises(RewardError):
        asyncio.run(score(scorer, "a", "b"))
    for thread in {*threading.enumerate()} - before:
        thread.join(10)
    assert errors == []


def test_a_scorer_with_a_function_that_cannot_be_loaded_is_not_made(tmp_path):
    with pytest.raises(RewardError, match="defines no function f"):
        make_scorer(tmp_path, "", "f")
