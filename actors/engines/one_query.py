"""Attention of one new token a row, in 16 bits on a CPU.

torch's kernel is made for many queries: for one it takes several times as long as the two products
here do, in a small model as long as all else. In float32 there is no difference.
Shapes: B rows, H heads of queries and K of keys, L cached positions, D numbers a head.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

_HALF = (torch.bfloat16, torch.float16)


def pays(model: Any) -> bool:
    """Whether it is faster for this model than what torch does itself."""
    return model.device.type == "cpu" and model.dtype in _HALF


class OneQueryAttention(TorchFunctionMode):
    """While it is active, calls of torch's attention with one query a row are computed here.

    Everything else is left as it is.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is scaled_dot_product_attention and _fits(*args, **kwargs):
            return one_query_attention(*args, **kwargs)
        return func(*args, **kwargs)


def _fits(query: Tensor, key: Tensor, *_: Any, is_causal: bool = False, **__: Any) -> bool:
    return query.dim() == 4 and query.shape[2] == 1 and not is_causal


def one_query_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Attention [B, H, 1, D] of queries [B, H, 1, D] to keys and values [B, K, L, D].

    The arguments are those of torch's function, of which dropout and causality do not count here.
    Computed in float32 and rounded once.
    """
    rows, heads, _, size = query.shape
    groups = heads // key.shape[1]
    scale = size**-0.5 if scale is None else scale
    # The heads that share keys as the queries of one product.
    query_BKGD = query.view(rows, key.shape[1], groups, size)
    scores_BKGL = (query_BKGD.float() * scale) @ key.float().mT
    if attn_mask is not None:
        mask_BHGL = attn_mask.expand(rows, -1, -1, -1)
        if mask_BHGL.shape[1] != 1:
            mask_BHGL = mask_BHGL.reshape(rows, key.shape[1], groups, -1)
        if mask_BHGL.dtype == torch.bool:
            scores_BKGL = scores_BKGL.masked_fill(~mask_BHGL, float("-inf"))
        else:
            scores_BKGL = scores_BKGL + mask_BHGL
    shares_BKGL = scores_BKGL.softmax(-1)
    out_BKGD = shares_BKGL @ value.float()
    return out_BKGD.to(query.dtype).view(rows, heads, 1, value.shape[-1])
