"""Kernels of attention over a packed row, behind transformers' own interface.

Shapes: N tokens, H heads, K heads of keys and values, D numbers each.
"""

import inspect
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

from benchmarks.gpu.report import Skip
from benchmarks.gpu.rows import Row

Kernel = Callable[[Tensor, Tensor, Tensor, Row, float], Tensor]
"""q [N, H, D], k and v [N, K, D], the row and the scale to [N, H, D]."""


def varlen(q: Tensor, k: Tensor, v: Tensor, row: Row, scale: float) -> Tensor:
    """Torch's own flash attention."""
    attend: Any = import_module("torch.nn.attention.varlen").varlen_attn
    known = inspect.signature(attend).parameters
    # How it is told the mask, and that keys have fewer heads, changed between torch 2.10 and 2.13.
    options: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in known else {}
    if not options:
        options = {"is_causal": True}
    if "scale" in known:
        options["scale"] = scale
    if "enable_gqa" in known:
        options["enable_gqa"] = True
    else:
        k, v = repeated(k, q), repeated(v, q)
    index, (queries, keys), (longest_q, longest_k) = row.key_index, row.offsets, longest(row)
    return attend(q, k[index], v[index], queries, keys, longest_q, longest_k, **options)  # type: ignore[no-any-return]


def flash2(q: Tensor, k: Tensor, v: Tensor, row: Row, scale: float) -> Tensor:
    """The package flash-attn."""
    attend: Any = import_module("flash_attn").flash_attn_varlen_func
    index, (queries, keys), (longest_q, longest_k) = row.key_index, row.offsets, longest(row)
    return attend(  # type: ignore[no-any-return]
        *(q, k[index], v[index], queries, keys, longest_q, longest_k),
        softmax_scale=scale,
        causal=True,
    )


def flash4(q: Tensor, k: Tensor, v: Tensor, row: Row, scale: float) -> Tensor:
    """The package flash-attn-4."""
    attend: Any = import_module("flash_attn.cute").flash_attn_varlen_func
    index, (queries, keys), (longest_q, longest_k) = row.key_index, row.offsets, longest(row)
    known = inspect.signature(attend).parameters
    sizes = {"max_seqlen_q": longest_q, "max_seqlen_k": longest_k}
    result = attend(
        q,
        k[index],
        v[index],
        cu_seqlens_q=queries,
        cu_seqlens_k=keys,
        **{name: size for name, size in sizes.items() if name in known},
        softmax_scale=scale,
        causal=True,
    )
    return result[0] if isinstance(result, tuple) else result  # type: ignore[no-any-return]


def sdpa(q: Tensor, k: Tensor, v: Tensor, row: Row, scale: float) -> Tensor:
    """A loop over segments."""
    lower_right = import_module("torch.nn.attention.bias").causal_lower_right
    k, v = repeated(k, q), repeated(v, q)
    parts = []
    for index, (start, stop, parent) in enumerate(row.segments):
        ranges = row.keys(index)
        query = q[start:stop].transpose(0, 1)[None]
        key, value = (torch.cat([x[a:b] for a, b in ranges]).transpose(0, 1)[None] for x in (k, v))
        mask = lower_right(query.shape[2], key.shape[2]) if parent >= 0 else None
        out = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, scale=scale
        )
        parts.append(out[0].transpose(0, 1))
    return torch.cat(parts)


_compiled: dict[str, Any] = {}


def flex(q: Tensor, k: Tensor, v: Tensor, row: Row, scale: float) -> Tensor:
    """A compiled kernel with a mask of blocks."""
    module: Any = import_module("torch.nn.attention.flex_attention")
    if not _compiled:
        _compiled["attend"] = torch.compile(module.flex_attention, dynamic=False)
    if _compiled.get("row") is not row:
        own, parent = row.owners

        def sees(_: Tensor, __: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return ((own[i] == own[j]) & (i >= j)) | (parent[i] == own[j])

        size = len(own)
        _compiled["mask"] = module.create_block_mask(sees, None, None, size, size, own.device)
        _compiled["row"] = row
    query, key, value = (x.transpose(0, 1)[None].contiguous() for x in (q, k, v))
    out = _compiled["attend"](
        query, key, value, block_mask=_compiled["mask"], scale=scale, enable_gqa=True
    )
    return out[0].transpose(0, 1)  # type: ignore[no-any-return]


KERNELS: dict[str, Kernel] = {
    "varlen": varlen,
    "flash2": flash2,
    "flash4": flash4,
    "sdpa": sdpa,
    "flex": flex,
}


def repeated(x: Tensor, q: Tensor) -> Tensor:
    """Give every query head a head of keys of its own."""
    return x.repeat_interleave(q.shape[1] // x.shape[1], dim=1)


def longest(row: Row) -> tuple[int, int]:
    """Return the largest numbers of queries and of keys of a segment."""
    queries, keys = row.lengths
    return max(queries), max(keys)


def reference(q: Tensor, k: Tensor, v: Tensor, row: Row, scale: float) -> Tensor:
    """The same from the full mask, for short rows."""
    query, key, value = (x.transpose(0, 1)[None] for x in (q, repeated(k, q), repeated(v, q)))
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=row.mask(), scale=scale)
    return out[0].transpose(0, 1)


def register(name: str) -> str:
    """Make a kernel known to transformers; returns what it is called there."""
    kernel, known = KERNELS[name], f"packed_{name}"

    def attend(
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float,
        row: Row,
        **_: Any,
    ) -> tuple[Tensor, None]:
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        return kernel(q, k, v, row, scaling)[None], None

    AttentionInterface.register(known, attend)
    AttentionMaskInterface.register(known, lambda *_, **__: None)
    return known


def check(name: str, row: Row, device: torch.device, dtype: torch.dtype) -> float:
    """Return the largest difference to the reference, of output and gradients; raises `Skip`."""
    torch.manual_seed(0)
    size = len(row.tokens_N)

    def made(heads: int) -> Tensor:
        return torch.randn(size, heads, 64, device=device, dtype=dtype).requires_grad_()

    q, k, v = inputs = (made(4), made(2), made(2))
    weights = torch.randn(size, 4, 64, device=device, dtype=dtype)
    found = []
    for kernel in (KERNELS[name], reference):
        try:
            out = kernel(q, k, v, row, 0.125)
            gradients = torch.autograd.grad((out * weights).sum(), inputs)
        except NotImplementedError as error:
            raise Skip(f"{name} does not work on a {device.type}") from error
        found.append([out, *gradients])
    return max(float((a - b).abs().max()) for a, b in zip(*found, strict=True))
