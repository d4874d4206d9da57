"""The corrections one by one: golden numbers, which tokens they drop, staleness."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gdpo import (
    CORRECTIONS,
    M2po,
    PolicyLoss,
    interpolated_proximal,
    join_records,
    metrics_by_staleness,
    policy_loss,
    token_metrics,
)


def logs(*rows: tuple[float, ...]) -> Tensor:
    """Log-probabilities [B, T] from probabilities."""
    return torch.tensor(rows, dtype=torch.float64).log()


# r = 1.5, .5 in both rows, A = 2 and -1; w = 2, 1, 10, 1; rho = 3, .5, 15, .5.
POLICY = logs((0.3, 0.1), (0.3, 0.1))
PROXIMAL = logs((0.2, 0.2), (0.2, 0.2))
BEHAVIOUR = logs((0.1, 0.2), (0.02, 0.2))
ADVANTAGES = torch.tensor([2.0, -1.0])
# min(r A, clip(r) A) with clip to [.8, 1.2] is 2.4, 1, -1.5, -.8.


def loss_of(correction: str, policy: Tensor = POLICY, **limits: Any) -> PolicyLoss:
    return policy_loss(
        policy,
        ADVANTAGES,
        torch.ones(2, 2),
        behaviour_logprobs=BEHAVIOUR,
        proximal_logprobs=PROXIMAL,
        correction=CORRECTIONS[correction](**limits),
    )


def objective(correction: str, **limits: Any) -> float:
    """Sum of the objective over the four tokens."""
    return -4 * float(loss_of(correction, **limits).loss)


def gradient(correction: str, **limits: Any) -> list[float]:
    """Gradient of the sum of the objective, token by token."""
    leaf = POLICY.clone().requires_grad_()
    loss_of(correction, leaf, **limits).loss.backward()
    assert leaf.grad is not None
    return (-4 * leaf.grad).flatten().tolist()


def shares(correction: str, **limits: Any) -> dict[str, float]:
    """Shares of truncated, clipped and masked tokens that are not 0."""
    found = loss_of(correction, **limits).metrics
    return {name: float(x) for name, x in found.items() if name.endswith("share") and x > 0}


# ---- Golden numbers ----------------------------------------------------------------------------


def test_the_defaults_are_those_that_their_authors_use() -> None:
    found: dict[str, Any] = {name: correction() for name, correction in CORRECTIONS.items()}
    assert (found["decoupled_ppo"].clip_low, found["decoupled_ppo"].clip_high) == (0.2, 0.2)
    assert found["decoupled_ppo"].weight_cap == 5
    assert found["tis"].weight_cap == found["tis_sequence"].weight_cap == 2
    assert (found["icepop"].weight_floor, found["icepop"].weight_cap) == (0.5, 5)
    assert (found["dppo_tv"].tv_limit, found["dppo_tv"].log_ratio_penalty) == (0.2, 1e-3)
    assert (found["gspo"].clip_low, found["gspo"].clip_high) == (3e-4, 4e-4)
    assert found["m2po"].second_moment_limit == 0.04


def test_tis_truncates_the_weight_of_each_token() -> None:
    # w' = 2, 1, 2, 1: 4.8 + 1 - 3 - .8.
    assert objective("tis") == pytest.approx(2)
    assert shares("tis")["weight_truncated_share"] == 0.25


def test_tis_sequence_truncates_the_product_of_the_weights() -> None:
    # w' = 2 * 1 and min(10 * 1, 2): 2 * 3.4 - 2 * 2.3; uncut 2 * 3.4 - 10 * 2.3.
    assert objective("tis_sequence") == pytest.approx(2.2)
    assert objective("tis_sequence", weight_cap=math.inf) == pytest.approx(-16.2)
    assert shares("tis_sequence")["weight_truncated_share"] == 0.5


def test_icepop_masks_what_is_out_of_bounds_and_keeps_the_rest_whole() -> None:
    # w = 2, 1, 10 (masked), 1: 4.8 + 1 - .8.
    assert objective("icepop") == pytest.approx(5)
    assert shares("icepop") == {
        "clip_low_share": 0.25,
        "clip_high_share": 0.25,
        "mask_high_share": 0.25,
    }
    # From 1.5 up: 4.8 alone.
    assert objective("icepop", weight_floor=1.5) == pytest.approx(4.8)
    assert shares("icepop", weight_floor=1.5)["mask_low_share"] == 0.5


def test_gspo_clips_the_geometric_mean_of_the_ratios() -> None:
    # s = sqrt(1.5 * .5) = .866025; A = 2: 1.732051 twice; A = -1: min(-.866025, -.9997) twice.
    assert objective("gspo") == pytest.approx(2 * 1.7320508 - 2 * 0.9997)
    assert shares("gspo") == {"clip_low_share": 0.5}
    # Each token's log pi moves s A * 2 / 2; the clipped sequence has no gradient.
    assert gradient("gspo") == pytest.approx([1.7320508, 1.7320508, 0, 0])
    assert objective("gspo", clip_low=0.2) == pytest.approx(2 * 1.7320508 - 2 * 0.8660254)


def test_cispo_clips_the_weight_and_drops_no_token() -> None:
    # rho = 3, .5, 15 cut to 5, .5, times A log pi.
    assert objective("cispo") == pytest.approx(
        3 * 2 * math.log(0.3) + 0.5 * 2 * math.log(0.1) - 5 * math.log(0.3) - 0.5 * math.log(0.1)
    )
    assert gradient("cispo") == pytest.approx([6, 1, -5, -0.5])
    assert shares("cispo") == {"weight_truncated_share": 0.25}
    assert gradient("cispo", clip_low=0.2, clip_high=0.28) == pytest.approx(
        [2.56, 1.6, -1.28, -0.8]
    )


def test_dppo_masks_what_moved_too_far_in_the_direction_of_its_advantage() -> None:
    # pi - mu = .2 (A > 0: masked at .15), -.1, .28 (A < 0: kept), -.1; rho A = -, 1, -15, -.5.
    penalty = 1e-3 * sum(math.log(rho) ** 2 for rho in (3, 0.5, 15, 0.5))
    assert objective("dppo_tv", tv_limit=0.15) == pytest.approx(-14.5 - penalty)
    assert shares("dppo_tv", tv_limit=0.15) == {"mask_high_share": 0.25}
    # At .05 the last token, A < 0 and -.1, is masked too.
    assert objective("dppo_tv", tv_limit=0.05, log_ratio_penalty=0.0) == pytest.approx(-14)
    assert shares("dppo_tv", tv_limit=0.05) == {"mask_low_share": 0.25, "mask_high_share": 0.25}


def test_dppo_pulls_masked_tokens_towards_the_behaviour_policy_too() -> None:
    # d -c (log rho)^2 / d log pi = -2 c log rho; rho A for those that are not masked.
    expected = [-0.02 * math.log(3), 1 - 0.02 * math.log(0.5)]
    expected += [-15 - 0.02 * math.log(15), -0.5 - 0.02 * math.log(0.5)]
    found = gradient("dppo_tv", tv_limit=0.15, log_ratio_penalty=0.01)
    assert found == pytest.approx(expected)


@pytest.mark.parametrize(
    ("limit", "expected", "masked"),
    [
        # (log rho)^2 = 1.206949, .480453, 7.333536, .480453; running means .480453 twice,
        # .722618, 2.375348. rho A = 6, 1, -15, -.5.
        (0.04, 0, {"mask_low_share": 0.5, "mask_high_share": 0.5}),
        (0.5, 1 - 0.5, {"mask_high_share": 0.5}),
        (0.8, 6 + 1 - 0.5, {"mask_high_share": 0.25}),
        (2.4, 6 + 1 - 15 - 0.5, {}),
    ],
)
def test_m2po_masks_the_fewest_tokens_that_bring_the_second_moment_down(
    limit: float, expected: float, masked: dict[str, float]
) -> None:
    assert objective("m2po", second_moment_limit=limit) == pytest.approx(expected)
    assert shares("m2po", second_moment_limit=limit) == masked


@given(
    log_rho=st.lists(st.sampled_from([0.0, 0.1, -0.1, 0.3, -0.3, 1.0, 7.0]), min_size=1),
    limit=st.sampled_from([0.005, 0.01, 0.04, 0.5]),
)
@settings(max_examples=60, deadline=None)
def test_m2po_keeps_the_second_moment_of_the_rest_under_its_limit(
    log_rho: list[float], limit: float
) -> None:
    behaviour = torch.tensor([log_rho], dtype=torch.float64).neg()
    leaf = torch.zeros_like(behaviour, requires_grad=True)
    policy_loss(
        leaf,
        torch.ones(1),
        torch.ones_like(behaviour),
        behaviour_logprobs=behaviour,
        correction=M2po(second_moment_limit=limit),
    ).loss.backward()
    assert leaf.grad is not None
    kept = [x for x, g in zip(log_rho, leaf.grad[0].tolist(), strict=True) if g != 0]
    gone = sorted(x * x for x, g in zip(log_rho, leaf.grad[0].tolist(), strict=True) if g == 0)
    squares = [x * x for x in kept]
    if kept:
        assert sum(squares) / len(kept) < limit
    if gone:
        # One more value, with all that equal it, would break the limit.
        more = [x for x in gone if x == gone[0]]
        assert max(squares, default=0) < gone[0]
        assert (sum(squares) + sum(more)) / (len(kept) + len(more)) >= limit - 1e-12


@pytest.mark.parametrize("correction", CORRECTIONS)
def test_the_order_of_sequences_and_tokens_does_not_matter(correction: str) -> None:
    generator = torch.Generator().manual_seed(1)
    policy, proximal, behaviour = (-torch.rand(4, 5, generator=generator) for _ in range(3))
    mask = torch.rand(4, 5, generator=generator) > 0.3
    advantages = torch.randn(4, generator=generator)
    rows, columns = torch.randperm(4, generator=generator), torch.randperm(5, generator=generator)

    def loss(*tensors: Tensor, advantages: Tensor) -> PolicyLoss:
        policy, proximal, behaviour, mask = tensors
        return policy_loss(
            policy,
            advantages,
            mask,
            behaviour_logprobs=behaviour,
            proximal_logprobs=proximal,
            correction=CORRECTIONS[correction](),
        )

    tensors = policy, proximal, behaviour, mask
    before = loss(*tensors, advantages=advantages)
    after = loss(*(x[rows][:, columns] for x in tensors), advantages=advantages[rows])
    torch.testing.assert_close(after.loss, before.loss)
    torch.testing.assert_close(after.metrics, before.metrics)


# ---- The proximal policy from the versions -----------------------------------------------------


def test_the_proximal_policy_lies_between_by_version() -> None:
    # mu = .1, pi = .8, staleness 0, 1, 2: .1, sqrt(.1 * .8) = .282843, (.1 * .8^2)^(1/3) = .4.
    behaviour, policy = logs((0.1, 0.1, 0.1)), logs((0.8, 0.8, 0.8))
    found = interpolated_proximal(behaviour, policy, torch.tensor([[7, 6, 5]]), current_version=7)
    assert found.exp().tolist() == [pytest.approx([0.1, 0.282843, 0.4], abs=1e-6)]
    one_version = interpolated_proximal(behaviour, policy, torch.full((1, 3), 5), current_version=7)
    assert one_version.exp().tolist() == [pytest.approx([0.4, 0.4, 0.4], abs=1e-6)]


def test_a_version_of_the_future_counts_as_fresh() -> None:
    found = interpolated_proximal(logs((0.1,)), logs((0.8,)), torch.tensor([[9]]), 7)
    assert found.exp().tolist() == [pytest.approx([0.1])]


def test_the_interpolated_policy_carries_no_gradient_and_takes_any_garbage() -> None:
    policy = torch.tensor([[-1.0, math.nan]], requires_grad=True)
    versions = torch.tensor([[3, -(2**40)]])
    found = interpolated_proximal(torch.tensor([[-2.0, math.inf]]), policy, versions, 4)
    assert not found.requires_grad
    assert float(found[0, 0]) == -1.5
    with pytest.raises(ValueError, match="give one entry for each token"):
        interpolated_proximal(policy.detach(), policy, torch.zeros(2), 4)


def test_fresh_tokens_have_weight_one_under_the_interpolated_policy() -> None:
    versions = torch.full((2, 2), 3)
    proximal = interpolated_proximal(BEHAVIOUR, POLICY, versions, current_version=3)
    result = policy_loss(
        POLICY,
        ADVANTAGES,
        torch.ones(2, 2),
        behaviour_logprobs=BEHAVIOUR,
        proximal_logprobs=proximal,
    )
    assert float(result.metrics["ess"]) == pytest.approx(1)
    # r = rho = 3, .5, 15, .5: the objective of ppo.
    assert float(result.loss) == pytest.approx(float(loss_of("ppo").loss))


# ---- Staleness ---------------------------------------------------------------------------------


def test_metrics_are_split_by_staleness() -> None:
    # w = 2, 1 of staleness 1 and 3; w = 10, 1 of staleness 3 and 40.
    record = loss_of("icepop").record
    found = metrics_by_staleness(record, torch.tensor([1, 3, 3, 40]))
    assert {name.split("/")[1] for name in found} == {"1", "2-3", "16+"}
    assert found["staleness/1/weight_mean"] == pytest.approx(2)
    assert found["staleness/2-3/weight_max"] == pytest.approx(10)
    # (1 + 10)^2 / (2 * 101)
    assert found["staleness/2-3/ess"] == pytest.approx(121 / 202)
    assert found["staleness/2-3/mask_high_share"] == 0.5
    assert found["staleness/16+/tokens"] == 1
    assert found["staleness/1/mismatch_kl"] == pytest.approx(2 - math.log(3))


def test_parts_of_any_length_are_taken_together() -> None:
    record = loss_of("tis").record
    parts = [record.where(torch.tensor(chosen)) for chosen in ([0], [1, 2, 3])]
    assert float(token_metrics(parts[0])["tokens"]) == 1
    assert token_metrics(join_records(parts)) == token_metrics(record)
    whole = metrics_by_staleness(join_records(parts), torch.tensor([0, 0, 5, 5]), buckets=(0, 4))
    assert whole["staleness/0-3/tokens"] == whole["staleness/4+/tokens"] == 2


@pytest.mark.parametrize(
    ("staleness", "buckets", "message"),
    [
        ([0, 1, 2, 3], (1, 2), "buckets is"),
        ([0, 1, 2, 3], (0, 4, 2), "buckets is"),
        ([0, 1, 2, 3], (), "buckets is"),
        ([0, 1, 2], (0,), "staleness has shape"),
        ([0, 1, 2, -1], (0,), "staleness is negative"),
    ],
)
def test_wrong_arguments_of_the_split_are_refused(
    staleness: list[int], buckets: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        metrics_by_staleness(loss_of("none").record, torch.tensor(staleness), buckets)
