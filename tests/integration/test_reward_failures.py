"""Reward functions that hang, hold the interpreter's lock or end their process, in real runs."""

import json
import os
import signal
from pathlib import Path

import pytest

from tests.integration.processes import (
    QUICK,
    RECIPE,
    System,
    assert_books_balance,
    children_of,
    http_get,
    is_alive,
    wait_for,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]

REWARDS = """
import ctypes, os, re, zlib
from actors.tasks.tool_calling import format_reward

def hang(): re.match(r"(a+)+$", "a" * 40 + "b")
def exit(): os._exit(3)
def crash(): ctypes.string_at(0)

def sometimes(prompts, **columns):
    # The same prompts misbehave in the same way at every attempt.
    {0: hang, 1: exit, 2: crash}.get(zlib.crc32(prompts[0].encode()) % 24, lambda: None)()
    return format_reward(prompts=prompts, **columns)

def never(**_): hang()

def length(completions, **_): return [len(text) for text in completions]
"""


def settings(system: System, function: str, policy: str, timeout_s: float = 0.5) -> list[str]:
    (system.folder / "bad_rewards.py").write_text(REWARDS)
    return [
        f"rewards.format.function=bad_rewards:{function}",
        f"rewards.format.on_failure={policy}",
        "rewards.correctness.function=bad_rewards:length",
        f"actor.reward_timeout_s={timeout_s}",
    ]


def run(system: System, *overrides: str) -> tuple[int, str]:
    process = system.gdpo("run", "run", str(RECIPE), *QUICK, *overrides)
    return process.wait(100), process.output


def assert_nothing_else_was_harmed(system: System) -> None:
    summary = system.summary
    assert summary["completed"]
    assert summary["steps"] == 5
    assert summary["actors_lost"] == 0
    assert summary["weights"]["digest_mismatches"] == 0
    assert summary["rewards"]["failures"]["format"] > 0
    assert_books_balance(summary)


def test_groups_on_which_a_reward_fails_are_dropped_and_the_run_goes_on(system: System):
    code, output = run(system, "training.steps=5", *settings(system, "sometimes", "drop_group"))
    assert code == 0, output
    assert_nothing_else_was_harmed(system)
    leases = system.summary["books"]["leases"]
    failed = sum(books["failed"].get("actor_failed", 0) for books in leases.values())
    assert failed == system.summary["rewards"]["failures"]["format"]
    assert "groups that a reward function failed on: format " in output
    logs = [path.read_text() for path in (system.run_folder / "logs").iterdir()]
    for cause in ("took longer than 0.5 s", "exit code 3", "killed by SIGSEGV"):
        # An actor's log and the learner's.
        assert sum(cause in text for text in logs) >= 2


def test_a_reward_that_may_be_missing_costs_no_group(system: System):
    bad = settings(system, "sometimes", "missing")
    system.start_learner("training.steps=5", "training.pause_per_step_s=0.5", *bad)
    actor = system.start_actor("actor")
    wait_for(lambda: failures(system.get("/metrics")) >= 3, "failures that the learner counts")
    [scraped] = json.loads(system.get("/sd"))
    reported = http_get(f"http://{scraped['targets'][0]}/metrics")
    assert 'gdpo_reward_failures_total{kind="died",reward="format"}' in reported
    assert system.learner.wait(60) == 0, system.learner.output
    assert_nothing_else_was_harmed(system)
    for books in system.summary["books"]["leases"].values():
        assert books["failed"] == {}
    assert "; the reward counts as missing" in actor.output
    assert "reward function bad_rewards:sometimes failed on " in system.learner.output


def test_a_reward_that_must_not_fail_ends_the_run(system: System):
    code, output = run(system, *settings(system, "sometimes", "error"))
    assert code == 1
    assert "Traceback" not in output
    [error] = [line for line in output.splitlines() if "error:" in line]
    assert "reward function bad_rewards:sometimes failed on " in error
    assert "reward 'format' " in error


def test_no_reward_process_outlives_an_actor_that_is_killed(system: System):
    system.start_learner(*settings(system, "never", "drop_group", timeout_s=60))
    actor = system.start_actor("actor")
    wait_for(lambda: len(descendants(actor.pid)) == 2 * 8, "eight guards and their workers")
    started = descendants(actor.pid)
    # It goes on: its status is answered, and the learner has heard of it.
    assert system.actor(actor.pid) is not None
    os.kill(actor.pid, signal.SIGKILL)
    wait_for(lambda: not any(map(is_alive, started)), "the end of the reward processes", 5)


def failures(metrics: str) -> float:
    lines = [line for line in metrics.splitlines() if line.startswith("gdpo_reward_failures_total")]
    return sum(float(line.split()[-1]) for line in lines)


def descendants(pid: int) -> list[int]:
    if not Path(f"/proc/{pid}").exists():
        return []
    return [each for child in children_of(pid) for each in (child, *descendants(child))]
