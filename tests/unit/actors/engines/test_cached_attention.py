"""Attention to cached keys against a plain one; for families of models see `test_prefill`."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from actors.engines.cached_attention import cached_attention


def plain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    seen: Tensor,
    scale: float,
    softcap: float | None,
    sinks_H: Tensor | None,
) -> Tensor:
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = scale * torch.einsum("bhqd,bhld->bhql", query, key)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    weights = torch.where(seen, scores.exp(), 0.0)
    total = weights.sum(-1, keepdim=True)
    if sinks_H is not None:
        total = total + sinks_H.exp()[None, :, None, None]
    return torch.einsum("bhql,bhld->bqhd", weights / total, value)


@pytest.mark.parametrize("mask", ["none", "bool", "bool of heads", "added"])
@pytest.mark.parametrize("extra", ["", "softcap", "sinks"])
@given(
    rows=st.integers(1, 4),
    key_heads=st.integers(1, 3),
    groups=st.integers(1, 3),
    queries=st.integers(1, 3),
    length=st.integers(3, 40),
    scale=st.sampled_from([None, 0.3]),
    seed=st.integers(0, 99),
)
@settings(max_examples=15, deadline=None)
def test_it_is_plain_attention(mask, extra, rows, key_heads, groups, queries, length, scale, seed):
    torch.manual_seed(seed)
    heads = key_heads * groups
    query = torch.randn(rows, heads, queries, 8)
    key, value = torch.randn(2, rows, key_heads, length, 8)
    causal = torch.ones(queries, length, dtype=torch.bool).tril(length - queries)
    seen = causal.expand(rows, heads if mask == "bool of heads" else 1, queries, length)
    if mask != "none":
        seen = seen & (torch.rand(seen.shape) < 0.7)
        seen[..., 0] = True
    if queries > 1 and mask == "none" and queries != length and not extra:
        # transformers makes a mask there.
        seen, mask = causal.expand(rows, 1, queries, length), "bool"
    added = torch.where(seen, 0.0, torch.finfo(torch.float32).min)
    softcap = 0.7 if extra == "softcap" else None
    sinks_H = torch.randn(heads) if extra == "sinks" else None
    module = torch.nn.Module()
    module.num_key_value_groups = groups
    found, _ = cached_attention(
        module,
        query,
        key,
        value,
        {"none": None, "added": added}.get(mask, seen),
        scaling=scale,
        softcap=softcap,
        s_aux=sinks_H,
    )
    expected = plain(query, key, value, seen, scale or 8**-0.5, softcap, sinks_H)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_row_of_padding_that_sees_nothing_is_finite():
    query = torch.randn(1, 2, 2, 4)
    unseen = torch.zeros(1, 1, 2, 2, dtype=torch.bool)
    found, _ = cached_attention(torch.nn.Module(), query, query, query, unseen, softcap=1.0)
    assert found.isfinite().all()


def test_what_it_would_leave_out_is_refused():
    query = torch.randn(1, 1, 1, 4)
    bias = torch.zeros(1, 1, 1, 1)
    with pytest.raises(NotImplementedError, match="bias of positions"):
        cached_attention(
            torch.nn.Module(), query, query, query, None, softcap=1.0, position_bias=bias
        )
