"""The learner's own attention with one kernel or another, and flex attention beside it.

Shapes: N tokens, H heads of D numbers each, fewer heads of keys and values.
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from benchmarks.gpu.report import Skip
from learner.packing import kernels
from learner.packing.attention import PACKED, packed_attention, register
from learner.packing.layout import Layout

FLEX = "flex"
NAMES = {"varlen": "torch varlen_attn", "flash2": "flash-attn 2", "flash4": "flash-attn 4"}
"""The kernels of the learner, as they are called there."""
LOOP = "sdpa"
"""One segment after the other, as the learner does without a kernel."""
Attend = Callable[..., tuple[Tensor, None]]
_KERNELS = dict(kernels.KERNELS)


def use(name: str) -> tuple[str, Attend]:
    """Leave the learner this kernel alone; returns transformers' name for it, and the function.

    Raises ImportError for one that is not installed.
    """
    if name == FLEX:
        AttentionInterface.register(f"packed_{FLEX}", flex)
        AttentionMaskInterface.register(f"packed_{FLEX}", lambda *_, **__: None)
        return f"packed_{FLEX}", flex
    kernels.KERNELS.clear()
    if name != LOOP:
        _KERNELS[NAMES[name]]()
        kernels.KERNELS[name] = _KERNELS[NAMES[name]]
    kernels.best_kernel.cache_clear()
    register()
    return PACKED, packed_attention


_compiled: dict[str, Any] = {}


def flex(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    packed_layout: Layout,
    **_: Any,
) -> tuple[Tensor, None]:
    """A compiled kernel with a mask of blocks."""
    flex_attention: Any = import_module("torch.nn.attention.flex_attention")
    if not _compiled:
        _compiled["attend"] = torch.compile(flex_attention.flex_attention, dynamic=False)
    if _compiled.get("layout") is not packed_layout:
        own_N, sees_SS = owners(packed_layout, query.device)

        def sees(_: Tensor, __: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return sees_SS[own_N[i], own_N[j]] & (i >= j)

        size = packed_layout.size
        _compiled["mask"] = flex_attention.create_block_mask(
            sees, None, None, size, size, query.device
        )
        _compiled["layout"] = packed_layout
    out = _compiled["attend"](
        *(x.contiguous() for x in (query, key, value)),
        block_mask=_compiled["mask"],
        scale=scaling,
        enable_gqa=True,
    )
    return out.transpose(1, 2), None


def owners(layout: Layout, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the segment [N] of every token, and [S, S] whether the first sees the second."""
    lengths = torch.tensor(layout.stops) - torch.tensor(layout.starts)
    sees_SS = torch.eye(len(lengths), dtype=torch.bool)
    for segment, parent in enumerate(layout.parents):
        if parent >= 0:
            sees_SS[segment] |= sees_SS[parent]
    own_N = torch.arange(len(lengths)).repeat_interleave(lengths)
    return own_N.to(device), sees_SS.to(device)


def reference(query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float) -> Tensor:
    """The same [1, N, H, D] from the full mask, for short rows."""
    own_N, sees_SS = owners(layout, query.device)
    mask_NN = sees_SS[own_N[:, None], own_N[None]].tril()
    out = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask_NN, scale=scale, enable_gqa=True
    )
    return out.transpose(1, 2)


def check(name: str, layout: Layout, device: torch.device, dtype: torch.dtype) -> float:
    """Return the largest difference to the reference, of output and gradients; raises `Skip`."""
    torch.manual_seed(0)
    _, attend = use(name)
    if name in NAMES and device.type == "cpu":
        raise Skip(f"{name} does not work on a cpu")

    def made(heads: int) -> Tensor:
        return torch.randn(1, heads, layout.size, 64, device=device, dtype=dtype).requires_grad_()

    inputs = (made(4), made(2), made(2))
    weights = torch.randn(1, layout.size, 4, 64, device=device, dtype=dtype)
    found = []
    for plain in (False, True):
        try:
            if plain:
                out = reference(*inputs, layout, 0.125)
            else:
                out, _ = attend(nn.Module(), *inputs, None, scaling=0.125, packed_layout=layout)
            gradients = torch.autograd.grad((out * weights).sum(), inputs)
        except NotImplementedError as error:
            raise Skip(f"{name} does not work on a {device.type}") from error
        found.append([out, *gradients])
    return max(float((a - b).detach().abs().max()) for a, b in zip(*found, strict=True))
