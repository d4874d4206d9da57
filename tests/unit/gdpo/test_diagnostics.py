"""Diagnostics of a batch's rewards."""

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gdpo import compute_advantages, reward_diagnostics

NAN = math.nan


def diagnose(
    rewards: Sequence[Sequence[tuple[float, ...]]] | Tensor, **settings_: object
) -> dict[str, float]:
    """Diagnostics of rewards [P, G, K] named a, b, c, ..."""
    rewards_PGK = torch.as_tensor(rewards, dtype=torch.float32)
    names = "abcdefgh"[: rewards_PGK.shape[-1]]
    advantages = compute_advantages(rewards_PGK, **settings_)  # type: ignore[arg-type]
    return reward_diagnostics(rewards_PGK, advantages, names)


def test_mean_and_std_are_over_the_rollouts_to_which_the_reward_applies() -> None:
    # a: 0, 1, 2, 3: mean 1.5, sample std sqrt(5 / 3); b: 1, 3: mean 2, std sqrt(2).
    found = diagnose([[(0, 1), (1, NAN)], [(2, NAN), (3, 3)]])
    assert found["reward/a/mean"] == 1.5
    assert found["reward/a/std"] == pytest.approx(math.sqrt(5 / 3))
    assert found["reward/b/mean"] == 2
    assert found["reward/b/std"] == pytest.approx(math.sqrt(2))


def test_live_share_counts_groups() -> None:
    found = diagnose([[(0, 1), (1, 1)], [(2, 2), (3, 2)], [(5, 0), (5, NAN)], [(0, 1), (1, 0)]])
    assert found["reward/a/live_share"] == 0.75
    assert found["reward/b/live_share"] == 0.25


def test_advantage_share_follows_the_weights() -> None:
    # Both rewards vary alike, so |A_k| is as 3 : 1. With grpo it is as the rewards' sizes, 1 : 4.
    assert diagnose([[(0, 0), (1, 4)]], weights=(3.0, 1.0))["reward/a/advantage_share"] == (
        pytest.approx(0.75, abs=1e-5)
    )
    by_size = diagnose([[(0, 0), (1, 4)]], estimator="grpo")
    assert by_size["reward/a/advantage_share"] == pytest.approx(0.2)
    assert by_size["reward/b/advantage_share"] == pytest.approx(0.8)


def test_correlation_is_over_the_pairs_that_both_have() -> None:
    # Pairs (0, 0), (1, 2), (2, 1): deviations (-1, 0, 1), (-1, 1, 0): r = 1 / 2.
    found = diagnose([[(0, 0), (1, 2), (2, 1), (9, NAN), (NAN, -9)]])
    assert found["reward_correlation/a/b"] == pytest.approx(0.5)
    assert "reward_correlation/b/a" not in found


def test_correlation_of_a_constant_reward_is_zero() -> None:
    # c is 0.1 throughout, whose computed mean is not 0.1.
    found = diagnose([[(0, 0, 0.1), (1, -2, 0.1), (2, -4, 0.1)]])
    assert found["reward_correlation/a/b"] == pytest.approx(-1)
    assert found["reward_correlation/a/c"] == found["reward_correlation/b/c"] == 0
    assert found["reward/c/std"] == 0


def test_dead_groups_and_collapsed_groups_are_told_apart() -> None:
    dead = [(1, 2), (1, 2), (1, 2)]
    collapsed = [(1, 0), (1, 0), (0, 1)]
    collapsed_on_two_scales = [(1, 0), (1, 0), (0, 0.003)]
    alive = [(1, 0), (0, 0), (0, 1)]
    padding = [(NAN, NAN)] * 3
    found = diagnose([dead, collapsed, collapsed_on_two_scales, alive, padding])
    assert found["groups/dead"] == 2
    assert found["groups/collapsed"] == 2
    assert diagnose([dead, collapsed], weights=(1.0, 0.5))["groups/collapsed"] == 0


def test_a_reward_that_never_applies_is_all_zeros() -> None:
    found = diagnose([[(0, NAN), (1, NAN)]])
    for key in ("mean", "std", "live_share", "advantage_share"):
        assert found[f"reward/b/{key}"] == 0
    assert found["reward/a/advantage_share"] == 1


@given(
    values=st.lists(
        st.sampled_from([0.0, 1.0, 0.1, NAN, 3e38, -3e38, 1e-45]), min_size=24, max_size=24
    ),
    shape=st.sampled_from([(2, 4, 3), (24, 1, 1), (1, 8, 3), (6, 2, 2)]),
)
@settings(max_examples=100, deadline=None)
def test_any_batch_gives_plain_finite_numbers(
    values: list[float], shape: tuple[int, int, int]
) -> None:
    found = diagnose(torch.tensor(values).reshape(shape))
    for key, value in found.items():
        assert type(value) is float, key
        assert math.isfinite(value), key
        if key.startswith("reward_correlation"):
            assert -1 <= value <= 1
    shares = sum(found[f"reward/{name}/advantage_share"] for name in "abc"[: shape[-1]])
    assert shares == pytest.approx(1) or shares == 0


def test_names_and_rewards_that_do_not_fit_are_refused() -> None:
    rewards = torch.zeros(1, 2, 2)
    advantages = compute_advantages(rewards)
    for names in (["a"], ["a", "a"]):
        with pytest.raises(ValueError, match="give 2 different names"):
            reward_diagnostics(rewards, advantages, names)
    with pytest.raises(ValueError, match="pass the rewards they came from"):
        reward_diagnostics(torch.zeros(2, 2, 2), advantages, ["a", "b"])
