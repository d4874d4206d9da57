"""Log-probabilities and entropies of logits, without a second tensor of their size.

Where hidden states and the head's weight are at hand, `gdpo.head_logprobs` needs no logits at all.

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
        rows_per_chunk: positions in a chunk; the result does not depend on it.

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
        logprob_BT = torch.empty(tokens_BT.shape, dtype=dtype, device=logits_BTV.device)
        logsumexp_BT = torch.empty_like(logprob_BT)
        entropy_BT = torch.zeros_like(logprob_BT)
        for block in _blocks(tokens_BT, rows_per_chunk):
            logprob_BT[block], logsumexp_BT[block], entropy_BT[block], _ = chunk_statistics(
                _scaled(logits_BTV[block], temperature, dtype), tokens_BT[block], with_entropy
            )
        ctx.save_for_backward(logits_BTV, tokens_BT, logsumexp_BT, entropy_BT)
        ctx.temperature, ctx.rows_per_chunk = temperature, rows_per_chunk
        if not with_entropy:
            ctx.mark_non_differentiable(entropy_BT)
        ctx.with_entropy = with_entropy
        return logprob_BT, entropy_BT

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_BT: Tensor, entropy_grad_BT: Tensor
    ) -> tuple[Tensor, None, None, None, None]:
        """The gradients with respect to x = logits / T; those of the logits are 1 / T of them.

        d log p(token) / dx = onehot(token) - p;  dH / dx = -p (log p + H)
        """
        logits_BTV, tokens_BT, logsumexp_BT, entropy_BT = ctx.saved_tensors
        grad_BTV = torch.empty_like(logits_BTV)
        for block in _blocks(tokens_BT, ctx.rows_per_chunk):
            scaled_btV = _scaled(logits_BTV[block], ctx.temperature, logsumexp_BT.dtype)
            grad_BTV[block] = chunk_gradient(
                scaled_btV.sub_(logsumexp_BT[block][..., None]),
                tokens_BT[block],
                grad_BT[block] / ctx.temperature,
                entropy_BT[block],
                entropy_grad_BT[block] / ctx.temperature if ctx.with_entropy else None,
            )
        return grad_BTV, None, None, None, None


# The functions of a chunk reuse its memory as they go, and are functions so that it is free before
# the next one comes.


def _scaled(logits_btV: Tensor, temperature: float, dtype: torch.dtype) -> Tensor:
    """A copy of a chunk of logits, over the temperature."""
    return logits_btV.to(dtype, copy=True).div_(temperature)


def chunk_statistics(
    scaled_btV: Tensor, tokens_bt: Tensor, with_entropy: bool
) -> tuple[Tensor, Tensor, Tensor | float, Tensor]:
    """Log-probability of the tokens, logsumexp, entropy (0 if not wanted), and a sum [...].

    A chunk [..., V] of logits, float32 or float64, over the temperature; tokens [...]. The chunk
    becomes exp(x - the largest x), which over that sum is p.
    """
    top_bt1 = scaled_btV.amax(dim=-1, keepdim=True)
    below_top_btV = scaled_btV.sub_(top_bt1)
    chosen_bt = below_top_btV.gather(-1, tokens_bt[..., None])[..., 0]
    exp_btV = below_top_btV.exp_()
    sum_bt = exp_btV.sum(dim=-1)
    log_sum_bt = sum_bt.log()
    entropy_bt: Tensor | float = 0.0
    if with_entropy:
        # -sum_v p_v log p_v with p = e / sum and log p = log e - log sum.
        entropy_bt = log_sum_bt + torch.special.entr(exp_btV).sum(dim=-1) / sum_bt
    return chosen_bt - log_sum_bt, top_bt1[..., 0] + log_sum_bt, entropy_bt, sum_bt


def chunk_gradient(
    log_p_btV: Tensor,
    tokens_bt: Tensor,
    grad_bt: Tensor,
    entropy_bt: Tensor,
    entropy_grad_bt: Tensor | None,
) -> Tensor:
    """Compute g (onehot(token) - p) - h p (log p + H); uses up the chunk [..., V] of log p."""
    if entropy_grad_bt is None:
        result_btV = log_p_btV.exp_().mul_(-grad_bt[..., None])
    else:
        p_btV = log_p_btV.exp()
        factor_btV = log_p_btV.clamp_(min=SMALLEST_LOG).add_(entropy_bt[..., None])
        factor_btV.mul_(-entropy_grad_bt[..., None]).sub_(grad_bt[..., None])
        result_btV = p_btV.mul_(factor_btV)
    return result_btV.scatter_add_(-1, tokens_bt[..., None], grad_bt[..., None])


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
