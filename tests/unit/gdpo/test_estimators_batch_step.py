"""The batch step: its moving average, and a batch spread over ranks."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gdpo import ESTIMATORS, Advantages, compute_advantages

NAN = math.nan
WITH_BATCH_STEP = [name for name, estimator in ESTIMATORS.items() if estimator.batch_step]

# -+.707107 and -+1.414214 before the batch step: std sqrt(5 / 3) = 1.290994.
T1_AND_T2 = torch.tensor([[[0.0, 0], [1, 0]], [[0, 0], [1, 1]]])
DEAD = torch.ones(2, 2, 2)


# ---- Moving average ----------------------------------------------------------------------------


def test_the_batch_std_is_returned_for_the_next_batch() -> None:
    assert compute_advantages(T1_AND_T2, eps=0.0).batch_std == pytest.approx(1.290994)
    assert compute_advantages(T1_AND_T2, estimator="grpo").batch_std is None


def test_the_average_follows_the_batches() -> None:
    # .75 * 2 + .25 * 1.290994 = 1.822749; A = .707107 / 1.822749 and twice that.
    result = compute_advantages(T1_AND_T2, eps=0.0, ema_decay=0.75, previous_batch_std=2.0)
    assert result.batch_std == pytest.approx(1.822749)
    assert result.advantages[:, 1].tolist() == pytest.approx([0.387934, 0.775868], abs=1e-6)


def test_the_first_batch_and_a_decay_of_zero_take_the_std_of_the_batch() -> None:
    for given_ in ({"ema_decay": 0.9}, {"previous_batch_std": 2.0}):
        result = compute_advantages(T1_AND_T2, eps=0.0, **given_)  # type: ignore[arg-type]
        assert result.batch_std == pytest.approx(1.290994)


def test_a_batch_without_a_signal_leaves_the_average_alone() -> None:
    assert compute_advantages(DEAD, ema_decay=0.9).batch_std is None
    result = compute_advantages(DEAD, ema_decay=0.9, previous_batch_std=2.0)
    assert result.batch_std == 2.0
    assert result.advantages.abs().max() == 0


def test_a_rare_live_group_no_longer_explodes_once_the_average_is_known() -> None:
    # Alone among 512 groups its advantage is 22.6 (see the peak test of test_advantages).
    rewards = torch.zeros(512, 4, 1)
    rewards[0, :2] = 1.0
    alone = compute_advantages(rewards)
    smooth = compute_advantages(rewards, ema_decay=0.99, previous_batch_std=1.0)
    assert float(alone.advantages.max()) > 22
    assert float(smooth.advantages.max()) < 1


# ---- Ranks -------------------------------------------------------------------------------------


def in_parts(rewards: Tensor, sizes: list[int], **settings_: object) -> list[Advantages]:
    """What ranks that hold `sizes` prompts compute: first their moments, then their advantages."""
    parts = rewards.split(sizes)
    moments: list[Tensor] = []

    def note(values: Tensor) -> Tensor:
        moments.append(values.clone())
        return values

    for part in parts:
        compute_advantages(part, all_reduce_sum=note, **settings_)  # type: ignore[arg-type]
    total = torch.stack(moments).sum(dim=0)
    return [
        compute_advantages(part, all_reduce_sum=lambda _: total, **settings_)  # type: ignore[arg-type]
        for part in parts
    ]


@pytest.mark.parametrize("estimator", WITH_BATCH_STEP)
@pytest.mark.parametrize("exclude", [False, True])
@given(seed=st.integers(0, 1000), cuts=st.sets(st.integers(1, 7)))
@settings(max_examples=20, deadline=None)
def test_how_prompts_are_spread_over_ranks_makes_no_difference(
    estimator: str, exclude: bool, seed: int, cuts: set[int]
) -> None:
    rewards = torch.randint(0, 3, (8, 4, 2), generator=torch.Generator().manual_seed(seed)).float()
    rewards[0, 1:] = rewards[3, 0, 1] = NAN
    bounds = [0, *sorted(cuts), 8]
    sizes = [high - low for low, high in itertools.pairwise(bounds)]
    settings_ = {"estimator": estimator, "exclude_dead_from_batch_std": exclude}
    parts = in_parts(rewards, sizes, **settings_)
    whole = compute_advantages(rewards, **settings_)  # type: ignore[arg-type]
    torch.testing.assert_close(
        torch.cat([part.advantages for part in parts]), whole.advantages, rtol=1e-6, atol=0
    )
    for part in parts:
        assert part.batch_std == pytest.approx(whole.batch_std, rel=1e-12)


def some_rewards() -> Tensor:
    rewards = torch.rand(7, 4, 3, generator=torch.Generator().manual_seed(5))
    rewards[2, 1:] = rewards[4, 0, 1] = NAN
    rewards[5] = 0.1
    return rewards
