"""Log-probabilities and entropies of logits, in chunks."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gdpo import token_entropy, token_logprobs, token_logprobs_and_entropy


def dense_logprobs(logits: Tensor, tokens: Tensor, temperature: float) -> Tensor:
    return (logits / temperature).log_softmax(dim=-1).gather(-1, tokens[..., None])[..., 0]


def some_logits(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    logits = 3 * torch.randn(3, 5, 7, generator=generator, dtype=torch.float64)
    return logits.to(dtype), torch.randint(0, 7, (3, 5), generator=generator)


def test_token_logprobs_are_those_of_the_softmax() -> None:
    # Logits ln 1, ln 2, ln 5: probabilities 1/8, 2/8, 5/8; at temperature 1/2: 1, 4, 25 of 30.
    logits = torch.tensor([1.0, 2.0, 5.0]).log().expand(1, 3, 3)
    tokens = torch.tensor([[0, 1, 2]])
    expected = torch.tensor([[1 / 8, 2 / 8, 5 / 8]]).log()
    torch.testing.assert_close(token_logprobs(logits, tokens), expected)
    sharper = torch.tensor([[1 / 30, 4 / 30, 25 / 30]]).log()
    torch.testing.assert_close(token_logprobs(logits, tokens, temperature=0.5), sharper)


@pytest.mark.parametrize("rows_per_chunk", [1, 2, 5, 6, 11, 1000])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_chunks_show_neither_in_the_values_nor_in_the_gradient(
    rows_per_chunk: int, temperature: float
) -> None:
    logits, tokens = some_logits()
    upstream = torch.arange(15.0).reshape(3, 5)
    chunked, dense = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    values = token_logprobs(chunked, tokens, temperature, rows_per_chunk)
    expected = dense_logprobs(dense, tokens, temperature)
    torch.testing.assert_close(values, expected)
    values.backward(upstream)
    expected.backward(upstream)
    torch.testing.assert_close(chunked.grad, dense.grad)


def test_token_logprobs_pass_the_check_by_finite_differences() -> None:
    logits, tokens = some_logits(torch.float64)
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: token_logprobs(x, tokens, 0.7, 4), (logits,))


def test_token_logprobs_of_half_precision_logits_are_float32() -> None:
    logits, tokens = some_logits(torch.bfloat16)
    logits.requires_grad_()
    values = token_logprobs(logits, tokens)
    assert values.dtype == torch.float32
    torch.testing.assert_close(values, dense_logprobs(logits.float(), tokens, 1.0))
    values.sum().backward()
    assert logits.grad is not None and logits.grad.dtype == torch.bfloat16


def test_token_logprobs_take_shifted_views_and_leave_the_logits_alone() -> None:
    logits, tokens = some_logits()
    before = logits.clone()
    values = token_logprobs(logits[:, :-1], tokens[:, 1:], 1.0, 2)
    torch.testing.assert_close(values, dense_logprobs(before[:, :-1], tokens[:, 1:], 1.0))
    assert torch.equal(logits, before)


def test_tokens_that_cannot_be_sampled_do_not_spoil_the_others() -> None:
    logits = torch.tensor([[[0.0, -math.inf, 0.0], [1e4, 0.0, -1e4]]], requires_grad=True)
    values = token_logprobs(logits, torch.tensor([[0, 0]]))
    assert values.tolist() == [[pytest.approx(-math.log(2)), 0.0]]
    values.sum().backward()
    assert logits.grad is not None and logits.grad.isfinite().all()


@pytest.mark.parametrize(
    ("shape", "changed", "message"),
    [
        ((1, 3), {}, "tokens \\(1, 3\\)"),
        ((1, 2), {"temperature": 0.0}, "temperature is 0.0"),
        ((1, 2), {"rows_per_chunk": 0}, "rows_per_chunk is 0"),
    ],
)
def test_wrong_arguments_of_token_logprobs_are_refused(
    shape: tuple[int, int], changed: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        token_logprobs(torch.zeros(1, 2, 4), torch.zeros(shape, dtype=torch.long), **changed)


# ---- Entropy -----------------------------------------------------------------------------------


def dense_entropy(logits: Tensor, temperature: float) -> Tensor:
    log_p = (logits / temperature).log_softmax(dim=-1)
    return -(log_p.exp() * log_p).sum(dim=-1)


def test_token_entropy_is_that_of_the_softmax() -> None:
    # Probabilities 1/8, 2/8, 5/8: ln 8 / 8 + ln 4 / 4 + 5 ln 1.6 / 8.
    logits = torch.tensor([[[1.0, 2.0, 5.0], [1.0, 1.0, 1.0]]]).log()
    expected = math.log(8) / 8 + math.log(4) / 4 + 5 * math.log(1.6) / 8
    assert token_entropy(logits).tolist() == [pytest.approx([expected, math.log(3)])]


@pytest.mark.parametrize("rows_per_chunk", [1, 4, 1000])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_and_entropy_together_are_those_apart(
    rows_per_chunk: int, temperature: float
) -> None:
    logits, tokens = some_logits()
    upstream = torch.arange(15.0).reshape(3, 5)
    together, dense = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    values, entropy = token_logprobs_and_entropy(together, tokens, temperature, rows_per_chunk)
    expected = dense_logprobs(dense, tokens, temperature), dense_entropy(dense, temperature)
    torch.testing.assert_close((values, entropy), expected)
    (values * upstream + entropy * (7 - upstream)).sum().backward()
    (expected[0] * upstream + expected[1] * (7 - upstream)).sum().backward()
    torch.testing.assert_close(together.grad, dense.grad)


def test_entropy_passes_the_check_by_finite_differences() -> None:
    logits, tokens = some_logits(torch.float64)
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: token_entropy(x, 0.7, 4), (logits,))
    assert torch.autograd.gradcheck(
        lambda x: token_logprobs_and_entropy(x, tokens, 0.7, 4), (logits,)
    )


def test_entropy_of_impossible_tokens_is_finite() -> None:
    logits = torch.tensor([[[0.0, -math.inf, 0.0], [1e4, 0.0, -1e4]]], requires_grad=True)
    entropy = token_entropy(logits)
    assert entropy.tolist() == [[pytest.approx(math.log(2)), 0.0]]
    entropy.sum().backward()
    assert logits.grad is not None and logits.grad.isfinite().all()


# ---- Memory ------------------------------------------------------------------------------------


class NewTensors(TorchDispatchMode):
    """Counts the operations that make a tensor of at least `size` elements."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.count = size, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        known = {x.untyped_storage().data_ptr() for x in args if isinstance(x, Tensor)}
        if isinstance(result, Tensor) and result.numel() >= self.size:
            self.count += result.untyped_storage().data_ptr() not in known
        return result


@pytest.mark.parametrize("with_entropy", [False, True])
def test_nothing_as_large_as_the_logits_is_made_but_their_gradient(with_entropy: bool) -> None:
    logits, tokens = some_logits()
    logits.requires_grad_()
    with NewTensors(logits.numel()) as made:
        values = [token_logprobs(logits, tokens, 1.0, 4)]
        if with_entropy:
            values = list(token_logprobs_and_entropy(logits, tokens, 1.0, 4))
        assert made.count == 0
        torch.stack([value.sum() for value in values]).sum().backward()
        assert made.count == 1
    with NewTensors(logits.numel()) as made:
        dense_logprobs(logits, tokens, 1.0)
        assert made.count > 0
