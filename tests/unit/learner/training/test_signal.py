"""Which groups have nothing to learn from."""

import numpy as np
import pytest

import gdpo
from learner.training.reward_settings import RewardSchedule, RewardSetting
from learner.training.signal import lack_signal
from protocol.config import RewardConfig, When
from protocol.groups import Group
from tests.unit.factories import REWARDS, make_config, make_group, make_rollout

NAN = float("nan")
ALWAYS = dict.fromkeys(REWARDS)
EQUAL = RewardSetting({"format": 1.0, "correctness": 1.0}, ALWAYS)


def lacks(scores, setting=EQUAL, **algorithm) -> bool:
    group = make_group(lengths=(3,) * len(scores), scores=scores)
    [lacking] = lack_signal(
        [group], setting=setting, algorithm=make_config(algorithm=algorithm).algorithm
    )
    return lacking


@pytest.mark.parametrize("estimator", sorted(gdpo.ESTIMATORS))
def test_a_group_in_which_a_reward_varies_has_a_signal_and_one_in_which_none_does_has_not(
    estimator,
):
    assert not lacks([[0, 1], [1, 1], [1, 1]], estimator=estimator)
    assert lacks([[0.5, 1], [0.5, 1], [0.5, 1]], estimator=estimator)


def test_rewards_that_apply_to_one_rollout_or_to_none_are_no_signal():
    assert lacks([[NAN, 1], [0.5, 1], [NAN, 1]])
    assert lacks([[NAN, NAN], [NAN, NAN]])


def test_what_counts_is_what_the_rewards_count_in_the_step():
    scores = [[0, 1], [1, 1]]
    assert lacks(scores, RewardSetting({"format": 0.0, "correctness": 1.0}, ALWAYS))
    # Of the rewards that vary, one is conditioned on what no rollout reaches.
    condition = ALWAYS | {"format": When(reward="correctness", at_least=2.0)}
    assert lacks(scores, RewardSetting({"format": 1.0, "correctness": 1.0}, condition))
    # A standard deviation of 0.71 is not above 1.
    assert lacks(scores, min_std=1.0)


def test_rewards_that_cancel_each_other_out_are_no_signal():
    assert lacks([[0, 1], [1, 0]])
    assert not lacks([[0, 1], [1, 0]], RewardSetting({"format": 1.0, "correctness": 0.5}, ALWAYS))


def test_completions_that_the_loss_leaves_out_are_no_signal():
    rollouts = (make_rollout(), make_rollout())
    cut = tuple(type(r)(r.tokens, r.logprobs, r.spans, "length") for r in rollouts)
    scores = np.array([[0, 1], [1, 1]], dtype=np.float32)
    group = Group(1, np.array([7], dtype=np.int32), cut, REWARDS, scores)
    for overlong, expected in (("keep", False), ("mask", True)):
        algorithm = make_config(algorithm={"overlong": overlong}).algorithm
        assert lack_signal([group], setting=EQUAL, algorithm=algorithm) == [expected]


def test_a_command_in_between_and_the_schedule_are_both_seen_beforehand():

    schedule = RewardSchedule(
        [
            RewardConfig.model_validate(
                {
                    "name": "format",
                    "function": "tasks:format",
                    "schedule": [{"from_step": 3, "weight": 0.5}],
                }
            )
        ],
        steps=9,
    )
    assert schedule.upcoming(2).weights == {"format": 1.0}
    assert schedule.upcoming(3).weights == {"format": 0.5}
    schedule.begin(1)
    schedule.command({"format": {"weight": 2.0}})
    assert schedule.upcoming(2).weights == {"format": 2.0}
    # Nothing began by that.
    assert schedule.begin(2).weights == {"format": 2.0}
    assert schedule.begin(3).weights == {"format": 0.5}
