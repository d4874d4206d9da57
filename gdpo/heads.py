"""Log-probabilities and entropies from hidden states: the head and the softmax in one.

Shapes: N positions, H hidden units, V vocabulary. Nothing of [N, V] ever exists, in any type: the
logits of a chunk of positions are computed, used up and, for the gradient, computed again.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gdpo.logprobs import chunk_gradient, chunk_statistics

_CHUNK_BYTES = {"cpu": 64 << 20}
_CHUNK_BYTES_OF_A_GPU = 1 << 30
_MIN_ROWS = 64


@dataclass(frozen=True, eq=False)
class Head:
    """What makes logits of hidden states: cap(scale * (W h + b)), cap(x) = c tanh(x / c)."""

    weight_VH: Tensor
    bias_V: Tensor | None = None
    scale: float = 1.0
    """A factor on the logits, as Cohere's `logit_scale` or one over Granite's `logits_scaling`."""
    softcap: float | None = None
    """The limit c on their size, as Gemma 2's `final_logit_softcapping`; None for no limit."""


def head_logprobs(
    hidden_NH: Tensor,
    head: Head,
    tokens_N: Tensor,
    *,
    temperature: float = 1.0,
    rows_per_chunk: int | None = None,
) -> Tensor:
    """Log-probability [N] of each token under softmax(logits / temperature), in float32.

    As `gdpo.token_logprobs` of the head's logits, without the logits. It is differentiable once,
    with respect to the hidden states, the weight and the bias.

    Args:
        hidden_NH: [N, H]; row n predicts tokens_N[n].
        head: weight [V, H] of the type of the hidden states.
        tokens_N: integer [N], each in 0..V-1.
        temperature: that of the sampling, so that the result compares with the actor's.
        rows_per_chunk: positions in a chunk; None for as many as keep a chunk's logits small.

    Raises ValueError for shapes that do not match or a temperature that is not positive.
    """
    return _apply(hidden_NH, head, tokens_N, temperature, rows_per_chunk, with_entropy=False)[0]


def head_logprobs_and_entropy(
    hidden_NH: Tensor,
    head: Head,
    tokens_N: Tensor,
    *,
    temperature: float = 1.0,
    rows_per_chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`head_logprobs`, and the entropy [N] in nats at each position, both with a gradient."""
    return _apply(hidden_NH, head, tokens_N, temperature, rows_per_chunk, with_entropy=True)


def _apply(
    hidden_NH: Tensor,
    head: Head,
    tokens_N: Tensor,
    temperature: float,
    rows_per_chunk: int | None,
    with_entropy: bool,
) -> tuple[Tensor, Tensor]:
    if (
        hidden_NH.dim() != 2
        or tokens_N.shape != hidden_NH.shape[:1]
        or head.weight_VH.shape[1:] != hidden_NH.shape[1:]
    ):
        raise ValueError(
            f"hidden has shape {tuple(hidden_NH.shape)}, tokens {tuple(tokens_N.shape)}, the "
            f"head's weight {tuple(head.weight_VH.shape)}: give [N, H], [N] and [V, H]"
        )
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}: give a positive number")
    if rows_per_chunk is None:
        rows_per_chunk = _rows_per_chunk(len(head.weight_VH), hidden_NH.device)
    if rows_per_chunk < 1:
        raise ValueError(f"rows_per_chunk is {rows_per_chunk}: give at least 1")
    form = _Form(head.scale, head.softcap, temperature, rows_per_chunk, with_entropy)
    result: tuple[Tensor, Tensor] = _HeadStatistics.apply(  # type: ignore[no-untyped-call]
        hidden_NH, head.weight_VH, head.bias_V, tokens_N.long(), form
    )
    return result


def _rows_per_chunk(vocab_size: int, device: torch.device) -> int:
    """Rows whose float32 logits are small beside everything else, and many enough for a matmul."""
    limit = _CHUNK_BYTES.get(device.type, _CHUNK_BYTES_OF_A_GPU)
    return max(_MIN_ROWS, limit // (4 * vocab_size))


@dataclass(frozen=True)
class _Form:
    scale: float
    softcap: float | None
    temperature: float
    rows_per_chunk: int
    with_entropy: bool

    def chunks(self, num_rows: int) -> list[slice]:
        step = self.rows_per_chunk
        return [slice(start, start + step) for start in range(0, num_rows, step)]

    def logits(self, hidden_nH: Tensor, weight_VH: Tensor, bias_V: Tensor | None) -> Tensor:
        """Scaled and capped logits over the temperature, float32 or float64."""
        logits_nV = torch.nn.functional.linear(hidden_nH, weight_VH, bias_V)
        logits_nV = logits_nV.to(_accurate(logits_nV.dtype))
        if self.softcap is None:
            factor = self.scale / self.temperature
            return logits_nV if factor == 1 else logits_nV.mul_(factor)
        capped_nV = logits_nV.mul_(self.scale / self.softcap).tanh_()
        return capped_nV.mul_(self.softcap / self.temperature)

    def logits_gradient(self, grad_nV: Tensor, slope_nV: Tensor | None) -> Tensor:
        """From d / d (what `logits` returns) to d / d (what the head's matmul returned)."""
        if slope_nV is not None:
            grad_nV.mul_(slope_nV)
        factor = self.scale / self.temperature
        return grad_nV if factor == 1 else grad_nV.mul_(factor)

    def slope(self, logits_nV: Tensor) -> Tensor | None:
        """1 - tanh^2 where there is a cap."""
        if self.softcap is None:
            return None
        tanh_nV = logits_nV * (self.temperature / self.softcap)
        return tanh_nV.square_().neg_().add_(1)


class _HeadStatistics(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        tokens_N: Tensor,
        form: _Form,
    ) -> tuple[Tensor, Tensor]:
        logprob_N = hidden_NH.new_zeros(len(tokens_N), dtype=_accurate(hidden_NH.dtype))
        logsumexp_N, entropy_N = torch.zeros_like(logprob_N), torch.zeros_like(logprob_N)
        for chunk in form.chunks(len(tokens_N)):
            logprob_N[chunk], logsumexp_N[chunk], entropy_N[chunk] = chunk_statistics(
                form.logits(hidden_NH[chunk], weight_VH, bias_V), tokens_N[chunk], form.with_entropy
            )
        ctx.save_for_backward(hidden_NH, weight_VH, bias_V, tokens_N, logsumexp_N, entropy_N)
        ctx.form = form
        if not form.with_entropy:
            ctx.mark_non_differentiable(entropy_N)
        return logprob_N, entropy_N

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_N: Tensor, entropy_grad_N: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        hidden_NH, weight_VH, bias_V, tokens_N, logsumexp_N, entropy_N = ctx.saved_tensors
        form: _Form = ctx.form
        of_hidden, of_weight, of_bias = ctx.needs_input_grad[:3]
        hidden_grad_NH = torch.zeros_like(hidden_NH) if of_hidden else None
        # Chunks are added up in float32: in bfloat16 the later ones would be lost.
        accurate = _accurate(weight_VH.dtype)
        weight_grad_VH = torch.zeros_like(weight_VH, dtype=accurate) if of_weight else None
        bias_grad_V = None if not of_bias else torch.zeros_like(bias_V, dtype=accurate)
        for chunk in form.chunks(len(tokens_N)):
            logits_nV = form.logits(hidden_NH[chunk], weight_VH, bias_V)
            slope_nV = form.slope(logits_nV)
            grad_nV = chunk_gradient(
                logits_nV.sub_(logsumexp_N[chunk][:, None]),
                tokens_N[chunk],
                grad_N[chunk],
                entropy_N[chunk],
                entropy_grad_N[chunk] if form.with_entropy else None,
            )
            grad_nV = form.logits_gradient(grad_nV, slope_nV).to(hidden_NH.dtype)
            if hidden_grad_NH is not None:
                torch.mm(grad_nV, weight_VH, out=hidden_grad_NH[chunk])
            if weight_grad_VH is not None:
                _add_product(weight_grad_VH, grad_nV.t(), hidden_NH[chunk])
            if bias_grad_V is not None:
                bias_grad_V += grad_nV.sum(0, dtype=accurate)
        return (
            hidden_grad_NH,
            None if weight_grad_VH is None else weight_grad_VH.to(weight_VH.dtype),
            None if bias_grad_V is None or bias_V is None else bias_grad_V.to(bias_V.dtype),
            None,
            None,
        )


def _add_product(sum_VH: Tensor, left_Vn: Tensor, right_nH: Tensor) -> None:
    if sum_VH.dtype == left_Vn.dtype:
        sum_VH.addmm_(left_Vn, right_nH)
    else:
        sum_VH += left_Vn @ right_nH


def _accurate(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
