"""What the rewards count: by configuration, by schedule, by command."""

import logging

import pytest
import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st

import gdpo
from learner.training.reward_settings import RewardSchedule
from protocol.config import RewardConfig
from protocol.errors import ConfigError

WHEN = {"reward": "right", "at_least": 1.0}


def make_rewards(right: dict | None = None, short: dict | None = None) -> RewardSchedule:
    return RewardSchedule(
        [
            RewardConfig.model_validate({"name": "right", "function": "tasks:f", **(right or {})}),
            RewardConfig.model_validate({"name": "short", "function": "tasks:f", **(short or {})}),
        ],
        steps=20,
    )


def test_without_changes_every_step_has_what_the_configuration_says():
    rewards = make_rewards({"weight": 2.0}, {"when": WHEN})
    setting = rewards.begin(1)
    assert setting.weights == {"right": 2.0, "short": 1.0}
    assert setting.conditions == [gdpo.RewardCondition(reward=1, on=0, at_least=1.0)]
    assert rewards.begin(2) == setting
    assert rewards.changes == []


def test_a_schedule_changes_only_what_it_names_and_from_its_step_on():
    schedule = [
        {"from_step": 3, "weight": 0.5},
        {"from_step": 5, "when": WHEN},
        {"from_step": 6, "always": True, "weight": 0.0},
    ]
    rewards = make_rewards(short={"schedule": schedule})
    seen = [rewards.begin(step).as_json()["short"] for step in range(1, 8)]
    assert [s["weight"] for s in seen] == [1, 1, 0.5, 0.5, 0.5, 0, 0]
    assert [s["when"] for s in seen] == [None, None, None, None, WHEN, None, None]
    assert [(c.from_step, c.source) for c in rewards.changes] == [
        (3, "schedule"),
        (5, "schedule"),
        (6, "schedule"),
    ]


def test_a_run_that_begins_late_has_the_whole_schedule_up_to_there():
    schedule = [{"from_step": 2, "weight": 3.0}, {"from_step": 4, "when": WHEN}]
    setting = make_rewards(short={"schedule": schedule}).begin(10)
    assert setting.as_json()["short"] == {"weight": 3.0, "when": WHEN}


def test_a_command_holds_from_the_next_step_until_the_schedule_says_otherwise(caplog):
    caplog.set_level(logging.INFO)
    rewards = make_rewards(short={"schedule": [{"from_step": 4, "weight": 9.0}]})
    rewards.begin(1)
    answer = rewards.command({"short": {"weight": 0.25, "when": WHEN}, "right": {"weight": 2}})
    assert answer == {
        "from_step": 2,
        "rewards": {
            "right": {"weight": 2.0, "when": None},
            "short": {"weight": 0.25, "when": WHEN},
        },
    }
    assert [rewards.begin(step).weights["short"] for step in (2, 3, 4)] == [0.25, 0.25, 9.0]
    assert rewards.begin(5).as_json()["short"]["when"] == WHEN
    assert [(c.from_step, c.source) for c in rewards.changes] == [(2, "command"), (4, "schedule")]
    assert "from step 2 on, by command: right x 2, short x 0.25 where right >= 1" in caplog.text


def test_a_command_for_a_step_that_the_schedule_changes_comes_after_it():
    schedule = [{"from_step": 4, "weight": 9.0, "when": WHEN}]
    rewards = make_rewards(short={"schedule": schedule})
    rewards.begin(3)
    answer = rewards.command({"short": {"weight": 0.25}})
    assert answer["from_step"] == 4
    assert answer["rewards"]["short"] == {"weight": 0.25, "when": WHEN}
    assert rewards.begin(4).as_json() == answer["rewards"]
    assert [c.source for c in rewards.changes] == ["schedule", "command"]


def test_while_the_last_batch_is_in_training_a_command_comes_too_late():
    rewards = make_rewards()
    rewards.begin(19)
    assert rewards.command({"short": {"weight": 2.0}})["from_step"] == 20
    rewards.begin(20)
    with pytest.raises(ConfigError, match="the last batch is in training"):
        rewards.command({"short": {"weight": 3.0}})


def test_a_command_that_changes_nothing_is_a_question():
    rewards = make_rewards()
    rewards.begin(7)
    assert rewards.command({})["from_step"] == 8
    assert rewards.command({"short": {"weight": 1.0}})["rewards"]["short"]["weight"] == 1.0
    assert rewards.changes == []


@pytest.mark.parametrize(
    ("updates", "problem"),
    [
        ([], "give the changes by reward"),
        ({"long": {"weight": 1}}, "no reward is named 'long'; the rewards are right, short"),
        (
            {"short": {"weight": "heavy"}},
            r"rewards\.short\.weight: .*what can change: weight = NUMBER",
        ),
        ({"short": {"weight": float("nan")}}, r"rewards\.short\.weight"),
        ({"short": {"weights": 1}}, r"rewards\.short\.weights"),
        ({"short": {"weight": 1e39}}, r"rewards\.short\.weight"),
        ({"short": {"when": "never"}}, r"rewards\.short\.when"),
        ({"short": {"when": WHEN, "always": True}}, r"rewards\.short: .*not both"),
        ({"short": {"when": {"reward": "right"}}}, r"rewards\.short\.when"),
        ({"short": {"when": {"reward": "long", "at_least": 1}}}, "when names 'long'"),
        ({"short": 3}, r"rewards\.short: "),
    ],
)
def test_a_command_is_refused_as_a_whole(updates, problem):
    rewards = make_rewards()
    before = rewards.begin(1)
    if isinstance(updates, dict):
        updates = {"right": {"weight": 5.0}} | updates
    with pytest.raises(ConfigError, match=problem):
        rewards.command(updates)
    assert rewards.begin(2) == before
    assert rewards.changes == []


NAMES = st.sampled_from(["right", "short"])
ANYTHING = st.none() | st.booleans() | st.floats() | st.text(max_size=4)
UPDATES = st.fixed_dictionaries(
    {},
    optional={
        "weight": st.floats() | ANYTHING,
        "when": st.fixed_dictionaries({"reward": NAMES, "at_least": st.floats()}) | ANYTHING,
        "always": st.booleans() | ANYTHING,
    },
)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.dictionaries(NAMES | st.text(max_size=3), UPDATES | ANYTHING), max_size=4))
def test_whatever_is_commanded_training_can_go_on(commands):
    rewards = make_rewards()
    for step, updates in enumerate(commands, start=1):
        before = rewards.begin(step)
        try:
            rewards.command(updates)
        except ConfigError:
            assert rewards.begin(step) == before
        event(f"{len(rewards.changes)} changes")
    setting = rewards.begin(10)
    advantages = gdpo.compute_advantages(
        torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]]),
        weights=list(setting.weights.values()),
        conditions=setting.conditions,
    )
    assert advantages.advantages.isfinite().all()
