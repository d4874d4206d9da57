"""Log-probabilities and entropies without logits."""

from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gdpo import Head, head_logprobs, head_logprobs_and_entropy, heads, logprobs
from tests.unit.gdpo.test_logprobs import NewTensors

N, H, V = 13, 6, 11


def inputs(dtype: torch.dtype, *, bias: bool) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    generator = torch.Generator().manual_seed(2)
    hidden, weight, offset = (
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for shape in ((N, H), (V, H), (V,))
    )
    tokens = torch.randint(0, V, (N,), generator=generator)
    return hidden, weight, offset if bias else None, tokens


def dense(hidden: Tensor, head: Head, tokens: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    logits = torch.nn.functional.linear(hidden, head.weight_VH, head.bias_V).float() * head.scale
    if head.softcap is not None:
        logits = head.softcap * (logits / head.softcap).tanh()
    log_p = (logits / temperature).log_softmax(-1)
    return log_p.gather(-1, tokens[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)


@given(
    rows=st.sampled_from([1, 2, 5, 13, 100, None]),
    temperature=st.sampled_from([1.0, 0.6]),
    scale=st.sampled_from([1.0, 0.3]),
    softcap=st.sampled_from([None, 2.0]),
    bias=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_values_and_gradients_are_those_of_logits(
    rows: int | None, temperature: float, scale: float, softcap: float | None, bias: bool
) -> None:
    hidden, weight, offset, tokens = inputs(torch.float32, bias=bias)
    head = Head(weight, offset, scale, softcap)
    upstream = torch.randn(2, N, generator=torch.Generator().manual_seed(0))
    leaves = [x for x in (hidden, weight, offset) if x is not None]
    found = head_logprobs_and_entropy(
        hidden, head, tokens, temperature=temperature, rows_per_chunk=rows
    )
    expected = dense(hidden, head, tokens, temperature)
    alone = head_logprobs(hidden, head, tokens, temperature=temperature, rows_per_chunk=rows)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(alone, expected[0])
    torch.testing.assert_close(
        torch.autograd.grad(found, leaves, list(upstream)),
        torch.autograd.grad(expected, leaves, list(upstream), retain_graph=True),
    )
    torch.testing.assert_close(
        torch.autograd.grad(alone, leaves, upstream[0]),
        torch.autograd.grad(expected[0], leaves, upstream[0]),
    )


@given(
    rows=st.sampled_from([1, 5, 100]),
    scale=st.sampled_from([1.0, 0.3]),
    softcap=st.sampled_from([None, 2.0]),
    bias=st.booleans(),
    announced=st.sampled_from(["right", "wrong"]),
)
@settings(max_examples=40, deadline=None)
def test_gradients_made_early_are_those_made_late(
    rows: int, scale: float, softcap: float | None, bias: bool, announced: str
) -> None:
    """Of a loss that is no sum of log-probabilities; also where it announced something else."""
    hidden, weight, offset, tokens = inputs(torch.float32, bias=bias)
    head = Head(weight, offset, scale, softcap)
    leaves = [x for x in (hidden, weight, offset) if x is not None]
    weights = torch.randn(N, generator=torch.Generator().manual_seed(0))
    calls = []

    def announce(logprobs: Tensor) -> Tensor:
        calls.append(len(logprobs))
        factor = 1.0 if announced == "right" else 1.5
        return factor * weights * logprobs.exp()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(heads, "_EARLY_WEIGHTS", 0)
        early = head_logprobs(hidden, head, tokens, rows_per_chunk=rows, loss_gradient=announce)
    late = head_logprobs(hidden, head, tokens, rows_per_chunk=rows)
    torch.testing.assert_close(early, late)
    assert calls == [N] * -(-N // rows)
    with mock.patch.object(heads, "chunk_gradient", wraps=logprobs.chunk_gradient) as made_late:
        found = torch.autograd.grad((weights * early.exp()).sum(), leaves)
    assert made_late.called == (announced == "wrong")
    torch.testing.assert_close(found, torch.autograd.grad((weights * late.exp()).sum(), leaves))


def test_an_entropy_that_is_only_measured_is_the_same_and_has_no_gradient() -> None:
    hidden, weight, offset, tokens = inputs(torch.float32, bias=True)
    head = Head(weight, offset)
    _, expected = head_logprobs_and_entropy(hidden, head, tokens)
    logprobs, entropy = head_logprobs_and_entropy(hidden, head, tokens, entropy_gradient=False)
    torch.testing.assert_close(entropy, expected)
    assert logprobs.requires_grad and not entropy.requires_grad
    with pytest.raises(ValueError, match="entropy_gradient=False"):
        head_logprobs_and_entropy(hidden, head, tokens, loss_gradient=torch.ones_like)


def test_nothing_is_made_early_where_there_is_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heads, "_EARLY_WEIGHTS", 0)
    hidden, weight, _, tokens = inputs(torch.float32, bias=False)
    with torch.no_grad():
        head_logprobs(
            hidden,
            Head(weight),
            tokens,
            loss_gradient=lambda _: pytest.fail("asked for a gradient"),
        )


def test_gradients_pass_the_check_by_finite_differences() -> None:
    hidden, weight, offset, tokens = inputs(torch.float64, bias=True)
    assert offset is not None

    def both(hidden: Tensor, weight: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
        head = Head(weight, offset, 0.5, 3.0)
        return head_logprobs_and_entropy(hidden, head, tokens, temperature=0.7, rows_per_chunk=5)

    assert torch.autograd.gradcheck(both, (hidden, weight, offset))


def test_a_weight_that_is_not_trained_gets_no_gradient() -> None:
    hidden, weight, _, tokens = inputs(torch.float32, bias=False)
    head_logprobs(hidden, Head(weight.detach()), tokens).sum().backward()
    assert weight.grad is None
    assert hidden.grad is not None


def test_no_position_at_all_is_nothing() -> None:
    hidden, weight, _, _ = inputs(torch.float32, bias=False)
    values = head_logprobs(hidden[:0], Head(weight), torch.zeros(0, dtype=torch.long))
    values.sum().backward()
    assert len(values) == 0
    assert weight.grad is not None and not weight.grad.any()


def test_chunks_of_a_bfloat16_head_add_up_in_float32() -> None:
    # 4,096 equal rows: in bfloat16 a sum stops growing where one more is below its last digit.
    hidden = torch.ones(4096, 4, dtype=torch.bfloat16)
    weight = torch.zeros(3, 4, dtype=torch.bfloat16, requires_grad=True)
    tokens = torch.zeros(4096, dtype=torch.long)
    values = head_logprobs(hidden, Head(weight), tokens, rows_per_chunk=1)
    assert values.dtype == torch.float32
    values.sum().backward()
    assert weight.grad is not None and weight.grad.dtype == torch.bfloat16
    torch.testing.assert_close(
        weight.grad[0].float(), torch.full((4,), 4096 * 2 / 3), rtol=1e-2, atol=0
    )


def test_nothing_of_positions_times_vocabulary_is_made() -> None:
    hidden, weight, _, tokens = inputs(torch.float32, bias=False)
    with NewTensors(N * V) as made:
        values = head_logprobs_and_entropy(hidden, Head(weight), tokens, rows_per_chunk=4)
        (values[0].sum() + values[1].sum()).backward()
    assert made.count == 0
    with NewTensors(N * V) as made:
        dense(hidden, Head(weight), tokens, 1.0)
    assert made.count > 0


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"tokens": torch.zeros(3, dtype=torch.long)}, "tokens \\(3,\\)"),
        ({"head": Head(torch.zeros(V, H + 1))}, "weight \\(11, 7\\)"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"rows_per_chunk": 0}, "rows_per_chunk is 0"),
    ],
)
def test_wrong_arguments_are_refused(changed: dict[str, Any], message: str) -> None:
    hidden, weight, _, tokens = inputs(torch.float32, bias=False)
    given_: dict[str, Any] = {"head": Head(weight), "tokens": tokens, **changed}
    with pytest.raises(ValueError, match=message):
        head_logprobs(hidden, given_.pop("head"), given_.pop("tokens"), **given_)
