"""Advantages: the paper's examples, and what must hold for any batch."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gdpo import ESTIMATORS, RewardCondition, compute_advantages

NAN = math.nan
ALL = tuple(ESTIMATORS)
# The others look at how large a reward is beside the rest.
SCALE_FREE = ("gdpo", "corr_grpo", "gd2po")
ANY_BATCH = settings(max_examples=40, deadline=None)


def group(*rollouts: tuple[float, ...]) -> Tensor:
    """A batch of one prompt, [1, G, K], from one tuple of rewards for each rollout."""
    return torch.tensor([rollouts], dtype=torch.float32)


def group_sum(rewards: Tensor, **settings_: object) -> list[float]:
    """The advantages of the first prompt before the batch step, with a vanishing eps."""
    result = compute_advantages(rewards, **{"eps": 0.0, **settings_})  # type: ignore[arg-type]
    return result.group_sum[0].tolist()


def about(*values: float) -> object:
    return pytest.approx(values, abs=1e-6)


T1 = group((0, 0), (1, 0))
T2 = group((0, 0), (1, 1))
T3 = group((1, 0), (0, 1))
T4 = group((1, 0), (1, 0), (0, 1))


# ---- The paper's examples ----------------------------------------------------------------------


def test_gdpo_tells_one_reward_from_two() -> None:
    # Two rollouts 0 and 1: mean 1/2, sample std sqrt(2 * 1/4 / 1) = .707107, so -+.5/.707107.
    assert group_sum(T1) == about(-0.707107, 0.707107)
    assert group_sum(T2) == about(-1.414214, 1.414214)
    assert group_sum(T3) == about(0, 0)


def test_grpo_cannot_tell_one_reward_from_two() -> None:
    for rewards in (T1, T2):
        assert group_sum(rewards, estimator="grpo") == about(-0.707107, 0.707107)
    assert group_sum(T3, estimator="grpo") == about(0, 0)


def test_grpo_without_std_keeps_the_size_of_the_reward() -> None:
    assert group_sum(T1, estimator="grpo_no_std") == about(-0.5, 0.5)
    assert group_sum(T2, estimator="grpo_no_std") == about(-1, 1)


def test_gdpo_collapses_when_rewards_cancel_and_weights_undo_it() -> None:
    # r1 = (1,1,0): mean 2/3, std sqrt((2/9 + 4/9) / 2) = 1/sqrt(3): A_1 = (.577, .577, -1.155) and
    # A_2 = -A_1, so w = (1, .5) leaves half of A_1.
    assert group_sum(T4) == [0, 0, 0]
    assert group_sum(T4, weights=(1, 0.5)) == about(0.288675, 0.288675, -0.577350)


def test_gdpo_learns_from_a_group_whose_summed_reward_is_constant() -> None:
    # e1 (1,0,0,1): std sqrt(1/3), A -+.866025; e2, e3 (one of four): std 1/2, A 1.5 and -.5.
    # Rollout 1: .866025 - .5 - .5 = -.133975; rollout 2: -.866025 + 1.5 - .5 = .133975.
    one_hot = group((1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 0))
    assert group_sum(one_hot) == about(-0.133975, 0.133975, 0.133975, -0.133975)
    assert group_sum(one_hot, estimator="grpo") == [0, 0, 0, 0]


def test_batch_step_divides_by_the_sample_std_of_the_batch() -> None:
    # A_sum: -+.707107, -+1.414214; squares add up to 2 * .5 + 2 * 2 = 5, std sqrt(5/3) = 1.290994.
    result = compute_advantages(torch.cat([T1, T2]), eps=0.0)
    assert result.advantages[0].tolist() == about(-0.547723, 0.547723)
    assert result.advantages[1].tolist() == about(-1.095445, 1.095445)


def test_batch_step_leaves_estimators_without_it_alone() -> None:
    for name in ("grpo", "grpo_no_std"):
        result = compute_advantages(torch.cat([T1, T2]), estimator=name)
        assert torch.equal(result.advantages, result.group_sum)


def test_grpo_batch_norm_is_grpo_then_the_batch_step() -> None:
    # GRPO gives -+.707107 twice: squares add up to 2, std sqrt(2/3) = .816497.
    result = compute_advantages(torch.cat([T1, T2]), estimator="grpo_batch_norm", eps=0.0)
    assert result.advantages.flatten().tolist() == about(-0.866025, 0.866025, -0.866025, 0.866025)


@pytest.mark.parametrize(
    ("estimator", "counts"),
    [
        ("grpo", [2, 4, 7, 11, 16]),
        ("grpo_no_std", [3, 6, 10, 15, 21]),
        ("gdpo", [3, 6, 14, 26, 38]),
    ],
)
def test_number_of_distinct_groups_is_that_of_figure_3(estimator: str, counts: list[int]) -> None:
    outcomes = list(itertools.product((0.0, 1.0), repeat=2))
    for n, expected in zip(range(2, 7), counts, strict=True):
        multisets = list(itertools.combinations_with_replacement(outcomes, n))
        sums = compute_advantages(torch.tensor(multisets), estimator=estimator, eps=0.0).group_sum
        assert len({tuple(sorted(round(a, 6) + 0.0 for a in row)) for row in sums.tolist()}) == (
            expected
        )


@pytest.mark.parametrize(
    ("num_groups", "num_live", "peak"),
    [(8, 8, 0.984251), (8, 4, 1.391941), (8, 1, 2.783882), (512, 1, 22.621892)],
)
def test_peak_advantage_grows_as_live_groups_become_rare(
    num_groups: int, num_live: int, peak: float
) -> None:
    # Live groups have |A_sum| = a, so std^2 = 4 live a^2 / (n - 1) with n = 4 groups sequences,
    # and |A| = sqrt((n - 1) / (4 live)): sqrt(31/32), sqrt(31/16), sqrt(31/4), sqrt(2047/4).
    rewards = torch.zeros(num_groups, 4, 1)
    rewards[:num_live, :2] = 1.0
    result = compute_advantages(rewards, eps=0.0)
    assert float(result.advantages.max()) == pytest.approx(peak, rel=1e-5)
    excluded = compute_advantages(rewards, eps=0.0, exclude_dead_from_batch_std=True)
    # Then n counts the live sequences only, and their share is 1.
    n = 4 * num_live
    assert float(excluded.advantages.max()) == pytest.approx(math.sqrt((n - 1) / n), rel=1e-5)


def test_complete_groups_follow_the_formulae_to_the_letter() -> None:
    r = torch.rand(6, 5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    w, eps = torch.tensor([1.0, 0.5, 2.0], dtype=torch.float64), 1e-3

    def normalised(x: Tensor, dim: int | tuple[int, ...]) -> Tensor:
        return (x - x.mean(dim, keepdim=True)) / (x.std(dim, keepdim=True) + eps)

    weighted = (w * r).sum(dim=-1)
    std = w * r.std(dim=1, keepdim=True)
    expected = {
        "gdpo": normalised((w * normalised(r, dim=1)).sum(dim=-1), dim=(0, 1)),
        "grpo": normalised(weighted, dim=1),
        "grpo_no_std": weighted - weighted.mean(dim=1, keepdim=True),
        "grpo_batch_norm": normalised(normalised(weighted, dim=1), dim=(0, 1)),
        "dvao": (std / std.sum(dim=-1, keepdim=True) * normalised(r, dim=1)).sum(dim=-1),
    }
    for name, advantages in expected.items():
        found = compute_advantages(r, estimator=name, weights=w, eps=eps).advantages
        torch.testing.assert_close(found, advantages.float())


# ---- Settings ----------------------------------------------------------------------------------


def test_weights_multiply_the_normalised_advantages_not_the_rewards() -> None:
    # Weighting rewards would change nothing: each is divided by its own std.
    assert group_sum(T1, weights=(3.0, 1.0)) == about(-2.121320, 2.121320)


def test_a_reward_of_weight_zero_has_no_say_but_is_still_reported_live() -> None:
    result = compute_advantages(T3, weights=(1.0, 0.0), eps=0.0)
    assert result.group_sum[0].tolist() == about(0.707107, -0.707107)
    assert result.live.tolist() == [[True, True]]
    assert result.per_reward[..., 1].abs().max() == 0


def test_eps_is_added_to_the_group_std_and_to_the_batch_std() -> None:
    # A_sum = .5 / (.707107 + 1) = .292893; batch std sqrt(2 * .292893^2) = .414214;
    # A = .292893 / 1.414214.
    result = compute_advantages(group((0,), (1,)), eps=1.0)
    assert result.group_sum[0].tolist() == about(-0.292893, 0.292893)
    assert result.advantages[0].tolist() == about(-0.207107, 0.207107)


def test_clamp_limits_the_final_advantages_only() -> None:
    result = compute_advantages(torch.cat([T1, T2]), clamp=0.6)
    assert result.advantages[1].tolist() == about(-0.6, 0.6)
    assert result.advantages[0].tolist() == about(-0.547723, 0.547723)
    assert result.group_sum[1].tolist() == pytest.approx([-1.414214, 1.414214], abs=1e-5)


def test_min_std_silences_a_reward_that_hardly_varies() -> None:
    rewards = group((0.5, 0), (0.5001, 1))
    # Ungated, the first reward's difference of 1e-4 counts as much as the second's of 1.
    assert group_sum(rewards) == pytest.approx([-1.414214, 1.414214], abs=1e-3)
    assert group_sum(rewards, min_std=1e-3) == about(-0.707107, 0.707107)
    result = compute_advantages(rewards, min_std=torch.tensor([1e-3, 10.0]))
    assert result.live.tolist() == [[False, False]]
    assert result.advantages.tolist() == [[0, 0]]


def test_per_reward_contributions_add_up_to_the_group_sum() -> None:
    rewards = torch.rand(5, 4, 3, generator=torch.Generator().manual_seed(1))
    rewards[0, 1, 2] = rewards[3, :, 0] = NAN
    for name in ALL:
        result = compute_advantages(rewards, estimator=name, weights=(1.0, 2.0, -0.5))
        torch.testing.assert_close(result.per_reward.sum(dim=-1), result.group_sum)


def test_results_are_float32_whatever_the_rewards_are() -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        result = compute_advantages(T1.to(dtype).requires_grad_())
        for floats in (result.advantages, result.group_sum, result.per_reward):
            assert floats.dtype == torch.float32 and not floats.requires_grad
        assert result.live.dtype == torch.bool


@pytest.mark.parametrize("estimator", ALL)
def test_blocks_of_groups_do_not_show_in_the_result(
    estimator: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rewards = torch.rand(7, 4, 2, generator=torch.Generator().manual_seed(2))
    rewards[5, 1, 0] = NAN  # so that one block has a missing reward, and the others have not
    whole = compute_advantages(rewards, estimator=estimator)
    monkeypatch.setattr("gdpo.advantages.GROUPS_PER_BLOCK", 3)
    in_blocks = compute_advantages(rewards, estimator=estimator)
    torch.testing.assert_close(in_blocks.advantages, whole.advantages)
    torch.testing.assert_close(in_blocks.per_reward, whole.per_reward)
    assert torch.equal(in_blocks.live, whole.live)


# ---- Conditioned rewards -----------------------------------------------------------------------


def test_a_condition_takes_the_easy_reward_away_where_the_hard_one_is_missed() -> None:
    # length counts only where correct: (1,1,1,0) becomes (1,1,0,0), equal to correct itself.
    rewards = group((1, 1), (1, 1), (0, 1), (0, 0))
    conditioned = group_sum(rewards, conditions=[RewardCondition(reward=1, on=0, at_least=1.0)])
    assert conditioned == group_sum(group((1, 1), (1, 1), (0, 0), (0, 0)))
    assert conditioned != group_sum(rewards)


def test_a_float32_reward_equal_to_the_threshold_meets_it() -> None:
    rewards = group((0.7, 1), (0.6, 1))  # as a float32, 0.7 is 0.69999999
    result = compute_advantages(rewards, conditions=[RewardCondition(1, on=0, at_least=0.7)])
    assert result.per_reward[0, 0, 1] > 0 > result.per_reward[0, 1, 1]


def test_an_unknown_condition_makes_the_reward_missing_and_not_zero() -> None:
    condition = [RewardCondition(reward=1, on=0, at_least=1.0)]
    unknown = group_sum(group((1, 3), (NAN, 5), (0, 4)), conditions=condition)
    assert unknown == group_sum(group((1, 3), (NAN, NAN), (0, 0)))


def test_a_missing_reward_stays_missing_where_its_condition_fails() -> None:
    condition = [RewardCondition(reward=1, on=0, at_least=1.0)]
    missing = group_sum(group((0, NAN), (1, 3), (1, 4)), conditions=condition)
    assert missing == group_sum(group((0, NAN), (1, 3), (1, 4)))


def test_conditions_look_at_raw_rewards_and_must_all_hold() -> None:
    rewards = group((1, 1, 1), (0, 1, 1), (1, 0, 1), (NAN, 0, 1))
    both = [RewardCondition(2, on=0, at_least=1.0), RewardCondition(2, on=1, at_least=1.0)]
    expected = group_sum(group((1, 1, 1), (0, 1, 0), (1, 0, 0), (NAN, 0, 0)))
    assert group_sum(rewards, conditions=both) == expected
    assert group_sum(rewards, conditions=both[::-1]) == expected
    chain = [RewardCondition(1, on=0, at_least=1.0), RewardCondition(2, on=1, at_least=1.0)]
    raw_gate = group_sum(group((1, 1, 1), (0, 0, 1), (1, 0, 0)), estimator="grpo_no_std")
    assert group_sum(rewards[:, :3], conditions=chain, estimator="grpo_no_std") == raw_gate


def test_conditions_do_not_change_the_callers_rewards() -> None:
    rewards = T3.clone()
    compute_advantages(rewards, conditions=[RewardCondition(1, on=0, at_least=1.0)])
    assert torch.equal(rewards, T3)


# ---- Missing rewards, padding, dead groups -----------------------------------------------------


def test_a_missing_reward_is_neutral() -> None:
    # The second reward is left with (0, 1): -+.707107 for those who have it, 0 for the third.
    assert group_sum(group((0, 0), (0, 1), (0, NAN))) == about(-0.707107, 0.707107, 0)


@pytest.mark.parametrize("estimator", ALL)
def test_a_padding_rollout_changes_nothing_for_the_others(estimator: str) -> None:
    padded = torch.cat([T2, torch.full((1, 2, 2), NAN)], dim=1)
    result = compute_advantages(padded, estimator=estimator)
    expected = compute_advantages(T2, estimator=estimator)
    torch.testing.assert_close(result.advantages[:, :2], expected.advantages)
    assert result.advantages[0, 2:].tolist() == [0, 0]


@pytest.mark.parametrize("estimator", ALL)
def test_a_single_valid_value_contributes_nothing(estimator: str) -> None:
    result = compute_advantages(group((5, NAN), (NAN, NAN), (NAN, 2)), estimator=estimator)
    assert result.advantages.abs().max() == 0
    assert not result.live.any()


def test_grpo_adds_up_the_rewards_that_apply() -> None:
    # r = (1 + 2, 0 + 1, 1): mean 5/3.
    rewards = group((1, 2), (0, 1), (1, NAN))
    assert group_sum(rewards, estimator="grpo_no_std") == about(4 / 3, -2 / 3, -2 / 3)


@pytest.mark.parametrize("estimator", ALL)
def test_who_lacks_a_dead_reward_makes_no_difference(estimator: str) -> None:
    # Read as sums, (1, 1, 0) would favour the two rollouts to which the reward happens to apply.
    assert group_sum(group((1, 0), (1, 0), (NAN, 0)), estimator=estimator) == [0, 0, 0]


@pytest.mark.parametrize("estimator", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [0.1, -0.3, 1 / 3, 1e-30, 1e30, 0.0])
def test_equal_rewards_give_exactly_zero(estimator: str, dtype: torch.dtype, value: float) -> None:
    rewards = torch.full((3, 7, 2), value, dtype=dtype)
    result = compute_advantages(rewards, estimator=estimator, eps=0.0)
    assert result.advantages.abs().max() == 0
    assert not result.live.any()


@pytest.mark.parametrize("estimator", ALL)
def test_one_rounding_step_is_not_a_signal(estimator: str) -> None:
    rewards = torch.tensor([[[0.3], [0.1 + 0.2]]], dtype=torch.float64)
    assert float(rewards[0, 1, 0]) > float(rewards[0, 0, 0])
    assert group_sum(rewards, estimator=estimator) == [0, 0]


def test_rewards_that_cancel_on_different_scales_stay_cancelled_through_the_batch_step() -> None:
    # eps = 1e-6 shrinks the small reward more than the large one; the batch step would blow the
    # residue up to a full advantage.
    result = compute_advantages(group((1, -0.003), (1, -0.003), (0, 0.003)))
    assert result.live.all()
    assert result.advantages.tolist() == [[0, 0, 0]]


@pytest.mark.parametrize("estimator", ALL)
def test_group_of_one_gives_zero(estimator: str) -> None:
    result = compute_advantages(torch.tensor([[[1.0, 2.0]], [[3.0, 5.0]]]), estimator=estimator)
    assert result.advantages.tolist() == [[0], [0]]


@pytest.mark.parametrize("estimator", ALL)
def test_extreme_magnitudes_give_finite_advantages(estimator: str) -> None:
    largest = torch.finfo(torch.float32).max
    tiny = torch.finfo(torch.float32).smallest_normal
    for low, high in ((-largest, largest), (0.0, tiny), (-1e30, 1e-30), (0.0, 1e-45)):
        for eps in (0.0, 1e-6):
            rewards = group((low, low), (high, high), (low, NAN))
            result = compute_advantages(rewards, estimator=estimator, eps=eps, weights=(2.0, 3.0))
            for floats in (result.advantages, result.group_sum, result.per_reward):
                assert floats.isfinite().all()


# ---- Properties of any batch -------------------------------------------------------------------

REWARD = st.one_of(
    st.sampled_from([0.0, 1.0, 0.1, -3.0, NAN]),
    st.floats(-10, 10, width=32),
)
EXTREME_REWARD = st.one_of(
    REWARD, st.sampled_from([1e30, -1e30, 1e-30, 3.4e38, -3.4e38, 1e-45, 1e7, 1e7 + 1])
)


@st.composite
def batches(draw: st.DrawFn, reward: st.SearchStrategy[float] = REWARD) -> Tensor:
    shape = tuple(draw(st.integers(1, high)) for high in (4, 5, 3))
    size = math.prod(shape)
    values = draw(st.lists(reward, min_size=size, max_size=size))
    return torch.tensor(values, dtype=torch.float32).reshape(shape)


def without_nan(rewards: Tensor) -> Tensor:
    return rewards.nan_to_num(nan=0.0)


@pytest.mark.parametrize("estimator", ALL)
@given(rewards=batches(EXTREME_REWARD), eps=st.sampled_from([0.0, 1e-6]))
@ANY_BATCH
def test_any_batch_gives_finite_advantages_and_none_to_the_dead(
    estimator: str, rewards: Tensor, eps: float
) -> None:
    result = compute_advantages(rewards, estimator=estimator, eps=eps)
    for floats in (result.advantages, result.group_sum, result.per_reward):
        assert floats.isfinite().all()
    dead_P = ~result.live.any(dim=-1)
    assert result.advantages[dead_P].abs().sum() == 0
    assert result.advantages[rewards.isnan().all(dim=-1)].abs().sum() == 0
    assert result.per_reward.transpose(1, 2)[~result.live].abs().sum() == 0


@pytest.mark.parametrize("estimator", ALL)
@given(rewards=batches(), seed=st.integers(0, 1000))
@ANY_BATCH
def test_permuting_rollouts_and_groups_permutes_the_advantages(
    estimator: str, rewards: Tensor, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    groups = torch.randperm(rewards.shape[0], generator=generator)
    rollouts = torch.randperm(rewards.shape[1], generator=generator)
    permuted = compute_advantages(rewards[groups][:, rollouts], estimator=estimator).advantages
    expected = compute_advantages(rewards, estimator=estimator).advantages[groups][:, rollouts]
    torch.testing.assert_close(permuted, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("estimator", SCALE_FREE)
@given(
    rewards=batches(st.sampled_from([0.0, 1.0, 2.0, -3.0, 0.5, NAN])),
    scale=st.sampled_from([0.25, 0.1, 3.0, 100.0]),
    shift=st.sampled_from([0.0, -7.0, 0.3, 100.0]),
)
@ANY_BATCH
def test_a_positive_affine_map_of_one_reward_changes_nothing(
    estimator: str, rewards: Tensor, scale: float, shift: float
) -> None:
    mapped = rewards.double()
    mapped[..., 0] = mapped[..., 0] * scale + shift
    torch.testing.assert_close(
        compute_advantages(mapped, estimator=estimator, eps=0.0).advantages,
        compute_advantages(rewards, estimator=estimator, eps=0.0).advantages,
        rtol=1e-5,
        atol=1e-5,
    )


@pytest.mark.parametrize("estimator", ALL)
@given(
    rewards=batches(st.sampled_from([0.0, 1.0, 2.0, -3.0, 0.5])),
    shift=st.sampled_from([-7.0, 0.3, 100.0]),
)
@ANY_BATCH
def test_shifting_every_score_of_a_reward_changes_nothing(
    estimator: str, rewards: Tensor, shift: float
) -> None:
    shifted = rewards.double()
    shifted[..., -1] += shift
    torch.testing.assert_close(
        compute_advantages(shifted, estimator=estimator).advantages,
        compute_advantages(rewards, estimator=estimator).advantages,
        rtol=1e-5,
        atol=1e-5,
    )


@pytest.mark.parametrize("estimator", ALL)
@given(rewards=batches(), seed=st.integers(0, 1000))
@ANY_BATCH
def test_the_order_of_the_rewards_does_not_matter(
    estimator: str, rewards: Tensor, seed: int
) -> None:
    order = torch.randperm(rewards.shape[2], generator=torch.Generator().manual_seed(seed))
    weights = torch.tensor([1.0, -0.5, 2.0])[: rewards.shape[2]]
    before = compute_advantages(rewards, estimator=estimator, weights=weights)
    after = compute_advantages(rewards[..., order], estimator=estimator, weights=weights[order])
    torch.testing.assert_close(after.advantages, before.advantages, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(after.per_reward, before.per_reward[..., order])


@pytest.mark.parametrize("estimator", [name for name in ALL if name != "gd2po"])
@given(rewards=batches())
@ANY_BATCH
def test_the_advantages_of_a_group_add_up_to_zero(estimator: str, rewards: Tensor) -> None:
    result = compute_advantages(rewards, estimator=estimator)
    scale = max(1.0, float(result.group_sum.abs().max()))
    assert float(result.group_sum.sum(dim=1).abs().max()) <= 1e-5 * scale
    assert float(result.advantages.sum(dim=1).abs().max()) <= 1e-4 * scale


@given(rewards=batches())
@ANY_BATCH
def test_with_one_reward_gdpo_is_grpo_times_one_common_scale(rewards: Tensor) -> None:
    one = without_nan(rewards[..., :1])
    gdpo, grpo = (compute_advantages(one, estimator=e, eps=0.0) for e in ("gdpo", "grpo"))
    torch.testing.assert_close(gdpo.group_sum, grpo.group_sum)
    scale = gdpo.advantages.abs().max() / grpo.advantages.abs().max().clamp(min=1e-9)
    torch.testing.assert_close(gdpo.advantages, grpo.advantages * scale, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("estimator", ALL)
@given(rewards=batches())
@ANY_BATCH
def test_missing_rewards_never_reach_another_group(estimator: str, rewards: Tensor) -> None:
    spoiled = rewards.clone()
    spoiled[0, 0, 0] = NAN
    before, after = (
        compute_advantages(r, estimator=estimator).group_sum[1:] for r in (rewards, spoiled)
    )
    torch.testing.assert_close(after, before)


@given(rewards=batches())
@ANY_BATCH
def test_a_live_batch_without_padding_has_unit_std(rewards: Tensor) -> None:
    result = compute_advantages(without_nan(rewards), eps=0.0)
    if result.group_sum.abs().max() > 1e-3:
        assert float(result.advantages.flatten().std()) == pytest.approx(1, rel=1e-4)


# ---- What the user may have written ------------------------------------------------------------


@pytest.mark.parametrize("value", [math.inf, -math.inf])
@pytest.mark.parametrize("other", [0.0, math.inf, -math.inf, NAN])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_infinite_rewards_are_refused(value: float, other: float, dtype: torch.dtype) -> None:
    for rollouts in ([[0.0], [value], [other]], [[value], [other], [NAN]]):
        with pytest.raises(ValueError, match="infinite"):
            compute_advantages(torch.tensor([rollouts], dtype=dtype))


def test_rewards_whose_squares_would_be_infinite_are_refused() -> None:
    for value in (1e200, -1e200):
        with pytest.raises(ValueError, match="infinite"):
            compute_advantages(torch.tensor([[[0.0], [value]]], dtype=torch.float64))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"estimator": "gpdo"}, "use one of gdpo, grpo"),
        ({"weights": (1.0, 1.0, 1.0)}, "weights has shape .* there are 2 rewards"),
        ({"weights": (1.0, NAN)}, "weights must be finite"),
        ({"eps": -1.0}, "eps is -1.0"),
        ({"eps": NAN}, "eps is nan"),
        ({"min_std": -0.1}, "min_std is -0.1"),
        ({"min_std": (0.1,)}, "min_std has shape"),
        ({"clamp": 0.0}, "clamp is 0.0"),
        ({"ema_decay": 1.0}, "ema_decay is 1.0"),
        ({"previous_batch_std": 0.0}, "previous_batch_std is 0.0"),
        ({"previous_batch_std": NAN}, "previous_batch_std is nan"),
        ({"conditions": [RewardCondition(0, on=2, at_least=1.0)]}, "condition.on is 2"),
        ({"conditions": [RewardCondition(-1, on=0, at_least=1.0)]}, "condition.reward is -1"),
        ({"conditions": [RewardCondition(0, on=1, at_least=NAN)]}, "at_least is NaN"),
    ],
)
def test_a_wrong_setting_is_refused_by_name(changed: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compute_advantages(T1, **changed)  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(2, 3), (0, 2, 1), (2, 0, 1), (2, 2, 0)])
def test_rewards_of_a_wrong_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="rewards has shape"):
        compute_advantages(torch.zeros(shape))


def test_integer_rewards_are_refused() -> None:
    with pytest.raises(ValueError, match="convert it to float"):
        compute_advantages(torch.zeros(1, 2, 1, dtype=torch.long))
