"""DVAO, CorrGRPO and GD2PO: golden numbers of the estimators that came after GDPO."""

import math

import pytest
import torch
from torch import Tensor

from gdpo import compute_advantages

NAN = math.nan


def group(*rollouts: tuple[float, ...]) -> Tensor:
    """A batch of one prompt, [1, G, K], from one tuple of rewards for each rollout."""
    return torch.tensor([rollouts], dtype=torch.float32)


def group_sum(estimator: str, rewards: Tensor, **settings_: object) -> list[float]:
    """The advantages of the first prompt before the batch step, with a vanishing eps."""
    given = {"estimator": estimator, "eps": 0.0, **settings_}
    return compute_advantages(rewards, **given).group_sum[0].tolist()  # type: ignore[arg-type]


def about(*values: float) -> object:
    return pytest.approx(values, abs=1e-6)


T1 = group((0, 0), (1, 0))
T2 = group((0, 0), (1, 1))
T3 = group((1, 0), (0, 1))
# Two rewards that have nothing to do with each other: each is -+.866025.
INDEPENDENT = group((0, 0), (0, 1), (1, 0), (1, 1))


# ---- DVAO --------------------------------------------------------------------------------------


def test_dvao_weighs_each_reward_by_its_std() -> None:
    # One or both rewards -+.707107, of weights that add up to 1: T1 1, 0; T2 1/2, 1/2.
    assert group_sum("dvao", T1) == about(-0.707107, 0.707107)
    assert group_sum("dvao", T2) == about(-0.707107, 0.707107)
    assert group_sum("dvao", T3) == [0, 0]
    # Of std .707107 and 2.828427 the weights are 1/5 and 4/5: (.2 - .8) * .707107 = -.424264.
    assert group_sum("dvao", group((1, 0), (0, 4))) == about(-0.424264, 0.424264)
    # Weighted (8, 1): (8, 4) / 12 = (2/3, 1/3): .707107 / 3.
    weighted = group_sum("dvao", group((1, 0), (0, 4)), weights=(8.0, 1.0))
    assert weighted == about(0.235702, -0.235702)


def test_dvao_stays_bounded_where_rewards_almost_cancel() -> None:
    # GRPO divides by the std of the sum, so the .001 left over decides at full strength.
    rewards = group((1, 0), (0, 0.999))
    assert group_sum("grpo", rewards) == pytest.approx([0.707107, -0.707107], abs=1e-3)
    assert max(group_sum("dvao", rewards)) < 1e-3


def test_dvao_takes_negative_weights_without_a_vanishing_denominator() -> None:
    # w = (1, -1): (1, -1) / 2 of equal std: T2 cancels, T3 gives .707107.
    assert group_sum("dvao", T2, weights=(1.0, -1.0)) == [0, 0]
    assert group_sum("dvao", T3, weights=(1.0, -1.0)) == about(0.707107, -0.707107)


# ---- CorrGRPO ----------------------------------------------------------------------------------


def test_corr_grpo_counts_rewards_that_agree_once() -> None:
    # T2: correlation 1, so the divisor is sqrt(1 + 1 + 2) = 2: 1.414214 / 2.
    assert group_sum("corr_grpo", T1) == about(-0.707107, 0.707107)
    assert group_sum("corr_grpo", T2) == about(-0.707107, 0.707107)


def test_corr_grpo_adds_up_rewards_that_are_independent() -> None:
    # A_sum = -1.732051, 0, 0, 1.732051 over sqrt(1 + 1).
    assert group_sum("corr_grpo", INDEPENDENT) == about(-1.224745, 0, 0, 1.224745)
    # w = (1, 3): -.866025 * (4, -2, 2, -4) over sqrt(1 + 9).
    weighted = group_sum("corr_grpo", INDEPENDENT, weights=(1.0, 3.0))
    assert weighted == about(-1.095445, 0.547723, -0.547723, 1.095445)


def test_corr_grpo_divides_by_the_sum_of_the_correlation_matrix() -> None:
    r = torch.rand(6, 5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    w = torch.tensor([1.0, 0.5, 2.0], dtype=torch.float64)
    a_sum = (w * (r - r.mean(1, keepdim=True)) / r.std(1, keepdim=True)).sum(-1)
    correlation_PKK = torch.stack([torch.corrcoef(group.T) for group in r])
    divisor_P = torch.einsum("k,l,pkl->p", w, w, correlation_PKK).sqrt()
    found = compute_advantages(r, estimator="corr_grpo", weights=w, eps=0.0).advantages
    torch.testing.assert_close(found, (a_sum / divisor_P[:, None]).float())


def test_corr_grpo_of_rewards_that_cancel_is_zero() -> None:
    result = compute_advantages(T3, estimator="corr_grpo", eps=0.0)
    assert result.advantages.tolist() == [[0, 0]]
    assert result.per_reward.abs().max() == 0


def test_corr_grpo_stays_bounded_where_rewards_are_missing() -> None:
    # The divisor is the std of what is divided, however few values the columns have.
    rewards = group((1, 0), (0, 1), (NAN, 0.5), (NAN, 0.5), (NAN, 0.49))
    assert max(map(abs, group_sum("corr_grpo", rewards))) <= 4 / math.sqrt(5)


# ---- GD2PO -------------------------------------------------------------------------------------

# r1 -+.866025; r2 (one of four) 1.5 and -.5: the second rollout has +.866025 and -.5.
CONFLICT = group((1, 1), (1, 0), (0, 0), (0, 0))


def test_gd2po_drops_rollouts_on_which_rewards_disagree() -> None:
    assert group_sum("gdpo", CONFLICT) == about(2.366025, 0.366025, -1.366025, -1.366025)
    assert group_sum("gd2po", CONFLICT) == about(2.366025, 0, -1.366025, -1.366025)
    assert group_sum("gd2po", group((1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 0))) == [0, 0, 0, 0]


def test_gd2po_shows_nothing_of_a_dropped_rollout() -> None:
    result = compute_advantages(CONFLICT, estimator="gd2po")
    assert result.per_reward[0, 1].tolist() == [0, 0]
    assert float(result.advantages[0, 1]) == 0
    # Counted in the batch: squares 5.598076 + 2 * 1.866025 over 4 - 1, std 1.763532.
    expected = [1.341640, 0, -0.774597, -0.774597]
    assert result.advantages[0].tolist() == pytest.approx(expected, abs=1e-5)


def test_gd2po_judges_the_sign_after_the_weight() -> None:
    assert group_sum("gd2po", T2, weights=(1.0, -1.0)) == [0, 0]
    assert group_sum("gd2po", T3, weights=(1.0, -1.0)) == about(1.414214, -1.414214)
    assert group_sum("gd2po", T3, weights=(1.0, 0.0)) == about(0.707107, -0.707107)


def test_gd2po_lets_a_missing_or_a_middling_reward_take_no_side() -> None:
    assert group_sum("gd2po", group((1, NAN), (0, 0), (NAN, 1))) == about(
        0.707107, -1.414214, 0.707107
    )
    # The middle of .1, .2, .3 is not exactly their mean: neither as float32 nor far from 0.
    for shift in (0.0, 100.0):
        scores = torch.tensor([0.1, 0.2, 0.3]) + shift
        rewards = torch.stack([scores, torch.tensor([0.0, 1.0, 2.0])], dim=-1)[None]
        against = rewards * torch.tensor([1.0, -1.0])
        assert group_sum("gd2po", against)[1] == pytest.approx(0, abs=1e-4)
        mixed = torch.cat([rewards, torch.tensor([[[0.0], [1.0], [1.0]]])], dim=-1)
        assert group_sum("gd2po", mixed)[1] == pytest.approx(0.577350, abs=1e-4)
