"""Log-probabilities and entropies from hidden states: the head and the softmax in one.

Shapes: N positions, H hidden units, V vocabulary. Nothing of [N, V] ever exists, in any type: the
logits of a chunk of positions are computed and used up. For the gradient they are computed again,
or, where the loss says early enough what it will ask for, not even that.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gdpo.logprobs import chunk_gradient, chunk_statistics

_CHUNK_BYTES = {"cpu": 128 << 20}
_CHUNK_BYTES_OF_A_GPU = 1 << 30
_MIN_ROWS = 256
"""Each chunk reads the whole weight and adds to all of its gradient: few rows do not pay."""
_EARLY_WEIGHTS = 1 << 20
"""Weights of a head below which its products cost less than one more gradient of the loss."""
_CLOSE = 1e-4
"""Relative difference up to which a gradient counts as the one that was announced."""

_Entropy = Literal["none", "measured", "learned"]
LossGradient = Callable[[Tensor], Tensor]
"""From log-probabilities [N], of which not all need be known yet, to the gradient [N] of the loss.

A token's gradient may depend on its own log-probability, and on no other.
"""


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
    loss_gradient: LossGradient | None = None,
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
        loss_gradient: what the backward pass is going to bring. With it all gradients are made of
            the logits of the forward pass, a quarter less to compute. If the backward pass brings
            something else, they are computed from that.

    Raises ValueError for shapes that do not match or a temperature that is not positive.
    """
    form = _Form.of(head, temperature, hidden_NH, rows_per_chunk, entropy="none")
    return _apply(hidden_NH, head, tokens_N, form, loss_gradient)[0]


def head_logprobs_and_entropy(
    hidden_NH: Tensor,
    head: Head,
    tokens_N: Tensor,
    *,
    temperature: float = 1.0,
    rows_per_chunk: int | None = None,
    entropy_gradient: bool = True,
    loss_gradient: LossGradient | None = None,
) -> tuple[Tensor, Tensor]:
    """`head_logprobs`, and the entropy [N] in nats at each position.

    The entropy has a gradient too, unless ``entropy_gradient`` is false; ``loss_gradient`` is for
    that case.
    """
    if entropy_gradient and loss_gradient is not None:
        raise ValueError("loss_gradient knows of no entropy: give entropy_gradient=False with it")
    kind: _Entropy = "learned" if entropy_gradient else "measured"
    form = _Form.of(head, temperature, hidden_NH, rows_per_chunk, entropy=kind)
    return _apply(hidden_NH, head, tokens_N, form, loss_gradient)


def _apply(
    hidden_NH: Tensor,
    head: Head,
    tokens_N: Tensor,
    form: "_Form",
    loss_gradient: LossGradient | None,
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
    # Asked here: within the function below gradients are always off.
    if head.weight_VH.numel() < _EARLY_WEIGHTS or not torch.is_grad_enabled():
        loss_gradient = None
    result: tuple[Tensor, Tensor] = _HeadStatistics.apply(  # type: ignore[no-untyped-call]
        hidden_NH, head.weight_VH, head.bias_V, tokens_N.long(), form, loss_gradient
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
    entropy: _Entropy

    @classmethod
    def of(
        cls,
        head: Head,
        temperature: float,
        hidden_NH: Tensor,
        rows_per_chunk: int | None,
        *,
        entropy: _Entropy,
    ) -> Self:
        """Raises ValueError for a temperature or a number of rows that is not positive."""
        if not temperature > 0:
            raise ValueError(f"temperature is {temperature}: give a positive number")
        if rows_per_chunk is None:
            rows_per_chunk = _rows_per_chunk(len(head.weight_VH), hidden_NH.device)
        if rows_per_chunk < 1:
            raise ValueError(f"rows_per_chunk is {rows_per_chunk}: give at least 1")
        return cls(head.scale, head.softcap, temperature, rows_per_chunk, entropy)

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
        loss_gradient: LossGradient | None,
    ) -> tuple[Tensor, Tensor]:
        logprob_N = hidden_NH.new_zeros(len(tokens_N), dtype=_accurate(hidden_NH.dtype))
        logsumexp_N, entropy_N = torch.zeros_like(logprob_N), torch.zeros_like(logprob_N)
        ctx.form, ctx.early, ctx.announced_N = form, None, None
        if form.entropy != "learned":
            ctx.mark_non_differentiable(entropy_N)
        if loss_gradient is not None and any(ctx.needs_input_grad[:3]):
            ctx.early = _Gradients.zero(hidden_NH, weight_VH, bias_V, ctx.needs_input_grad)
            ctx.announced_N = torch.zeros_like(logprob_N)
        for chunk in form.chunks(len(tokens_N)):
            logits_nV = form.logits(hidden_NH[chunk], weight_VH, bias_V)
            slope_nV = None if ctx.early is None else form.slope(logits_nV)
            logprob_N[chunk], logsumexp_N[chunk], entropy_N[chunk], sum_n = chunk_statistics(
                logits_nV, tokens_N[chunk], form.entropy != "none"
            )
            if ctx.early is None or loss_gradient is None:
                continue
            ctx.announced_N[chunk] = grad_n = loss_gradient(logprob_N)[chunk]
            grad_nV = logits_nV.mul_((-grad_n / sum_n)[:, None])
            grad_nV.scatter_add_(-1, tokens_N[chunk, None], grad_n[:, None])
            ctx.early.add(chunk, form.logits_gradient(grad_nV, slope_nV), hidden_NH, weight_VH)
        ctx.save_for_backward(hidden_NH, weight_VH, bias_V, tokens_N, logsumexp_N, entropy_N)
        return logprob_N, entropy_N

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_N: Tensor, entropy_grad_N: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None, None]:
        hidden_NH, weight_VH, bias_V, tokens_N, logsumexp_N, entropy_N = ctx.saved_tensors
        form: _Form = ctx.form
        early, ctx.early = ctx.early, None
        if early is not None and torch.allclose(grad_N, ctx.announced_N, rtol=_CLOSE, atol=0):
            return *early.of_types(weight_VH, bias_V), None, None, None
        sums = _Gradients.zero(hidden_NH, weight_VH, bias_V, ctx.needs_input_grad)
        for chunk in form.chunks(len(tokens_N)):
            logits_nV = form.logits(hidden_NH[chunk], weight_VH, bias_V)
            slope_nV = form.slope(logits_nV)
            grad_nV = chunk_gradient(
                logits_nV.sub_(logsumexp_N[chunk][:, None]),
                tokens_N[chunk],
                grad_N[chunk],
                entropy_N[chunk],
                entropy_grad_N[chunk] if form.entropy == "learned" else None,
            )
            sums.add(chunk, form.logits_gradient(grad_nV, slope_nV), hidden_NH, weight_VH)
        return *sums.of_types(weight_VH, bias_V), None, None, None


@dataclass(frozen=True, slots=True, eq=False)
class _Gradients:
    """Sums over chunks, None for what needs no gradient."""

    hidden_NH: Tensor | None
    weight_VH: Tensor | None
    """float32, as is that of the bias: in bfloat16 later chunks would be lost."""
    bias_V: Tensor | None

    @classmethod
    def zero(
        cls, hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, needed: Sequence[bool]
    ) -> Self:
        """Nothing yet, for those of the three that are needed."""
        accurate = _accurate(weight_VH.dtype)
        return cls(
            torch.zeros_like(hidden_NH) if needed[0] else None,
            torch.zeros_like(weight_VH, dtype=accurate) if needed[1] else None,
            torch.zeros_like(bias_V, dtype=accurate) if bias_V is not None and needed[2] else None,
        )

    def add(self, chunk: slice, grad_nV: Tensor, hidden_NH: Tensor, weight_VH: Tensor) -> None:
        """Add what comes of the gradient of a chunk's logits."""
        grad_nV = grad_nV.to(hidden_NH.dtype)
        if self.hidden_NH is not None:
            torch.mm(grad_nV, weight_VH, out=self.hidden_NH[chunk])
        if self.weight_VH is not None:
            _add_product(self.weight_VH, grad_nV.t(), hidden_NH[chunk])
        if self.bias_V is not None:
            self.bias_V.add_(grad_nV.sum(0, dtype=self.bias_V.dtype))

    def of_types(
        self, weight_VH: Tensor, bias_V: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """In the types of weight and bias."""
        return (
            self.hidden_NH,
            None if self.weight_VH is None else self.weight_VH.to(weight_VH.dtype),
            None if self.bias_V is None or bias_V is None else self.bias_V.to(bias_V.dtype),
        )


def _add_product(sum_VH: Tensor, left_Vn: Tensor, right_nH: Tensor) -> None:
    if sum_VH.dtype == left_Vn.dtype:
        sum_VH.addmm_(left_Vn, right_nH)
    else:
        sum_VH += left_Vn @ right_nH


def _accurate(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
