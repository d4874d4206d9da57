"""SIGTERM at any moment: gone within ten seconds, and nothing is left behind."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from tests.chaos.system import At, Chaos
from tests.integration.processes import QUICK, RECIPE, Process, children_of, wait_for

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(240)]

GONE_S = 10.0
INTERRUPTED = 130
BY_SIGNAL = -signal.SIGTERM
DEFAULTS = ("weights.timeout_s=10", "deadlines.actor_timeout_s=10", "deadlines.lease_timeout_s=60")
"""A deadline of the collective that is longer than what is allowed here."""


@pytest.fixture
def shared_memory() -> Callable[[], set[str]]:
    """Files in shared memory that were not there before the test."""
    folder = Path("/dev/shm")
    before = {path.name for path in folder.iterdir()}
    return lambda: {path.name for path in folder.iterdir()} - before


def gone_after_s(process: Process, since: float, codes: tuple[int, ...]) -> float:
    code = process.wait(40)
    seconds = time.monotonic() - since
    assert code in codes, f"exit code {code}\n{process.output}"
    assert "Traceback" not in process.output, process.output
    assert seconds <= GONE_S, f"{seconds:.1f} s\n{process.output}"
    return seconds


def assert_nothing_is_left(chaos: Chaos, shared_memory: Callable[[], set[str]]) -> None:
    """No process, no temporary folder, no shared memory, and no checkpoint that does not open."""
    wait_for(lambda: not chaos.processes_left(), "the others to end", GONE_S)
    assert chaos.files_left() == []
    assert shared_memory() == set()
    checkpoint = chaos.run_folder / "checkpoint"
    assert not list(chaos.folder.rglob("*.partial"))
    if checkpoint.exists():
        AutoModelForCausalLM.from_pretrained(checkpoint)


def term(process: Process) -> float:
    process.signal(signal.SIGTERM)
    return time.monotonic()


# ---- The learner -------------------------------------------------------------------------------


def test_a_learner_that_loads(chaos: Chaos, shared_memory: Any, figures: Any):
    learner = chaos.begin_learner(crash=At("learner.load", 1, "term"))
    since = chaos.expect_crash(learner).at
    figures(gone_s=gone_after_s(learner, since, (BY_SIGNAL,)))
    assert_nothing_is_left(chaos, shared_memory)


def test_a_learner_that_has_just_begun_to_listen(chaos: Chaos, shared_memory: Any, figures: Any):
    learner = chaos.start_learner(*DEFAULTS)
    figures(gone_s=gone_after_s(learner, term(learner), (INTERRUPTED, BY_SIGNAL)))
    assert_nothing_is_left(chaos, shared_memory)


def test_a_learner_that_evaluates(chaos: Chaos, shared_memory: Any, figures: Any):
    """Its actor is in the middle of groups that take a minute."""
    learner = chaos.start_learner(*DEFAULTS)
    actor = chaos.start_toy("actor", group_s=60)
    wait_for(lambda: (chaos.actor(actor.pid) or {}).get("leases"), "leases")
    since = term(learner)
    figures(
        learner_gone_s=gone_after_s(learner, since, (INTERRUPTED,)),
        actor_gone_s=gone_after_s(actor, since, (0,)),
    )
    assert_nothing_is_left(chaos, shared_memory)


@pytest.mark.parametrize(
    ("point", "call", "steps", "code"),
    [
        ("learner.step.inside", 7, 100, INTERRUPTED),
        ("learner.push.joined", 3, 100, INTERRUPTED),
        # All steps are made, but the evaluation after them is not.
        ("learner.save.half", 1, 3, INTERRUPTED),
        ("learner.leave", 1, 3, 0),
    ],
)
def test_a_learner_in_the_middle_of_something(
    chaos: Chaos, shared_memory: Any, figures: Any, point: str, call: int, steps: int, code: int
):
    learner = chaos.start_learner(
        *DEFAULTS, f"training.steps={steps}", crash=At(point, call, "term")
    )
    actor = chaos.start_toy("actor")
    since = chaos.expect_crash(learner).at
    figures(
        point=point,
        learner_gone_s=gone_after_s(learner, since, (code,)),
        actor_gone_s=gone_after_s(actor, since, (0,)),
    )
    assert (chaos.run_folder / "checkpoint").exists()
    assert_nothing_is_left(chaos, shared_memory)


@pytest.mark.parametrize("point", ["push", "push.joined", "push.bucket"])
def test_a_learner_that_pushes_to_a_frozen_actor(
    chaos: Chaos, shared_memory: Any, figures: Any, point: str
):
    """It can neither finish the push nor say goodbye to that actor."""
    learner = chaos.start_learner(*DEFAULTS)
    healthy = chaos.start_toy("healthy")
    frozen = chaos.start_toy("frozen", crash=At(point, 1, "stop"))
    chaos.expect_crash(frozen)
    since = term(learner)
    figures(
        point=point,
        learner_gone_s=gone_after_s(learner, since, (INTERRUPTED,)),
        healthy_actor_gone_s=gone_after_s(healthy, since, (0,)),
    )
    since = term(frozen)
    frozen.signal(signal.SIGCONT)
    figures(continued_actor_gone_s=gone_after_s(frozen, since, (0,)))
    assert_nothing_is_left(chaos, shared_memory)


# ---- Actors ------------------------------------------------------------------------------------


def test_an_actor_whose_learner_is_not_there(chaos: Chaos, shared_memory: Any, figures: Any):
    chaos.url = "tcp://127.0.0.1:9"
    proxy = chaos.through_a_proxy()
    actor = chaos.start_toy("actor")
    wait_for(lambda: proxy.attempts, "it to say hello")
    since = term(actor)
    figures(gone_s=gone_after_s(actor, since, (BY_SIGNAL,)))
    assert_nothing_is_left(chaos, shared_memory)


def test_actors_at_every_moment(chaos: Chaos, shared_memory: Any, figures: Any):
    """While others work on: building, pulling weights, generating, in a push, in a reward."""
    chaos.start_learner(*DEFAULTS, "actor.reward_timeout_s=60")
    proxy = chaos.through_a_proxy()

    building = chaos.start_toy("building", start_s=60)
    wait_for(lambda: chaos.actor(building.pid), "its hello")
    figures(moment="building", gone_s=gone_after_s(building, term(building), (0,)))

    pulling = chaos.start_toy("pulling", start_s=1)
    wait_for(lambda: "joined run" in pulling.output, "its welcome")
    proxy.freeze("down")
    time.sleep(3)
    assert chaos.actor(pulling.pid)["version"] == -1
    figures(moment="pulling", gone_s=gone_after_s(pulling, term(pulling), (0,)))
    proxy.restore()

    generating = chaos.start_toy("generating", group_s=60)
    wait_for(lambda: (chaos.actor(generating.pid) or {}).get("leases"), "its leases")
    figures(moment="generating", gone_s=gone_after_s(generating, term(generating), (0,)))

    for point in ("push", "push.joined", "push.bucket"):
        pushing = chaos.start_toy(point, crash=At(point, 1, "term"))
        since = chaos.expect_crash(pushing).at
        figures(moment=point, gone_s=gone_after_s(pushing, since, (0,)))

    (chaos.folder / "hang").touch()
    scoring = chaos.start_toy("scoring")
    wait_for(lambda: list(chaos.folder.glob("hang.*")), "the reward")
    figures(moment="scoring", gone_s=gone_after_s(scoring, term(scoring), (0,)))

    chaos.audit()
    assert_nothing_is_left(chaos, shared_memory)


# ---- gdpo run ----------------------------------------------------------------------------------


@pytest.mark.parametrize("moment", ["loading", "training", "with a frozen actor"])
def test_a_launcher(chaos: Chaos, shared_memory: Any, figures: Any, moment: str):
    run = chaos.python("run", "-m", "deploy", "run", str(RECIPE), *QUICK, "training.steps=1000")
    if moment == "loading":
        wait_for(lambda: children_of(run.pid), "its learner")
    else:
        chaos.wait_until_it_listens(run)
        chaos.wait_for_step(2)
    if moment == "with a frozen actor":
        os.kill(chaos.status()["actors"][0]["pid"], signal.SIGSTOP)
    since = term(run)
    figures(moment=moment, gone_s=gone_after_s(run, since, (INTERRUPTED,)))
    assert_nothing_is_left(chaos, shared_memory)
