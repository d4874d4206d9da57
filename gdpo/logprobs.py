"""Log-probabilities and entropies, without a second tensor of the size of the logits.

Shapes: B sequences, T token positions, V vocabulary.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# exp of it is 0 in every dtype, and 0 times it is 0, where 0 times -inf would be NaN.
SMALLEST_LOG = -1e4


def token_logprobs(
    logits_BTV: Tensor, tokens_BT: Tensor, temperature: float = 1.0, rows_per_chunk: int = 256
) -> Tensor:
    """Log-probability [B, T] of each token under softmax(logits / temperature), in float32.

        log p(token) = x[token] - logsumexp(x),  x = logits / temperature

    Works through `rows_per_chunk` positions at a time, forward and backward, so that beyond the
    logits and their gradient it needs rows_per_chunk * V floats, not B * T * V. float64 logits
    stay float64. It is differentiable once.

    Args:
        logits_BTV: [B, T, V]; position t predicts tokens_BT[:, t]: shift them before.
        tokens_BT: integer [B, T], each in 0..V-1, at masked positions too.
        temperature: that of the sampling, so that the result compares with the actor's.

    Raises ValueError for shapes that do not match or a temperature that is not positive.
    """
    return _apply(logits_BTV, tokens_BT, temperature, rows_per_chunk, with_entropy=False)[0]


def token_logprobs_and_entropy(
    logits_BTV: Tensor, tokens_BT: Tensor, temperature: float = 1.0, rows_per_chunk: int = 256
) -> tuple[Tensor, Tensor]:
    """What `token_logprobs` and `token_entropy` return, in one pass and with one gradient.

    Apart, each would make a gradient of the size of the logits.
    """
    return _apply(logits_BTV, tokens_BT, temperature, rows_per_chunk, with_entropy=True)


def token_entropy(
    logits_BTV: Tensor, temperature: float = 1.0, rows_per_chunk: int = 256
) -> Tensor:
    """Entropy [B, T], in nats, of softmax(logits / temperature), in chunks as `token_logprobs`.

    H = -sum_v p_v log p_v
    """
    tokens_BT = torch.zeros(logits_BTV.shape[:2], dtype=torch.long, device=logits_BTV.device)
    return _apply(logits_BTV, tokens_BT, temperature, rows_per_chunk, with_entropy=True)[1]


def _apply(
    logits_BTV: Tensor,
    tokens_BT: Tensor,
    temperature: float,
    rows_per_chunk: int,
    with_entropy: bool,
) -> tuple[Tensor, Tensor]:
    if logits_BTV.dim() != 3 or tokens_BT.shape != logits_BTV.shape[:2]:
        raise ValueError(
            f"logits has shape {tuple(logits_BTV.shape)}, tokens {tuple(tokens_BT.shape)}: "
            "give logits [B, T, V] and tokens [B, T]"
        )
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}: give a positive number")
    if rows_per_chunk < 1:
        raise ValueError(f"rows_per_chunk is {rows_per_chunk}: give at least 1")
    result: tuple[Tensor, Tensor] = _TokenStatistics.apply(  # type: ignore[no-untyped-call]
        logits_BTV, tokens_BT.long(), temperature, rows_per_chunk, with_entropy
    )
    return result


class _TokenStatistics(torch.autograd.Function):
    """A function of its own, because autograd would keep every chunk's softmax for backward."""

    @staticmethod
    def forward(
        ctx: Any,
        logits_BTV: Tensor,
        tokens_BT: Tensor,
        temperature: float,
        rows_per_chunk: int,
        with_entropy: bool,
    ) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(logits_BTV.dtype, torch.float32)
        logsumexp_BT = torch.empty(tokens_BT.shape, dtype=dtype, device=logits_BTV.device)
        chosen_BT = torch.empty_like(logsumexp_BT)
        entropy_BT = torch.zeros_like(logsumexp_BT)
        for block in _blocks(tokens_BT, rows_per_chunk):
            scaled_btV = logits_BTV[block].to(dtype) / temperature
            logsumexp_BT[block] = scaled_btV.logsumexp(dim=-1)
            chosen_BT[block] = scaled_btV.gather(-1, tokens_BT[block][..., None])[..., 0]
            if with_entropy:
                log_p_btV = scaled_btV.sub_(logsumexp_BT[block][..., None])
                entropy_BT[block] = -_expectation(log_p_btV.exp(), log_p_btV)
        ctx.save_for_backward(logits_BTV, tokens_BT, logsumexp_BT, entropy_BT)
        ctx.temperature, ctx.rows_per_chunk = temperature, rows_per_chunk
        if not with_entropy:
            ctx.mark_non_differentiable(entropy_BT)
        ctx.with_entropy = with_entropy
        return chosen_BT - logsumexp_BT, entropy_BT

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_BT: Tensor, entropy_grad_BT: Tensor
    ) -> tuple[Tensor, None, None, None, None]:
        """The gradients by x = logits / T, which by the logits are 1 / T of it.

        d log p(token) / dx = onehot(token) - p;  dH / dx = -p (log p + H)
        """
        logits_BTV, tokens_BT, logsumexp_BT, entropy_BT = ctx.saved_tensors
        grad_BTV = torch.empty_like(logits_BTV)
        for block in _blocks(tokens_BT, ctx.rows_per_chunk):
            scaled_btV = logits_BTV[block].to(logsumexp_BT.dtype) / ctx.temperature
            grad_bt1 = grad_BT[block][..., None] / ctx.temperature
            log_p_btV = scaled_btV.sub_(logsumexp_BT[block][..., None])
            if ctx.with_entropy:
                entropy_grad_bt1 = entropy_grad_BT[block][..., None] / ctx.temperature
                p_btV = log_p_btV.exp()
                weight_btV = log_p_btV.clamp_(min=SMALLEST_LOG).add_(entropy_BT[block][..., None])
                block_grad_btV = p_btV.mul_(weight_btV.mul_(-entropy_grad_bt1).sub_(grad_bt1))
            else:
                block_grad_btV = log_p_btV.exp_().mul_(-grad_bt1)
            block_grad_btV.scatter_add_(-1, tokens_BT[block][..., None], grad_bt1)
            grad_BTV[block] = block_grad_btV.to(logits_BTV.dtype)
        return grad_BTV, None, None, None, None


def _expectation(p_btV: Tensor, log_p_btV: Tensor) -> Tensor:
    """sum_v p_v log p_v, in which an impossible token counts 0; both arguments are used up."""
    return p_btV.mul_(log_p_btV.clamp_(min=SMALLEST_LOG)).sum(dim=-1)


def _blocks(tokens_BT: Tensor, rows_per_chunk: int) -> Iterator[tuple[slice, slice]]:
    """Cut [B, T] into blocks of at most rows_per_chunk positions.

    Blocks rather than rows of a flattened tensor: flattening shifted logits would copy them.
    """
    num_sequences, num_tokens = tokens_BT.shape
    step_t = max(1, min(num_tokens, rows_per_chunk))
    step_b = max(1, rows_per_chunk // step_t)
    for b in range(0, num_sequences, step_b):
        for t in range(0, num_tokens, step_t):
            yield slice(b, b + step_b), slice(t, t + step_t)
