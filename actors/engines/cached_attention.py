"""Attention to cached keys and values, with what torch's and transformers' own is slow at or lacks.

Where there is a mask, transformers copies the keys for each head of queries that shares them, at
every token; and torch's kernel, on a CPU, takes as long for one query as for several. So the heads
that share keys become the queries of one head, without a copy. Softcap and sinks, which ``sdpa``
ignores, count.
Shapes: B rows, Q queries a row, H heads of queries and K of keys, G = H / K, L cached positions,
D numbers a head.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

CACHED = "cached"
"""Its name in transformers."""


def use(model: Any) -> None:
    """Give a model this attention, unless it has only its own."""
    AttentionInterface.register(CACHED, cached_attention)
    AttentionMaskInterface.register(CACHED, sdpa_mask)
    if model._supports_attention_backend:
        model.set_attn_implementation(CACHED)


def cached_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention [B, Q, H, D] of queries [B, H, Q, D] to keys and values [B, K, L, D].

    The arguments are those of transformers. Raises NotImplementedError for what it would leave out.
    """
    if softcap is not None or s_aux is not None:
        if position_bias is not None:
            raise NotImplementedError(
                f"{type(module).__name__}: a softcap, and a bias of positions"
            )
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return _by_scores(query, key, value, attention_mask, scale, softcap, s_aux), None
    if query.shape[2] == 1 and position_bias is None and _is_of_all_heads(attention_mask):
        return _one_query(query, key, value, attention_mask, scaling), None
    out: tuple[Tensor, None] = sdpa_attention_forward(
        module,
        query,
        key,
        value,
        attention_mask,
        scaling=scaling,
        position_bias=position_bias,
        **kwargs,
    )
    return out


def _is_of_all_heads(mask: Tensor | None) -> bool:
    return mask is None or mask.shape[1] == 1


def _one_query(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None
) -> Tensor:
    rows, heads, _, size = query.shape
    query_BKGD = query.reshape(rows, key.shape[1], -1, size)
    if mask is not None:
        mask = mask.expand(rows, 1, query_BKGD.shape[2], -1)
    out_BKGD = scaled_dot_product_attention(query_BKGD, key, value, attn_mask=mask, scale=scale)
    return out_BKGD.reshape(rows, 1, heads, -1)


def _by_scores(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    softcap: float | None,
    sinks_H: Tensor | None,
) -> Tensor:
    """Attention by two products in float32.

    ``mask`` is of bool, or added to the scores; None: every query sees what is before it.
    """
    rows, heads, queries, size = query.shape
    shape_BKGQL = (rows, key.shape[1], heads // key.shape[1], queries, key.shape[2])
    query_BKMD = query.reshape(rows, key.shape[1], -1, size).float() * scale
    scores = (query_BKMD @ key.float().mT).view(shape_BKGQL)
    if softcap is not None:
        scores = (scores / softcap).tanh_() * softcap
    if mask is None and queries > 1:
        seen = torch.ones(queries, key.shape[2], dtype=torch.bool, device=key.device)
        mask = seen.tril(key.shape[2] - queries)[None, None]
    if mask is not None:
        # A dimension for the heads of a product, or two where each head has a mask of its own.
        of_all = mask.shape[1] == 1
        mask = mask[:, :, None] if of_all else mask.unflatten(1, shape_BKGQL[1:3])
        # Not infinity: a row of padding that sees nothing must not become NaN, which would spread.
        unseen = torch.finfo(scores.dtype).min
        scores = scores.masked_fill(~mask, unseen) if mask.dtype == torch.bool else scores + mask
    if sinks_H is not None:
        sinks = sinks_H.float().view(1, *shape_BKGQL[1:3], 1, 1)
        scores = torch.cat([scores, sinks.expand(*scores.shape[:-1], 1)], dim=-1)
    shares = scores.softmax(-1)[..., : key.shape[2]].reshape(*query_BKMD.shape[:3], -1)
    out_BHQD = (shares @ value.float()).view(rows, heads, queries, -1)
    return out_BHQD.transpose(1, 2).to(query.dtype)
