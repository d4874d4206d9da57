"""`gdpo run`: the whole loop on this machine, from a configuration to a checkpoint."""

import json
import os
import re
import signal

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.integration.processes import (
    assert_books_balance,
    children_of,
    is_alive,
    start_run,
    steps,
    versions_sampled_from,
    wait_for,
)

pytestmark = pytest.mark.timeout(240)


def test_a_run_trains_and_leaves_everything_a_person_looks_for(system):
    run = start_run(system, "training.steps=8")
    assert run.wait(100) == 0, run.output
    folder = system.run_folder
    summary = system.summary
    assert summary["completed"]
    assert summary["steps"] == 8
    assert_books_balance(summary)
    assert summary["books"]["groups"]["trained"] == 8 * 8
    assert summary["staleness"]["largest"] <= summary["staleness"]["limit"]
    assert summary["lag0_logprob_difference"] < 1e-4
    assert 0 < steps(system)[-1]["actor_difference_largest"] < 1e-4
    assert summary["weights"]["digest_mismatches"] == 0
    assert [(e["due"], e["version"]) for e in summary["evaluations"]] == [(0, 0), (8, 8)]
    for evaluation in summary["evaluations"]:
        assert evaluation["sets"]["heldout"]["prompts"] == 8
        assert evaluation["sets"]["heldout"]["means"].keys() == {"format", "correctness"}
    assert [step["step"] for step in steps(system)] == list(range(1, 9))
    assert (folder / "plots" / "curves.png").stat().st_size > 10_000
    for name in ("mean_length", "min_length", "max_length", "clipped_ratio"):
        assert f"completions/{name}" in steps(system)[-1]
    shown = system.gdpo("show", "show", str(folder), "--step", "8", "--count", "1000", "--json")
    assert shown.wait(30) == 0, shown.output
    # All of the newest step: 8 groups of the recipe's 4 rollouts.
    rows = [json.loads(line) for line in shown.output.splitlines()]
    assert len(rows) == 8 * 4
    lengths = [row["tokens"] for row in rows]
    assert sum(lengths) / len(lengths) == steps(system)[-1]["completions/mean_length"]
    for text in ("before", "after", "[balanced]", "checkpoint:", "curves:", "step"):
        assert text in run.output

    AutoTokenizer.from_pretrained(folder / "checkpoint")
    AutoModelForCausalLM.from_pretrained(folder / "checkpoint")
    evaluation = system.gdpo(
        "eval", "eval", str(folder / "config.toml"), "--model", str(folder / "checkpoint")
    )
    assert evaluation.wait(60) == 0, evaluation.output
    for name, mean in summary["evaluations"][-1]["sets"]["heldout"]["means"].items():
        printed = re.search(rf"{name}: (\S+)", evaluation.output)
        assert printed is not None
        assert float(printed[1]) == pytest.approx(mean, abs=1e-4)


@pytest.mark.slow
def test_every_third_version_is_pushed_and_the_last_one(system):
    run = start_run(system, "training.steps=10", "training.max_staleness=4", "weights.push_every=3")
    assert run.wait(100) == 0, run.output
    summary = system.summary
    assert summary["completed"]
    assert summary["steps"] == 10
    assert_books_balance(summary)
    assert summary["books"]["groups"]["trained"] == 10 * 8
    assert summary["staleness"]["largest"] <= 4
    # 3, 6, 9 and 10, which is the one that is evaluated; actors began with 0.
    assert summary["weights"]["pushes"] == 4
    assert summary["weights"]["digest_mismatches"] == 0
    assert summary["evaluations"][-1]["version"] == 10
    assert summary["evaluations"][-1]["sets"]["heldout"]["prompts"] == 8
    # The journal keeps all groups of so short a run.
    assert {0, 3} <= versions_sampled_from(system.run_folder) <= {0, 3, 6, 9}


@pytest.mark.slow
def test_a_dead_actor_is_started_again(system):
    run = start_run(system, "training.steps=400", "deadlines.actor_timeout_s=2")
    wait_for(lambda: system.status()["step"] >= 1, "the first step")
    victim = system.status()["actors"][0]["pid"]
    os.kill(victim, signal.SIGKILL)
    wait_for(
        lambda: (
            len({a["pid"] for a in system.status()["actors"]} - {victim}) == 2
            and system.actor(victim) is None
        ),
        "a new actor",
    )
    assert "died (killed by SIGKILL)" in run.output
    run.signal(signal.SIGINT)
    assert run.wait(30) == 130, run.output
    assert_books_balance(system.summary)


def test_one_ctrl_c_stops_everything_and_saves(system):
    run = start_run(system, "training.steps=400")
    system.wait_for_step(2)
    children = children_of(run.pid)
    assert len(children) == 3
    run.signal(signal.SIGINT)
    # Not 0: an interrupted run must not look like a finished one.
    assert run.wait(30) == 130, run.output
    assert not any(map(is_alive, children))
    assert not system.summary["completed"]
    assert_books_balance(system.summary)
    AutoModelForCausalLM.from_pretrained(system.run_folder / "checkpoint")


@pytest.mark.slow
def test_no_process_outlives_a_killed_launcher(system):
    run = start_run(system, "training.steps=400")
    system.wait_for_step(1)
    children = children_of(run.pid)
    run.signal(signal.SIGKILL)
    wait_for(lambda: not any(map(is_alive, children)), "the children's end", 20)
