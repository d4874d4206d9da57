"""The whole loop with vLLM actors: learner, weights in flight, late join, kill and restart."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.integration.conftest import system  # noqa: F401
from tests.integration.processes import (
    RECIPE,
    System,
    assert_books_balance,
    children_of,
    is_alive,
    wait_for,
)

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

VLLM = (
    "actor.engine=vllm",
    "actor.status_interval_s=0.1",
    "endpoints.bind=tcp://127.0.0.1:0",
    "endpoints.metrics_port=0",
    "training.threads=1",
    "training.batch_groups=8",
    "training.minibatches=2",
    "training.steps=10000",
    "eval.prompts=8",
    "eval.num_rollouts=2",
)
JOIN_S = 240


def actors_at_work(system: System) -> dict[int, dict[str, Any]]:  # noqa: F811
    """Actors by process that have passed their check and sent something since."""
    return {a["pid"]: a for a in system.status()["actors"] if a["groups"] > 2}


def test_actors_generate_join_die_and_are_replaced_while_training_goes_on(system):  # noqa: F811
    run = system.gdpo("run", "run", str(RECIPE), *VLLM)
    system.wait_until_it_listens(run, JOIN_S)

    # Two actors, whose engines compute what the learner does, follow its weights.
    wait_for(lambda: len(actors_at_work(system)) == 2, "two actors at work", JOIN_S)
    for actor in actors_at_work(system).values():
        assert actor["check"] == "passed"
        assert actor["check_difference"] < 1e-4
    step = system.status()["step"]
    system.wait_for_step(step + 5)
    wait_for(
        lambda: all(a["version"] > step for a in actors_at_work(system).values()),
        "both to have newer weights",
    )

    # A third one joins late, with the newest weights.
    late = system.start_actor("late")
    wait_for(lambda: late.pid in actors_at_work(system), "the late actor", JOIN_S)
    step = system.status()["step"]
    wait_for(lambda: actors_at_work(system)[late.pid]["version"] >= step, "its newest weights")

    # One is killed, of another the engine dies: both are replaced, and training goes on.
    first, second = (pid for pid in actors_at_work(system) if pid != late.pid)
    [orphan] = filter(is_engine, children_of(first))
    os.kill(first, signal.SIGKILL)
    wait_for(lambda: not is_alive(orphan), "the engine of a killed actor to end", 20)
    [engine] = filter(is_engine, children_of(second))
    os.kill(engine, signal.SIGKILL)
    wait_for(lambda: not is_alive(second), "the actor without an engine to end", 60)
    wait_for(
        lambda: len(actors_at_work(system).keys() - {first, second, late.pid}) == 2,
        "two new actors at work",
        JOIN_S,
    )
    system.wait_for_step(system.status()["step"] + 5)
    logs = [
        (system.run_folder / "logs" / f"{name}.log").read_text() for name in ("actor-0", "actor-1")
    ]
    assert any("gdpo: error: vLLM" in log for log in logs)

    everyone = [pid for pid in actors_at_work(system) if pid != late.pid]
    engines = [child for pid in everyone for child in children_of(pid) if is_engine(child)]
    run.signal(signal.SIGINT)
    assert run.wait(60) == 130, run.output
    assert late.wait(30) == 0, late.output
    summary = system.summary
    assert_books_balance(summary)
    assert summary["actors_lost"] >= 1
    assert summary["weights"]["digest_mismatches"] == 0
    assert summary["staleness"]["largest"] <= summary["staleness"]["limit"]
    assert len(engines) == 2
    wait_for(lambda: not any(map(is_alive, everyone + engines)), "all processes to be gone", 20)


def is_engine(pid: int) -> bool:
    """Whether a process is an engine of vLLM, which gives itself that title."""
    try:
        return b"EngineCore" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGINT])
def test_an_actor_that_ends_while_its_engine_starts_leaves_no_engine(system, signum):  # noqa: F811
    system.start_learner("actor.engine=vllm")
    actor = system.start_actor("actor")
    wait_for(lambda: any(map(is_engine, children_of(actor.pid))), "the engine's start", JOIN_S)
    [engine] = filter(is_engine, children_of(actor.pid))
    actor.signal(signum)
    assert actor.wait(15) == (-signal.SIGKILL if signum == signal.SIGKILL else 0), actor.output
    wait_for(lambda: not is_alive(engine), "the engine to end", 40)


def test_an_engine_that_dies_while_it_has_nothing_to_do_takes_its_actor_along(
    system,  # noqa: F811
):
    # The learner never gets through its first pause: three batches of 8 ahead, and there is no
    # more to do.
    system.start_learner("actor.engine=vllm", "training.pause_per_step_s=600", "training.steps=50")
    actor = system.start_actor("actor")
    wait_for(lambda: actor.pid in actors_at_work(system), "the actor at work", JOIN_S)
    wait_for(lambda: system.status()["buffer_groups"] == 24, "the buffer to be full", 60)
    wait_for(lambda: system.actor(actor.pid)["leases"] == 0, "the actor to be idle", 10)
    [engine] = filter(is_engine, children_of(actor.pid))
    os.kill(engine, signal.SIGKILL)
    assert actor.wait(20) == 1
    assert "gdpo: error: vLLM's engine process died" in actor.output
