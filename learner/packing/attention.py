"""Attention of a packed row, through the interface that transformers has for it.

A model whose attention is `PACKED` takes the row's `Layout` as the argument `LAYOUT` of its call.

    GPU, float16 or bfloat16       variable-length flash attention
    CPU                            `learner.packing.cascade`
    short sequences on a CPU       one call over sequences as a padded batch
    window, softcap, sinks, ...    segment by segment with a mask, where the kernel lacks them

Shapes: [1, heads, N, D]; keys and values may have fewer heads.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from learner.packing.cascade import cascade_attention
from learner.packing.kernels import best_kernel
from learner.packing.layout import Layout

PACKED = "gdpo_packed"
"""The attention's name among those of transformers."""
LAYOUT = "packed_layout"
"""The argument of a model's call that takes the `Layout`."""
_HALF = (torch.float16, torch.bfloat16)
_CHAIN_WORK = 200_000
"""Pairs of tokens times channels that cost as much as the calls for a segment do, or less."""


@dataclass(frozen=True, slots=True)
class _Form:
    """What a layer asks of its attention besides who sees whom."""

    scale: float
    window: int | None = None
    """A token sees this many, itself included."""
    softcap: float | None = None
    sinks_H: Tensor | None = None
    """Scores of a key that every token sees and that has no value."""

    @property
    def is_plain(self) -> bool:
        return self.window is None and not self.needs_scores

    @property
    def needs_scores(self) -> bool:
        return self.softcap is not None or self.sinks_H is not None


def register() -> None:
    """Make `PACKED` known to transformers."""
    # As it is: compiled, it would be compiled again for every other layout.
    AttentionInterface.register(PACKED, torch.compiler.disable(packed_attention))
    # Who sees whom is in the layout: no mask is made.
    AttentionMaskInterface.register(PACKED, lambda *args, **kwargs: None)


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    packed_layout: Layout | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention [1, N, heads, D] of a packed row; the arguments are those of transformers.

    Raises NotImplementedError for what it would leave out.
    """
    if packed_layout is None or attention_mask is not None or position_bias is not None:
        raise NotImplementedError(f"{type(module).__name__} does not hand on what packing needs")
    layout = packed_layout
    if sliding_window is not None and sliding_window >= layout.longest:
        sliding_window = None
    form = _Form(
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        window=sliding_window,
        softcap=softcap,
        sinks_H=s_aux,
    )
    return _choose(query, value, layout, form)(query, key, value, layout, form).transpose(
        1, 2
    ), None


_Attention = Callable[[Tensor, Tensor, Tensor, Layout, _Form], Tensor]


def _choose(query: Tensor, value: Tensor, layout: Layout, form: _Form) -> _Attention:
    same_size = query.shape[-1] == value.shape[-1]
    if query.is_cuda:
        fits = query.dtype in _HALF and same_size and _kernel_can(form)
        return _varlen if fits else _by_segments
    pairs = len(layout.leaves) * layout.longest**2
    if pairs * query.shape[1] * query.shape[3] <= _CHAIN_WORK * len(layout.starts):
        return _chains
    return _cascade if form.is_plain and same_size else _by_segments


def _kernel_can(form: _Form) -> bool:
    kernel = best_kernel()
    return (
        kernel is not None
        and form.sinks_H is None
        and (form.softcap is None or kernel.can_cap)
        and (form.window is None or kernel.can_window)
    )


def _cascade(query: Tensor, key: Tensor, value: Tensor, layout: Layout, form: _Form) -> Tensor:
    return cascade_attention(query, key, value, layout, form.scale)


def _chains(query: Tensor, key: Tensor, value: Tensor, layout: Layout, form: _Form) -> Tensor:
    """Attend in all sequences at once, as a padded batch: what they share is computed again."""
    chains = layout.chains(query.device)

    def rows(packed_1HND: Tensor) -> Tensor:
        packed_NHD = packed_1HND[0].transpose(0, 1)
        chosen_CLHD = packed_NHD.index_select(0, chains.index_CL.flatten())
        return chosen_CLHD.view(*chains.index_CL.shape, *packed_NHD.shape[1:]).transpose(1, 2)

    out_CHLD = _causal(rows(query), rows(key), rows(value), form)
    out_NHD = out_CHLD.transpose(1, 2).flatten(0, 1).index_select(0, chains.place_N)
    packed_1HND: Tensor = out_NHD.transpose(0, 1)[None]
    return packed_1HND


def _by_segments(query: Tensor, key: Tensor, value: Tensor, layout: Layout, form: _Form) -> Tensor:
    """Attend with the queries of one segment at a time, to the keys on its path."""
    parts = []
    for segment, (start, stop) in enumerate(zip(layout.starts, layout.stops, strict=True)):
        if stop == start:
            continue
        seen = _seen(layout.path(segment), stop - start, form.window)
        keys, values = (
            torch.cat([x[:, :, slice(*range_)] for range_ in seen], dim=2) for x in (key, value)
        )
        num_keys, own = keys.shape[2], stop - start
        place_q = torch.arange(num_keys - own, num_keys, device=query.device)[:, None]
        distance_qk = place_q - torch.arange(num_keys, device=query.device)
        mask_qk = distance_qk >= 0
        if form.window is not None:
            mask_qk &= distance_qk < form.window
        parts.append(_masked(query[:, :, start:stop], keys, values, mask_qk, form))
    return torch.cat(parts, dim=2)


def _seen(
    path: list[tuple[int, int]], num_queries: int, window: int | None
) -> list[tuple[int, int]]:
    """The last ranges of a path, as far as a window of the first query reaches."""
    if window is None:
        return path
    left, ranges = num_queries + window - 1, []
    for start, stop in reversed(path):
        if left <= 0:
            break
        ranges.append((max(start, stop - left), stop))
        left -= stop - start
    return ranges[::-1]


def _causal(query: Tensor, key: Tensor, value: Tensor, form: _Form) -> Tensor:
    """Attention of rows that are padded on the right, where causal attention does not look."""
    if form.is_plain:
        grouped = query.shape[1] != key.shape[1]
        return F.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=form.scale, enable_gqa=grouped
        )
    place_L = torch.arange(query.shape[2], device=query.device)
    distance_LL = place_L[:, None] - place_L
    mask_LL = distance_LL >= 0
    if form.window is not None:
        mask_LL &= distance_LL < form.window
    return _masked(query, key, value, mask_LL, form)


def _masked(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, form: _Form) -> Tensor:
    """Attention with a bool mask that broadcasts to [R, heads, q, k]."""
    if not form.needs_scores:
        grouped = query.shape[1] != key.shape[1]
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, scale=form.scale, enable_gqa=grouped
        )
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = (query @ key.mT).float() * form.scale
    if form.softcap is not None:
        scores = (scores / form.softcap).tanh() * form.softcap
    scores = scores.masked_fill(~mask, float("-inf"))
    if form.sinks_H is not None:
        sinks = form.sinks_H.float().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sinks], dim=-1)
    shares = scores.softmax(-1)[..., : key.shape[2]]
    return shares.to(value.dtype) @ value


def _varlen(query: Tensor, key: Tensor, value: Tensor, layout: Layout, form: _Form) -> Tensor:
    varlen, kernel = layout.varlen(query.device), best_kernel()
    assert kernel is not None
    queries, keys, values = (x[0].transpose(0, 1) for x in (query, key, value))
    index_K = varlen.key_index_K
    out = kernel.attend(
        queries, keys[index_K], values[index_K], varlen, form.scale, form.window, form.softcap
    )
    return out.transpose(0, 1)[None]
