"""Figures of completions, by TRL's names."""

from dataclasses import replace

from learner.training.completion_metrics import completion_metrics
from tests.unit.factories import make_group


def test_the_completions_of_a_batch_are_described():
    first, second = make_group(lengths=(3, 8)), make_group(lengths=(1, 4))
    cut = replace(first.rollouts[1], finish="length")
    first = replace(first, rollouts=(first.rollouts[0], cut))
    found = completion_metrics([first, second], {"groups/dead": 0.0, "groups/collapsed": 1.0})
    assert found == {
        "completions/mean_length": 4.0,  # (3 + 8 + 1 + 4) / 4
        "completions/min_length": 1.0,
        "completions/max_length": 8.0,
        "completions/clipped_ratio": 0.25,
        "frac_reward_zero_std": 0.5,  # one of two groups
    }
