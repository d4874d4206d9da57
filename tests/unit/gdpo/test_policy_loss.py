"""The policy loss: golden numbers, what masks hide, and gradients."""

import math
from collections.abc import Callable
from dataclasses import fields
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gdpo import (
    AGGREGATIONS,
    CORRECTIONS,
    KL_PENALTIES,
    DecoupledPpo,
    EntropyTerm,
    EssScaling,
    Icepop,
    KlTerm,
    PolicyLoss,
    Ppo,
    Uncorrected,
    effective_sample_size,
    kl_penalty,
    loss_denominator,
    policy_loss,
)

ALL = tuple(CORRECTIONS)
# Those that clip a ratio as PPO does, with the largest weight that they give a token.
PPO_CLIP = {
    "decoupled_ppo": 5.0,
    "ppo": 1.0,
    "tis": 2.0,
    "tis_sequence": 2.0,
    "icepop": 5.0,
    "gspo": 1.0,
    "none": 1.0,
}
GARBAGE = (math.nan, math.inf, -math.inf, 0.0, 1e30)


def logs(*rows: tuple[float, ...]) -> Tensor:
    """Log-probabilities [B, T] from probabilities."""
    return torch.tensor(rows, dtype=torch.float64).log()


def loss_of(
    policy: Tensor, advantages: tuple[float, ...], mask: Tensor | None = None, **settings_: Any
) -> PolicyLoss:
    """The loss of a minibatch whose behaviour and proximal policies are `policy` unless given."""
    given_ = {"behaviour_logprobs": policy.detach(), "proximal_logprobs": policy.detach()}
    return policy_loss(
        policy,
        torch.tensor(advantages),
        torch.ones_like(policy) if mask is None else mask,
        **{**given_, **settings_},
    )


def gradient_of(policy: Tensor, *args: Any, **settings_: Any) -> list[list[float]]:
    leaf = policy.clone().requires_grad_()
    loss_of(leaf, *args, **settings_).loss.backward()
    assert leaf.grad is not None
    return leaf.grad.tolist()


def metrics(result: PolicyLoss) -> dict[str, float]:
    return {name: float(value) for name, value in result.metrics.items()}


# pi / prox = 1.5, 0.5 (A = 2) and 1.5, 0.5 (A = -1); prox / mu = 2, 1, 10, 1.
POLICY = logs((0.3, 0.1), (0.3, 0.1))
PROXIMAL = logs((0.2, 0.2), (0.2, 0.2))
BEHAVIOUR = logs((0.1, 0.2), (0.02, 0.2))
STALE: dict[str, Any] = {"behaviour_logprobs": BEHAVIOUR, "proximal_logprobs": PROXIMAL}


# ---- Golden numbers ----------------------------------------------------------------------------


def test_decoupled_ppo_weights_the_clipped_surrogate_by_the_truncated_weight() -> None:
    # min(r A, clip(r) A) with clip to [.8, 1.2]:
    #   A =  2: r = 1.5: min(3, 2.4) = 2.4;    r = .5: min(1, 1.6) = 1
    #   A = -1: r = 1.5: min(-1.5, -1.2) = -1.5;  r = .5: min(-.5, -.8) = -.8
    # times w' = 2, 1, min(10, 5), 1: 4.8 + 1 - 7.5 - .8 = -2.5, over 4 tokens.
    result = loss_of(POLICY, (2.0, -1.0), correction=DecoupledPpo(), **STALE)
    assert float(result.loss) == pytest.approx(2.5 / 4)
    assert metrics(result)["weight_truncated_share"] == 0.25


def test_decoupled_ppo_without_a_cap_keeps_the_whole_weight() -> None:
    # As above with w = 10 in the third place: 4.8 + 1 - 15 - .8 = -10.
    result = loss_of(POLICY, (2.0, -1.0), correction=Icepop(weight_cap=math.inf), **STALE)
    assert float(result.loss) == pytest.approx(10 / 4)
    assert metrics(result)["weight_truncated_share"] == 0


def test_ppo_clips_against_the_behaviour_policy() -> None:
    # rho = 3, .5 (A = 2): min(6, 2.4) = 2.4, 1;  rho = 15, .5 (A = -1): -15, min(-.5, -.8) = -.8.
    # 2.4 + 1 - 15 - .8 = -12.4, over 4 tokens.
    result = loss_of(POLICY, (2.0, -1.0), correction=Ppo(), **STALE)
    assert float(result.loss) == pytest.approx(12.4 / 4)
    without_proximal = policy_loss(
        POLICY,
        torch.tensor([2.0, -1.0]),
        torch.ones(2, 2),
        behaviour_logprobs=BEHAVIOUR,
        correction=Ppo(),
    )
    assert float(without_proximal.loss) == pytest.approx(12.4 / 4)


def test_none_ignores_the_behaviour_policy() -> None:
    # The surrogate of decoupled_ppo with every weight 1: 2.4 + 1 - 1.5 - .8 = 1.1.
    result = loss_of(POLICY, (2.0, -1.0), correction=Uncorrected(), **STALE)
    assert float(result.loss) == pytest.approx(-1.1 / 4)


@pytest.mark.parametrize("correction", PPO_CLIP)
def test_clip_higher_lets_a_good_token_rise_further(correction: str) -> None:
    # r = rho = 1.5, A = 2: clipped at 1.28.
    result = loss_of(
        logs((0.3,)),
        (2.0,),
        correction=cast(Any, CORRECTIONS[correction])(clip_high=0.28),
        behaviour_logprobs=logs((0.2,)),
        proximal_logprobs=logs((0.2,)),
    )
    assert float(result.loss) == pytest.approx(-2.56)


@pytest.mark.parametrize("correction", ALL)
def test_on_policy_all_corrections_are_the_plain_policy_gradient(correction: str) -> None:
    # All ratios are 1: loss -(2 + 2 - 1) / 3, and d loss / d log pi = -A / 3.
    policy = logs((0.3, 0.1), (0.5, 0.5))
    mask = torch.tensor([[1, 1], [1, 0]])
    if correction != "cispo":  # whose value is A log pi
        result = loss_of(policy, (2.0, -1.0), mask, correction=CORRECTIONS[correction]())
        assert float(result.loss) == -1
    expected = [[-2 / 3, -2 / 3], [1 / 3, 0]]
    gradient = gradient_of(policy, (2.0, -1.0), mask, correction=CORRECTIONS[correction]())
    assert gradient == [pytest.approx(row) for row in expected]


@pytest.mark.parametrize(
    ("aggregation", "expected"),
    [
        # Objectives 2, 2, 2 and -1; the second sequence has one token, the third none.
        ("token_mean", -5 / 4),
        ("sequence_mean", -(2 - 1) / 2),
        ("constant", -5 / (3 * 10)),
    ],
)
def test_aggregations_divide_by_tokens_sequences_or_a_constant(
    aggregation: str, expected: float
) -> None:
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [0, 0, 0]])
    policy = torch.full((3, 3), -1.0)
    result = loss_of(policy, (2.0, -1.0, 7.0), mask, aggregation=aggregation, max_length=10)
    assert float(result.loss) == pytest.approx(expected)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_losses_of_the_parts_add_up_to_the_loss_of_the_minibatch(aggregation: str) -> None:
    mask = torch.tensor([[1, 1], [1, 0]])
    common: dict[str, Any] = {"aggregation": aggregation, "max_length": 4}
    whole = loss_of(POLICY, (2.0, -1.0), mask, **common, **STALE).loss
    denominator = loss_denominator(mask.sum(-1), **common)
    parts = [
        policy_loss(
            POLICY[i : i + 1],
            torch.tensor([advantage]),
            mask[i : i + 1],
            behaviour_logprobs=BEHAVIOUR[i : i + 1],
            proximal_logprobs=PROXIMAL[i : i + 1],
            denominator=denominator,
            aggregation=aggregation,
        ).loss
        for i, advantage in enumerate((2.0, -1.0))
    ]
    torch.testing.assert_close(sum(parts), whole)


def test_metrics_describe_weights_ratios_and_clipping() -> None:
    # w = 2, 1, 10, 1: mean 3.5, ESS 14^2 / (4 * 106) = .462264; r = 1.5, .5, 1.5, .5: mean 1.
    # rho = 3, .5, 15, .5: k3 = 2 - ln 3, -.5 + ln 2, 14 - ln 15, -.5 + ln 2.
    found = metrics(loss_of(POLICY, (2.0, -1.0), correction=DecoupledPpo(), **STALE))
    k3 = [2 - math.log(3), -0.5 + math.log(2), 14 - math.log(15), -0.5 + math.log(2)]
    assert found == pytest.approx(
        {
            "ess": 196 / 424,
            "weight_mean": 3.5,
            "weight_max": 10,
            "weight_truncated_share": 0.25,
            "ratio_mean": 1.0,
            "ratio_max": 1.5,
            "clip_low_share": 0.25,  # r = .5 with A = -1
            "clip_high_share": 0.25,  # r = 1.5 with A = 2
            "mask_low_share": 0.0,
            "mask_high_share": 0.0,
            "mismatch_kl": sum(k3) / 4,
            "tokens": 4,
        }
    )


def test_mismatch_kl_keeps_its_digits_where_the_policies_almost_agree() -> None:
    # k3 of a log ratio d is d^2 / 2 + O(d^3); computed naively in float32 it is 0 or noise.
    behaviour = torch.zeros(1, 4)
    found = loss_of(behaviour + 1e-3, (1.0,), behaviour_logprobs=behaviour).metrics["mismatch_kl"]
    assert float(found) == pytest.approx(5e-7, rel=0.05)


@pytest.mark.parametrize("correction", ALL)
def test_metrics_carry_no_gradient(correction: str) -> None:
    result = loss_of(
        POLICY.clone().requires_grad_(), (2.0, -1.0), correction=CORRECTIONS[correction](), **STALE
    )
    assert result.loss.requires_grad
    assert not any(value.requires_grad for value in result.metrics.values())
    assert all(value.dim() == 0 for value in result.metrics.values())


# ---- Gradients ---------------------------------------------------------------------------------


def test_gradient_vanishes_exactly_where_the_clip_is_active() -> None:
    # d (w' r A) / d log pi = w' r A where unclipped: token 2: .5 * 2 = 1; token 3: 5 * 1.5 * -1.
    # Tokens 1 (r too high, A > 0) and 4 (r too low, A < 0) are clipped. Loss: minus, over 4.
    gradient = gradient_of(POLICY, (2.0, -1.0), correction=DecoupledPpo(), **STALE)
    assert gradient == [pytest.approx([0, -1 / 4]), pytest.approx([7.5 / 4, 0])]


def test_no_gradient_flows_through_the_importance_weight() -> None:
    proximal = PROXIMAL.clone().requires_grad_()
    behaviour = BEHAVIOUR.clone().requires_grad_()
    advantages = torch.tensor([2.0, -1.0], requires_grad=True)
    policy_loss(
        POLICY.clone().requires_grad_(),
        advantages,
        torch.ones(2, 2),
        behaviour_logprobs=behaviour,
        proximal_logprobs=proximal,
    ).loss.backward()
    assert proximal.grad is None and behaviour.grad is None and advantages.grad is None


@pytest.mark.parametrize("correction", [name for name in ALL if name != "cispo"])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_gradient_is_that_of_finite_differences(correction: str, aggregation: str) -> None:
    generator = torch.Generator().manual_seed(3)
    policy, proximal, behaviour = (
        -torch.rand(3, 4, generator=generator, dtype=torch.float64) for _ in range(3)
    )
    mask = torch.rand(3, 4, generator=generator) > 0.3
    advantages = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)

    def loss(logprobs: Tensor) -> Tensor:
        return policy_loss(
            logprobs,
            advantages,
            mask,
            behaviour_logprobs=behaviour,
            proximal_logprobs=proximal,
            correction=CORRECTIONS[correction](),
            aggregation=aggregation,
            max_length=4,
        ).loss

    assert torch.autograd.gradcheck(loss, (policy.requires_grad_(),))


# ---- Masks and extremes ------------------------------------------------------------------------


@pytest.mark.parametrize("correction", ALL)
@pytest.mark.parametrize("garbage", GARBAGE)
def test_garbage_under_the_mask_leaks_nowhere(correction: str, garbage: float) -> None:
    mask = torch.tensor([[True, False], [True, True], [False, False]])
    filler = logs((0.5, 0.5), (0.5, 0.5), (0.5, 0.5))
    rows = {
        "policy": torch.cat([POLICY, filler[:1]]),
        "behaviour_logprobs": torch.cat([BEHAVIOUR, filler[:1]]),
        "proximal_logprobs": torch.cat([PROXIMAL, filler[:1]]),
    }
    results = []
    for fill, last_advantage in ((filler, 0.0), (torch.full((3, 2), garbage), garbage)):
        policy, behaviour, proximal = (torch.where(mask, row, fill) for row in rows.values())
        policy.requires_grad_()
        result = policy_loss(
            policy,
            torch.tensor([2.0, -1.0, last_advantage]),
            mask,
            behaviour_logprobs=behaviour,
            proximal_logprobs=proximal,
            correction=CORRECTIONS[correction](),
        )
        result.loss.backward()
        results.append((result.loss.item(), metrics(result), policy.grad))
    (loss, found, gradient), (garbage_loss, garbage_found, garbage_gradient) = results
    assert garbage_loss == loss
    assert garbage_found == found
    assert gradient is not None
    assert garbage_gradient is not None
    assert torch.equal(garbage_gradient, gradient)
    assert (garbage_gradient[~mask] == 0).all()


@pytest.mark.parametrize("correction", ALL)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_a_fully_masked_minibatch_has_loss_zero_and_no_gradient(
    correction: str, aggregation: str
) -> None:
    leaf = torch.full((2, 3), math.nan, requires_grad=True)
    result = loss_of(
        leaf,
        (1.0, math.nan),
        torch.zeros(2, 3),
        correction=CORRECTIONS[correction](),
        aggregation=aggregation,
        max_length=3,
    )
    result.loss.backward()
    assert result.loss.item() == 0
    assert leaf.grad is not None and (leaf.grad == 0).all()
    found = metrics(result)
    assert found.pop("ess") == 1
    assert set(found.values()) == {0.0}


@pytest.mark.parametrize("correction", ALL)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_policies_that_disagree_wildly_give_a_finite_loss(correction: str, sign: float) -> None:
    far = sign * torch.tensor([[500.0, 1e30, 90.0]])
    policy = torch.zeros(1, 3, requires_grad=True)
    for advantage in (1.0, -1.0):
        result = loss_of(
            policy,
            (advantage,),
            correction=CORRECTIONS[correction](),
            behaviour_logprobs=far,
            proximal_logprobs=-far,
        )
        gradient = torch.autograd.grad(result.loss, policy)[0]
        assert result.loss.isfinite() and gradient.isfinite().all()
        assert all(math.isfinite(value) for value in metrics(result).values())


def test_a_nan_that_counts_is_not_hidden() -> None:
    policy = torch.tensor([[math.nan, -1.0]])
    assert loss_of(policy, (1.0,)).loss.isnan()


def test_half_precision_logprobs_are_computed_in_float32() -> None:
    result = loss_of(POLICY.bfloat16(), (2.0, -1.0), **STALE)
    assert result.loss.dtype == torch.float32
    assert loss_of(POLICY.float(), (2.0, -1.0)).loss.dtype == torch.float32


@given(
    log_ratios=st.lists(st.floats(-30, 30), min_size=6, max_size=6),
    advantage=st.floats(-5, 5),
    correction=st.sampled_from(sorted(PPO_CLIP)),
)
@settings(max_examples=60, deadline=None)
def test_loss_is_never_below_minus_the_clipped_gain(
    log_ratios: list[float], advantage: float, correction: str
) -> None:
    # min(r A, clip(r) A) <= 1.2 |A|, and w' <= C: no stale token promises an unbounded gain.
    behaviour = torch.tensor(log_ratios[:3])[None]
    policy = torch.tensor(log_ratios[3:])[None]
    result = loss_of(
        policy,
        (advantage,),
        correction=CORRECTIONS[correction](),
        behaviour_logprobs=behaviour,
        proximal_logprobs=torch.zeros(1, 3),
    )
    assert result.loss.isfinite()
    assert float(result.loss) >= -1.2 * PPO_CLIP[correction] * abs(advantage) * (1 + 1e-6)


# ---- What the user may have written ------------------------------------------------------------


@pytest.mark.parametrize("correction", [n for n in ALL if CORRECTIONS[n].needs_proximal])
def test_a_missing_proximal_policy_is_refused_with_the_remedy(correction: str) -> None:
    with pytest.raises(ValueError, match=r"needs proximal_logprobs: pass the log-prob"):
        loss_of(POLICY, (2.0, -1.0), correction=CORRECTIONS[correction](), proximal_logprobs=None)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"aggregation": "mean"}, "use one of token_mean, sequence_mean, constant"),
        ({"aggregation": "constant"}, "needs max_length"),
        ({"aggregation": "constant", "max_length": 0}, "needs max_length"),
        ({"mask": torch.ones(2)}, "mask has shape"),
        ({"behaviour_logprobs": POLICY[:1]}, "behaviour_logprobs has shape"),
        ({"proximal_logprobs": POLICY[:, :1]}, "proximal_logprobs has shape"),
    ],
)
def test_a_wrong_argument_is_refused_by_name(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        loss_of(POLICY, (2.0, -1.0), **changed)


@pytest.mark.parametrize(
    ("correction", "limits", "message"),
    [
        ("icepop", {"clip_low": 1.5}, "clip_low is 1.5"),
        ("icepop", {"clip_high": -0.1}, "clip_high is -0.1"),
        ("icepop", {"weight_cap": 0.0}, "weight_cap is 0.0"),
        ("icepop", {"weight_floor": math.nan}, "weight_floor is nan"),
        ("dppo_tv", {"tv_limit": 2.0}, "tv_limit is 2.0"),
    ],
)
def test_a_limit_out_of_range_is_refused_by_name(
    correction: str, limits: dict[str, float], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        CORRECTIONS[correction](**limits)


@pytest.mark.parametrize("correction", ALL)
def test_a_limit_that_a_correction_does_not_have_cannot_be_given(correction: str) -> None:
    kind = CORRECTIONS[correction]
    foreign = {"clip_low", "weight_floor", "weight_cap", "tv_limit", "second_moment_limit"}
    foreign -= {field.name for field in fields(kind)}
    assert foreign
    for name in foreign:
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
            kind(**{name: 0.1})


@pytest.mark.parametrize("correction", ["ppoo", "ppo", Ppo])
def test_what_is_no_correction_is_refused_with_those_that_are(correction: object) -> None:
    with pytest.raises(TypeError, match="use one of decoupled_ppo, ppo, tis"):
        loss_of(POLICY, (2.0, -1.0), correction=correction)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: KlTerm(POLICY, 0.1, "k4"), "use one of k3, mse"),
        (lambda: KlTerm(POLICY, -0.1), "reference_logprobs is -0.1"),
        (lambda: EntropyTerm(POLICY, -0.1), "entropy is -0.1"),
        (lambda: loss_of(POLICY, (2.0, -1.0), kl=KlTerm(POLICY[:1])), "reference_logprobs has"),
        (lambda: loss_of(POLICY, (2.0, -1.0), entropy=EntropyTerm(POLICY[0])), "entropy has"),
    ],
)
def test_a_wrong_term_is_refused_by_name(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_term_without_its_input_cannot_be_made() -> None:
    with pytest.raises(TypeError, match="reference_logprobs"):
        KlTerm(coefficient=0.1)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="entropy"):
        EntropyTerm(coefficient=0.1)  # type: ignore[call-arg]


def test_a_wrong_shape_of_logprobs_or_advantages_is_refused() -> None:
    with pytest.raises(ValueError, match="logprobs has shape"):
        loss_of(POLICY[0], (2.0, -1.0))
    with pytest.raises(ValueError, match="logprobs has shape"):
        loss_of(POLICY[:, :0], (2.0, -1.0))
    with pytest.raises(ValueError, match="advantages has shape"):
        loss_of(POLICY, (2.0,))


# ---- Further terms -----------------------------------------------------------------------------

REFERENCE = logs((0.15, 0.1), (0.3, 0.2))


@pytest.mark.parametrize(
    ("kind", "expected", "gradient"),
    [
        # ref / pi = .5, 1, 1, 2: k3 = .5 + ln 2 - 1, 0, 0, 2 - ln 2 - 1, gradient 1 - ref / pi.
        ("k3", [0.193147, 0, 0, 0.306853], [0.5, 0, 0, -1]),
        # (ln 2)^2 / 2 = .240227, gradient log pi - log ref.
        ("mse", [0.240227, 0, 0, 0.240227], [0.693147, 0, 0, -0.693147]),
    ],
)
def test_kl_penalty_is_added_to_the_loss(
    kind: str, expected: list[float], gradient: list[float]
) -> None:
    leaf = POLICY.clone().requires_grad_()
    assert kl_penalty(leaf, REFERENCE, kind).flatten().tolist() == pytest.approx(expected, abs=1e-6)
    plain = loss_of(POLICY, (2.0, -1.0), **STALE)
    measured = loss_of(POLICY, (2.0, -1.0), kl=KlTerm(REFERENCE, kind=kind), **STALE)
    penalised = loss_of(leaf, (0.0, 0.0), kl=KlTerm(REFERENCE, 0.5, kind), **STALE)
    assert float(measured.loss) == float(plain.loss)
    assert metrics(measured)["reference_kl"] == pytest.approx(sum(expected) / 4, abs=1e-6)
    assert penalised.loss.item() == pytest.approx(0.5 * sum(expected) / 4, abs=1e-6)
    penalised.loss.backward()
    assert leaf.grad is not None
    assert leaf.grad.flatten().tolist() == pytest.approx([0.5 * g / 4 for g in gradient], abs=1e-6)


def test_kl_penalty_of_models_that_disagree_wildly_is_finite() -> None:
    far = torch.tensor([[1e30, -1e30, 500.0]])
    for kind in KL_PENALTIES:
        assert kl_penalty(torch.zeros(1, 3), far, kind).isfinite().all()
    with pytest.raises(ValueError, match="reference_logprobs has shape"):
        kl_penalty(POLICY, REFERENCE[0])


def test_entropy_is_rewarded() -> None:
    entropy = torch.tensor([[1.0, 2.0], [3.0, math.nan]], requires_grad=True)
    mask = torch.tensor([[1, 1], [1, 0]])
    result = loss_of(POLICY, (0.0, 0.0), mask, entropy=EntropyTerm(entropy, 0.1), **STALE)
    assert result.loss.item() == pytest.approx(-0.1 * 6 / 3)
    assert metrics(result)["entropy"] == pytest.approx(2)
    result.loss.backward()
    assert entropy.grad is not None
    assert entropy.grad.tolist() == [pytest.approx([-0.1 / 3] * 2), pytest.approx([-0.1 / 3, 0])]


def test_the_step_is_scaled_by_the_root_of_the_effective_sample_size() -> None:
    # w = 2, 1, 10, 1: ESS 196 / 424.
    plain = float(loss_of(POLICY, (2.0, -1.0), **STALE).loss)
    scaled = loss_of(POLICY, (2.0, -1.0), ess_scaling=EssScaling(), **STALE)
    assert float(scaled.loss) == pytest.approx(plain * math.sqrt(196 / 424))
    of_the_whole = loss_of(POLICY, (2.0, -1.0), ess_scaling=EssScaling(0.25), **STALE)
    assert float(of_the_whole.loss) == pytest.approx(plain / 2)


# ---- Effective sample size ---------------------------------------------------------------------


def test_effective_sample_size_is_that_of_kish() -> None:
    # (4 + 3 * .5)^2 / (4 * (16 + 3 * .25)) = 30.25 / 67; with 4 cut to 2: 12.25 / (4 * 4.75).
    weights = torch.tensor([[4.0, 0.5, 0.5, 0.5]])
    everything = torch.ones(1, 4, dtype=torch.bool)
    assert float(effective_sample_size(weights, everything)) == pytest.approx(0.451493, abs=1e-6)
    truncated = effective_sample_size(weights.clamp(max=2.0), everything)
    assert float(truncated) == pytest.approx(0.644737, abs=1e-6)


def test_effective_sample_size_sees_the_mask_only() -> None:
    weights = torch.tensor([[4.0, 0.5, 0.5, 0.5, math.nan, math.inf]])
    mask = torch.tensor([[1, 1, 1, 1, 0, 0]])
    assert float(effective_sample_size(weights, mask)) == pytest.approx(0.451493, abs=1e-6)
    assert float(effective_sample_size(weights, torch.zeros(1, 6))) == 1
    with pytest.raises(ValueError, match="mask has shape"):
        effective_sample_size(weights, mask[:, :2])


def test_effective_sample_size_does_not_depend_on_the_scale_of_the_weights() -> None:
    weights = torch.tensor([[4.0, 0.5, 0.5, 0.5]])
    everything = torch.ones(1, 4)
    for scale in (1e-30, 1e30):
        ess = effective_sample_size(weights * scale, everything)
        assert float(ess) == pytest.approx(0.451493, abs=1e-6)
    assert float(effective_sample_size(torch.zeros(1, 4), everything)) == 0
