"""`gdpo show`: which completions it shows, and what a person or a program reads of them."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from deploy import USER_ERROR
from deploy.cli import main
from learner.completions.files import CompletionFiles
from tests.unit.learner.completions.examples import make_completion

ROWS = [
    make_completion(step, prompt_index=step, advantage=advantage, scores=scores, **more)
    for step, advantage, scores, more in (
        (1, -1.5, {"format": 0.0, "length": 0.25}, {"finish": "length"}),
        (2, 2.5, {"format": 1.0, "length": math.nan}, {}),
        (3, 0.5, {"format": 0.5, "length": -0.5}, {}),
        (4, 0.0, {"format": 0.75, "length": 0.75}, {"finish": "length"}),
    )
]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "config.toml").touch()
    return tmp_path


@pytest.fixture
def files(run: Path) -> CompletionFiles:
    return CompletionFiles(run / "completions.parquet", max_bytes=4 << 20)


def printed(capsys: Any, run: Path, *options: str) -> str:
    assert main(["show", str(run), *options]) == 0
    text: str = capsys.readouterr().out
    return text


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ("", [4, 3, 2, 1]),
        ("--count 2", [4, 3]),
        ("--best", [2, 3, 4, 1]),
        ("--worst", [1, 4, 3, 2]),
        ("--worst --count 1", [1]),
        ("--step 3", [3]),
        ("--truncated", [4, 1]),
        ("--reward format --best", [2, 4, 3, 1]),
        ("--reward format --worst --truncated", [1, 4]),
        # It does not apply to that of step 2.
        ("--reward length", [4, 3, 1]),
        ("--reward length --worst", [3, 1, 4]),
    ],
)
def test_those_that_are_wished_for_come_in_order(run, files, capsys, options, steps):
    files.add(ROWS)
    lines = printed(capsys, run, "--json", *options.split()).splitlines()
    assert [json.loads(line)["step"] for line in lines] == steps


def test_a_program_reads_all_of_a_completion(run, files, capsys):
    files.add(ROWS[1:2])
    assert json.loads(printed(capsys, run, "--json")) == {
        "step": 2,
        "prompt_index": 2,
        "rollout": 0,
        "prompt": "2 + 3 =",
        "completion": "5",
        "tokens": 2,
        "finish": "stop",
        "oldest_version": 0,
        "newest_version": 0,
        "advantage": 2.5,
        "scores": {"format": 1.0, "length": None},
    }


SHOWN = """\
step 4 · prompt 9, rollout 0 · version 3 · 2 tokens ────────────────────────────────────────────────
  format 1.000   correctness 0.250   advantage +0.500
  prompt      2 + 3 =
  completion  5

step 4 · prompt 9, rollout 1 · versions 2 to 3 · 1 token · cut off ─────────────────────────────────
  format 0.000   correctness does not apply   advantage -0.500
  completion  nothing

2 of 2 completions, of steps 4 to 4
"""


def test_a_person_reads_a_prompt_once_for_its_group(run, files, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    good = make_completion(4, prompt_index=9, oldest_version=3, newest_version=3)
    bad = make_completion(
        4,
        prompt_index=9,
        rollout=1,
        completion="",
        tokens=1,
        finish="length",
        oldest_version=2,
        newest_version=3,
        advantage=-0.5,
        scores={"format": 0.0, "correctness": math.nan},
    )
    files.add([good, bad])
    lines = printed(capsys, run).splitlines()
    assert "\n".join(line.rstrip() for line in lines) + "\n" == SHOWN


def test_the_end_of_a_long_completion_is_shown_and_all_of_it_on_request(run, files, capsys):
    text = "a" * 3000 + "b" * 3000 + "the end"
    files.add([make_completion(completion=text)])
    shown = printed(capsys, run)
    assert "the end" in shown
    # 6007 characters less the 2000 that are shown.
    assert "4,007 characters, which --whole shows" in " ".join(shown.split())
    assert 1900 < shown.count("a") + shown.count("b") < 2100
    assert printed(capsys, run, "--whole").count("b") >= 3000


def test_a_terminal_obeys_nothing_that_a_model_wrote(run, files, capsys):
    files.add([make_completion(prompt="[red]one\x1b[2J", completion="two\x07\nthree\r[/]")])
    shown = printed(capsys, run)
    for text in (r"[red]one\x1b[2J", r"two\x07", r"three\r[/]"):
        assert text in shown
    assert not set(shown) & set("\x1b\x07\r")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("--reward nope", "no reward is called 'nope'; the rewards are format, length"),
        ("--step 9", "4 completions, of steps 1 to 4"),
    ],
)
def test_what_is_not_there_is_one_clear_line(run, files, capsys, options, expected):
    files.add(ROWS)
    assert main(["show", str(run), *options.split()]) == USER_ERROR
    error = capsys.readouterr().err
    assert expected in error
    assert len(error.splitlines()) == 1


def test_a_folder_of_no_run_and_a_run_without_completions_are_told_apart(run, capsys):
    assert main(["show", str(run / "nowhere")]) == USER_ERROR
    assert "nowhere is no folder of a run" in capsys.readouterr().err
    assert main(["show", str(run)]) == USER_ERROR
    assert "there are no completions in" in capsys.readouterr().err
