"""Attention over a tree of segments on CPUs, without a mask and without a copy of keys.

A segment attends causally to itself, and what stands behind it in the tree attends to all of it;
the parts are merged by their log-sum-exps, as in cascade inference (FlashInfer, arXiv 2501.01005).
Shapes: [1, heads, N, D], keys and values possibly of fewer heads.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from learner.packing.layout import Layout

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def cascade_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float
) -> Tensor:
    """Attention [1, heads, N, D] of each token to its ancestors and those before it."""
    result: Tensor = _Cascade.apply(query, key, value, layout, scale)  # type: ignore[no-untyped-call]
    return result


class _Cascade(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float
    ) -> Tensor:
        out = torch.empty_like(query)
        # Kernels give it in float32, whatever they compute in.
        lse = query.new_empty(query.shape[:3], dtype=torch.float32)
        for start, stop, family_stop, begins in layout.segments():
            own, family = slice(start, stop), slice(stop, family_stop)
            keys, values = key[:, :, own], value[:, :, own]
            part, part_lse = _forward(query[:, :, own], keys, values, 0.0, True, scale=scale)
            _merge(out, lse, own, part, part_lse, begins=begins)
            if family_stop > stop:
                part, part_lse = _forward(
                    query[:, :, family], keys, values, 0.0, False, scale=scale
                )
                _merge(out, lse, family, part, part_lse, begins=begins)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.layout, ctx.scale = layout, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        # With the merged output and log-sum-exp, each part's gradient is that of the whole.
        query, key, value, out, lse = ctx.saved_tensors
        grads = torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)

        def add(queries: slice, keys: slice, causal: bool) -> None:
            parts = _backward(
                grad[:, :, queries],
                query[:, :, queries],
                key[:, :, keys],
                value[:, :, keys],
                out[:, :, queries],
                lse[:, :, queries],
                0.0,
                causal,
                scale=ctx.scale,
            )
            for sum_, part, where in zip(grads, parts, (queries, keys, keys), strict=True):
                sum_[:, :, where] += part

        for start, stop, family_stop, _ in ctx.layout.segments():
            own = slice(start, stop)
            add(own, own, True)
            if family_stop > stop:
                add(slice(stop, family_stop), own, False)
        return *grads, None, None


def _merge(
    out: Tensor, lse: Tensor, where: slice, part: Tensor, part_lse: Tensor, *, begins: bool
) -> None:
    """Take another part of the keys into the output at ``where``, or the first one."""
    if begins:
        out[:, :, where] = part
        lse[:, :, where] = part_lse
        return
    old = lse[:, :, where]
    new = torch.logaddexp(old, part_lse)
    kept = (old - new).exp_().unsqueeze(-1)
    added = (part_lse - new).exp_().unsqueeze(-1)
    out[:, :, where] = out[:, :, where] * kept + part * added
    lse[:, :, where] = new
