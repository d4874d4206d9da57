"""Log-probabilities of given tokens, without a second tensor of the size of the logits.

Shapes: B sequences, T token positions, V vocabulary.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


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
    if logits_BTV.dim() != 3 or tokens_BT.shape != logits_BTV.shape[:2]:
        raise ValueError(
            f"logits has shape {tuple(logits_BTV.shape)}, tokens {tuple(tokens_BT.shape)}: "
            "give logits [B, T, V] and tokens [B, T]"
        )
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}: give a positive number")
    if rows_per_chunk < 1:
        raise ValueError(f"rows_per_chunk is {rows_per_chunk}: give at least 1")
    result: Tensor = _TokenLogprobs.apply(  # type: ignore[no-untyped-call]
        logits_BTV, tokens_BT.long(), temperature, rows_per_chunk
    )
    return result


class _TokenLogprobs(torch.autograd.Function):
    """A function of its own, because autograd would keep every chunk's softmax for backward."""

    @staticmethod
    def forward(
        ctx: Any, logits_BTV: Tensor, tokens_BT: Tensor, temperature: float, rows_per_chunk: int
    ) -> Tensor:
        dtype = torch.promote_types(logits_BTV.dtype, torch.float32)
        logsumexp_BT = torch.empty(tokens_BT.shape, dtype=dtype, device=logits_BTV.device)
        chosen_BT = torch.empty_like(logsumexp_BT)
        for block in _blocks(tokens_BT, rows_per_chunk):
            scaled_btV = logits_BTV[block].to(dtype) / temperature
            logsumexp_BT[block] = scaled_btV.logsumexp(dim=-1)
            chosen_BT[block] = scaled_btV.gather(-1, tokens_BT[block][..., None])[..., 0]
        ctx.save_for_backward(logits_BTV, tokens_BT, logsumexp_BT)
        ctx.temperature, ctx.rows_per_chunk = temperature, rows_per_chunk
        return chosen_BT - logsumexp_BT

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BT: Tensor) -> tuple[Tensor, None, None, None]:
        """d log p(token) / d logits = (onehot(token) - softmax(logits / T)) / T."""
        logits_BTV, tokens_BT, logsumexp_BT = ctx.saved_tensors
        grad_BTV = torch.empty_like(logits_BTV)
        for block in _blocks(tokens_BT, ctx.rows_per_chunk):
            scaled_btV = logits_BTV[block].to(logsumexp_BT.dtype) / ctx.temperature
            grad_bt1 = grad_BT[block][..., None] / ctx.temperature
            softmax_btV = scaled_btV.sub_(logsumexp_BT[block][..., None]).exp_()
            block_grad_btV = softmax_btV.mul_(-grad_bt1)
            block_grad_btV.scatter_add_(-1, tokens_BT[block][..., None], grad_bt1)
            grad_BTV[block] = block_grad_btV.to(logits_BTV.dtype)
        return grad_BTV, None, None, None


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
