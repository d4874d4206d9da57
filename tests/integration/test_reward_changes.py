"""Weights and conditions change while training runs: by schedule, and by `gdpo set`."""

import stat
from typing import Any

import pytest

from tests.integration.processes import System, steps, wait_for

pytestmark = pytest.mark.timeout(240)

SCHEDULE = "rewards.format.schedule=[{from_step=3,weight=0.25}]"


def settings_by_step(system: System) -> list[dict[str, Any]]:
    return [step["reward_settings"] for step in steps(system)]


@pytest.mark.slow
def test_a_running_learner_takes_weights_and_conditions_from_schedule_and_command(system: System):
    system.start_learner("training.steps=1000", SCHEDULE)
    control = system.run_folder / "control.json"
    assert stat.S_IMODE(control.stat().st_mode) == 0o600
    system.start_actor("actor")
    system.wait_for_step(4)

    refused = system.gdpo("refused", "set", str(system.run_folder), "rewards.speed.weight=2")
    assert refused.wait() == 2
    assert "no reward is named 'speed'; the rewards are format, correctness" in refused.output
    assert "Traceback" not in refused.output

    condition = 'rewards.format.when={ reward = "correctness", at_least = 1.5 }'
    change = system.gdpo(
        "set", "set", str(system.run_folder), "rewards.correctness.weight=2", condition
    )
    assert change.wait() == 0, change.output
    assert "where correctness >= 1.5" in change.output
    before = len(settings_by_step(system))
    wait_for(lambda: len(settings_by_step(system)) >= before + 2, "two more steps")
    metrics = system.get("/metrics")
    assert 'gdpo_reward_weight{reward="format"} 0.25' in metrics
    assert 'gdpo_reward_weight{reward="correctness"} 2.0' in metrics

    changes = system.summary_after_stop()["rewards"]["changes"]
    assert [change["source"] for change in changes] == ["schedule", "command"]
    scheduled, commanded = (change["from_step"] for change in changes)
    assert scheduled == 3
    settings = settings_by_step(system)
    weights = [setting["format"]["weight"] for setting in settings]
    assert weights == [1.0] * 2 + [0.25] * (len(weights) - 2)
    # The command's step is the first that has it.
    conditions = [setting["format"]["when"] for setting in settings]
    assert conditions[: commanded - 1] == [None] * (commanded - 1)
    expected = {"reward": "correctness", "at_least": 1.5}
    assert conditions[commanded - 1 :] == [expected] * (len(settings) - commanded + 1)

    late = system.gdpo("late", "set", str(system.run_folder), "rewards.format.weight=1")
    assert late.wait() == 2
    assert "no learner to command" in late.output
