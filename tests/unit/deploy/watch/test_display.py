"""What people see of a run, from its first moment to its end."""

import io
from threading import Semaphore
from typing import Any

from rich.console import Console

from deploy.results.summary import print_summary
from deploy.watch.display import Display, render_line, render_panel
from deploy.watch.status import read_status
from learner.status import Status
from tests.unit.record_examples import HELDOUT, make_summary
from tests.unit.status_examples import EARLY, RUNNING


def panel_text(status: dict[str, Any]) -> str:
    console = Console(file=(file := io.StringIO()), width=80)
    console.print(render_panel(read_status(status)))
    return file.getvalue()


def test_the_line_of_an_early_run_says_that_nothing_has_happened_yet():
    assert render_line(read_status(EARLY)) == (
        "evaluating before | step 0/100 | evaluating 0 of 128 prompts | actors 0"
    )


def test_the_line_of_a_running_run_holds_what_matters():
    # 3725 s = 1 h 2 min 5 s
    assert render_line(read_status(RUNNING)) == (
        "training | step 40/100 | format 0.512 | correctness -0.250 | generated 12346 tok/s | "
        "trained 999 tok/s | staleness 0.8 (max 2) | buffer 17 | length 1235 | cut off 6% | "
        "dead groups 12% | entropy 0.99 | heldout at 20: format 0.750, correctness - | "
        "greedy at 20: format 1.000, correctness 0.500, pass@1 0.625 | "
        "evaluating version 40: 12 of 256 prompts | actors 2 | bottleneck actors | 1:02:05 left"
    )


def test_the_panel_of_an_early_run_leaves_out_what_is_unknown():
    text = panel_text(EARLY)
    assert "0 of 100" in text
    assert "0 live" in text
    for unknown in ("None", "staleness", "bottleneck", "left", "would do"):
        assert unknown not in text


def test_the_panel_of_a_running_run_names_the_bottleneck():
    text = panel_text(RUNNING)
    for part in (
        "gdpo · tiny",
        "40 of 100, 1:02:05 left",
        "0.512",
        "1,234.6 tokens on average, 3 to 2,048; 6.2% cut off",
        "entropy 0.988, learning rate 2.5e-06",
        "12.5%, without any signal",
        "12,346 generated, 999 trained a second",
        "version 20: format 1.000, correctness 0.500, pass@1 0.625",
        "version 40: 12 of 256 prompts",
        "0.8 on average, 2 at most (limit 2)",
        "17 groups, 1.5 MB (a batch takes 32)",
        "2 live, 3 would do",
        "actors 5%, learner 40%",
        "the actors (the learner waits for groups: add actors)",
    ):
        assert part in text


def test_an_entropy_that_is_not_computed_is_left_out():
    assert RUNNING["last_step"]["entropy"]
    status = RUNNING | {"last_step": RUNNING["last_step"] | {"entropy": None}}
    assert "entropy" not in render_line(read_status(status))
    assert "entropy" not in panel_text(status)


def test_a_reward_that_never_applied_is_shown():
    status = RUNNING | {"rewards": {"format": float("nan")}}
    assert "format nan" in render_line(read_status(status))
    assert "nan" in panel_text(status)


def test_a_name_of_a_run_or_reward_is_shown_as_it_is(monkeypatch):
    monkeypatch.setattr("deploy.watch.display.LINE_EVERY_S", 0.01)
    status = RUNNING | {"run": "[red]tiny", "rewards": {"[bold]format[/]": 0.5}}
    asked = Semaphore(0)

    def source() -> Status:
        asked.release()
        return read_status(status)

    console = Console(file=(file := io.StringIO()), width=200)
    with Display(source, console):
        # With the second question the first answer has been printed.
        assert asked.acquire(timeout=10)
        assert asked.acquire(timeout=10)
    assert "[bold]format[/] 0.500" in file.getvalue()
    assert "[red]tiny" in panel_text(status)
    assert "[bold]format[/]" in panel_text(status)


def test_the_display_ends_at_once_though_there_was_nothing_to_show():
    console = Console(file=(file := io.StringIO()))
    with Display(lambda: None, console):
        pass
    assert file.getvalue() == ""


# ---- The summary -------------------------------------------------------------------------------


def test_the_summary_shows_rewards_books_and_where_things_are(capsys):
    print_summary(make_summary(), plot=None)
    text = capsys.readouterr().out
    for part in (
        "heldout: 8 prompts x 4 sampled",
        "+0.500",
        "9 leased = 7 received + 2 failed (2 actor_lost) + 0 outstanding  [balanced]",
        "7 accepted = 4 trained + 0 evicted + 2 buffered  [NOT BALANCED]",
        "10 steps in 12 s, 1,234 tokens trained a second",
        "at lag 0: 1.2e-06",
        "checkpoint: runs/tiny/checkpoint",
    ):
        assert part in text
    assert "ended early" not in text


def test_the_summary_shows_every_set_with_what_it_came_to_at_best(capsys):
    def result(version: int, value: float) -> dict[str, Any]:
        greedy = HELDOUT | {
            "num_rollouts": 1,
            "temperature": 0.0,
            "means": {"a": value, "b": None},
            "pass_at": {"1": value},
        }
        return {
            "due": version,
            "version": version,
            "seconds": 1.0,
            "sets": {"heldout": HELDOUT, "greedy": greedy},
        }

    evaluations = [result(0, 0.125), result(6, 0.875), result(10, 0.5)]
    print_summary(make_summary(evaluations=evaluations), plot=None)
    lines = capsys.readouterr().out.splitlines()
    assert any("greedy: 8 prompts x 1 greedy" in line for line in lines)
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if "│" in line]
    assert ["a", "0.125", "0.875 (6)", "0.500", "+0.375"] in cells
    assert ["b", "-", "-", "-", ""] in cells
    assert ["pass@1", "0.125", "0.875 (6)", "0.500", "+0.375"] in cells
    assert ["tokens", "9.0", "", "9.0", ""] in cells


def test_the_summary_of_a_run_that_was_stopped_says_why(capsys):
    summary = make_summary(
        completed=False,
        ended_because="SIGINT",
        rewards={"changes": [], "failures": {"a": 3, "b": 1}},
        evaluations=[],
        lag0_logprob_difference=None,
        checkpoint=None,
    )
    print_summary(summary, plot=None)
    text = capsys.readouterr().out
    assert "The run ended early after 10 steps: SIGINT" in text
    assert "checkpoint" not in text


def test_a_cause_is_printed_as_it_is_whatever_brackets_it_holds(capsys):
    cause = "3 groups failed in a row because: KeyError: '[/INST]' [bold] [Errno 2]"
    print_summary(make_summary(completed=False, ended_because=cause), plot=None)
    assert cause in " ".join(capsys.readouterr().out.split())
