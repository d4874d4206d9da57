"""Evaluations while training goes on: real actors that keep a version, and a learner killed."""

import json
import signal
from typing import Any

import pytest

from tests.integration.processes import (
    System,
    assert_books_balance,
    free_port,
    metrics,
    steps,
    wait_for,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

SETS = (
    "eval.sets=[{name='greedy', temperature=0, prompts=16}]",
    "eval.pass_when={reward='format', at_least=1.0}",
    "eval.pass_at=[1, 2]",
)


def evaluations(system: System) -> list[dict[str, Any]]:
    """What the run wrote of each evaluation, in order."""
    lines = (system.run_folder / "evaluations.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_training_goes_on_while_a_version_is_evaluated(system: System):
    system.start_learner(
        "training.steps=40", "training.max_staleness=4", "eval.every_steps=10", *SETS
    )
    actors = [system.start_actor(name) for name in ("first", "second")]
    seen: list[dict[str, Any]] = []

    def look() -> bool:
        seen.append(system.status())
        return bool(seen[-1]["evaluation"]) and seen[-1]["evaluation"]["version"] >= 10

    wait_for(look, "an evaluation in the middle of training")
    page = metrics(system.get("/metrics"))
    assert page["gdpo_evaluations_total"] >= 2
    assert page["gdpo_eval_version"] >= 10
    assert "gdpo_eval_pass_ratio" in page
    assert system.learner.wait(100) == 0, system.learner.output
    assert [actor.wait(20) for actor in actors] == [0, 0]

    found = evaluations(system)
    assert system.summary["evaluations"] == found
    assert [evaluation["due"] for evaluation in found] == [0, 10, 20, 30, 40]
    for evaluation in found:
        assert evaluation["due"] <= evaluation["version"] <= evaluation["due"] + 4
        heldout, greedy = (evaluation["sets"][name] for name in ("heldout", "greedy"))
        assert (heldout["prompts"], heldout["num_rollouts"]) == (8, 2)
        assert (greedy["prompts"], greedy["num_rollouts"], greedy["temperature"]) == (16, 1, 0)
        assert heldout["pass_at"].keys() == {"1", "2"}
        # All scores are 0 or 1, so that pass@1 is the mean.
        assert greedy["pass_at"] == {"1": pytest.approx(greedy["means"]["format"])}
        assert heldout["pass_at"]["1"] == pytest.approx(heldout["means"]["format"])
        assert heldout["pass_at"]["2"] >= heldout["pass_at"]["1"]
    summary = system.summary
    assert summary["books"]["leases"]["eval"]["received"] == 5 * (8 + 16)
    # None had a token of another version, which would have been refused.
    assert summary["bad_messages"] == 0
    assert summary["staleness"]["largest"] <= 4
    assert [line["step"] for line in steps(system)] == list(range(1, 41))
    assert_books_balance(summary)


def test_an_evaluation_does_not_hold_training_up_and_a_killed_learner_makes_it_again(
    system: System,
):
    bind = f"endpoints.bind=tcp://127.0.0.1:{free_port()}"
    # Long enough to be there when it is looked for, and to be killed in.
    long = ("eval.prompts=64", "eval.num_rollouts=16", "actor.max_leases=4")
    system.start_learner(
        *("training.steps=30", "training.max_staleness=4", "eval.every_steps=8", bind, *long)
    )
    actors = [system.start_actor(name) for name in ("first", "second")]

    def behind() -> bool:
        """Whether training is beyond the version that is being evaluated."""
        status = system.status()
        evaluating = status["evaluating"]
        return bool(evaluating) and 8 <= evaluating["version"] < status["step"]

    wait_for(behind, "a step during an evaluation")
    held = {actor["version"] for actor in system.status()["actors"]}
    assert len(held) <= 2
    system.learner.signal(signal.SIGKILL)
    system.learner.wait()
    before = evaluations(system)

    system.resume_learner()
    assert system.learner.wait(100) == 0, system.learner.output
    assert [actor.wait(20) for actor in actors] == [0, 0]
    found = evaluations(system)
    assert found[: len(before)] == before
    dues = [evaluation["due"] for evaluation in found]
    assert dues == sorted(set(dues))
    assert {0, 8, 30} <= set(dues)
    assert all(e["sets"]["heldout"]["prompts"] == 64 for e in found)
    assert system.summary["evaluations"] == found
    assert_books_balance(system.summary)
