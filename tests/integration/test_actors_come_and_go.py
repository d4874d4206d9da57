"""A learner started by hand, actors that join, die, hang and leave while it trains."""

import json
import signal
import time

import pytest

from tests.integration.processes import (
    System,
    assert_books_balance,
    http_get,
    listening_addresses,
    metrics,
    resident_bytes,
    wait_for,
)

pytestmark = pytest.mark.timeout(240)

LONG_RUN = ("training.steps=2000", "deadlines.actor_timeout_s=2", "weights.timeout_s=2")


def test_actors_join_die_and_drain_while_the_learner_trains(system: System):
    system.start_learner(*LONG_RUN)
    first = system.start_actor("first")
    system.wait_for_step(2)

    second = system.start_actor("second")
    wait_for(lambda: (system.actor(second.pid) or {}).get("groups", 0) > 0, "its share")

    # In the middle of a group: it holds leases whenever it is not idle.
    wait_for(lambda: (system.actor(first.pid) or {}).get("leases", 0) > 0, "leases to lose")
    first.signal(signal.SIGKILL)
    wait_for(lambda: system.actor(first.pid) is None, "its loss to be noticed", 10)
    step = system.status()["step"]
    system.wait_for_step(step + 5)

    second.signal(signal.SIGTERM)
    assert second.wait(15) == 0, second.output
    assert "leaving: SIGTERM" in second.output
    wait_for(lambda: system.status()["actors_live"] == 0, "its goodbye", 5)

    third = system.start_actor("third")
    step = system.status()["step"]
    system.wait_for_step(step + 5)
    system.learner.signal(signal.SIGTERM)
    assert system.learner.wait(20) == 130, system.learner.output
    assert third.wait(15) == 0, third.output

    summary = system.summary
    assert_books_balance(summary)
    assert summary["actors_lost"] == 1
    failed = summary["books"]["leases"]["train"]["failed"]
    assert failed["actor_lost"] >= 1
    assert summary["weights"]["digest_mismatches"] == 0


@pytest.mark.slow
def test_a_killed_actor_leaves_no_files_behind(system: System, monkeypatch):
    temporary = system.folder / "tmp"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    system.start_learner(*LONG_RUN)
    actor = system.start_actor("actor")
    system.wait_for_step(2)
    actor.signal(signal.SIGKILL)
    actor.wait()
    assert list(temporary.glob("gdpo-actor-*")) == []


@pytest.mark.slow
def test_prometheus_reads_learner_and_actors_while_they_train(system: System):
    system.start_learner(*LONG_RUN)
    system.start_actor("actor")
    # Not the step of the status page, which is the trainer's own and a moment ahead of metrics.
    wait_for(
        lambda: metrics(system.get("/metrics")).get("gdpo_trainer_version", 0) >= 3, "step 3", 60
    )
    learner = metrics(system.get("/metrics"))
    assert learner["gdpo_trainer_version"] >= 3
    assert learner["gdpo_tokens_trained_total"] > 0
    assert learner["gdpo_staleness_versions_count"] >= 3 * 8
    assert learner["gdpo_actors_live"] == 1
    assert {"gdpo_buffer_groups", "gdpo_buffer_bytes", "gdpo_reward_mean"} <= learner.keys()
    [discovered] = json.loads(system.get("/sd"))
    actor = metrics(http_get(f"http://{discovered['targets'][0]}/metrics"))
    assert actor["gdpo_tokens_generated_total"] > 0
    assert actor["gdpo_policy_version"] >= 1
    for path in ("/healthz", "/readyz"):
        assert system.get(path)
        assert http_get(f"http://{discovered['targets'][0]}{path}")


@pytest.mark.slow
def test_a_hung_actor_holds_nobody_up_and_comes_back(system: System):
    """SIGSTOP leaves its connection open and its place in the collective taken."""
    system.start_learner(*LONG_RUN)
    hung, healthy = system.start_actor("hung"), system.start_actor("healthy")
    wait_for(lambda: system.status()["actors_live"] == 2, "both actors")
    system.wait_for_step(2)
    hung.signal(signal.SIGSTOP)
    wait_for(lambda: system.actor(hung.pid) is None, "its loss to be noticed", 15)
    step = system.status()["step"]
    system.wait_for_step(step + 5)
    assert (system.actor(healthy.pid) or {})["version"] >= step
    hung.signal(signal.SIGCONT)
    wait_for(lambda: (system.actor(hung.pid) or {}).get("groups", 0) > 0, "its return", 20)
    assert system.summary_after_stop()["weights"]["digest_mismatches"] == 0
    assert_books_balance(system.summary)


@pytest.mark.slow
def test_actors_wait_for_a_slow_learner(system: System):
    """Back-pressure: the buffer stays within its bound, nothing grows and nothing goes stale."""
    system.start_learner(
        *LONG_RUN, "training.pause_per_step_s=0.5", "training.max_staleness=2", "eval.prompts=1"
    )
    for name in ("one", "two"):
        system.start_actor(name)
    system.wait_for_step(3)
    fills, memory = [], []
    for step in range(4, 16):
        system.wait_for_step(step)
        fills.append(system.status()["buffer_groups"])
        memory.append(resident_bytes(system.learner.pid))
    # (max_staleness + 1) * batch_groups = 3 * 8
    assert max(fills) <= 24
    growth_mb = (max(memory[6:]) - max(memory[:6])) / 1e6
    print(f"learner's memory: {memory[0] / 1e6:.0f} MB, {growth_mb:+.1f} MB over six steps")
    assert growth_mb < 10
    assert system.status()["bottleneck"] == "learner"
    summary = system.summary_after_stop()
    assert summary["staleness"]["largest"] <= 2
    assert summary["books"]["groups"]["evicted"].get("overflow", 0) == 0
    assert_books_balance(summary)


@pytest.mark.slow
def test_a_learner_that_was_frozen_goes_on_with_its_actors(system: System):
    """Longer than any silence that is forgiven, with more messages waiting than a queue holds."""
    system.start_learner(*LONG_RUN)
    actors = [system.start_actor("one"), system.start_actor("two")]
    wait_for(lambda: system.status()["actors_live"] == 2, "both actors")
    system.wait_for_step(2)
    system.learner.signal(signal.SIGSTOP)
    time.sleep(14)
    system.learner.signal(signal.SIGCONT)
    for actor in actors:
        system.wait_for_groups(actor)
    assert_books_balance(system.summary_after_stop())


def test_no_port_is_open_to_other_machines(system: System):
    """The collective's rendezvous included."""
    system.start_learner(*LONG_RUN)
    system.start_actor("actor")
    system.wait_for_step(2)
    assert listening_addresses(system.learner.pid) == {"127.0.0.1"}
