"""Attention of one new token a row against torch's own."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.engines.one_query import OneQueryAttention, one_query_attention


@pytest.mark.parametrize("mask", ["none", "bool", "bool of heads", "float"])
@given(
    rows=st.integers(1, 4),
    key_heads=st.integers(1, 3),
    groups=st.integers(1, 3),
    length=st.integers(1, 40),
    scale=st.sampled_from([None, 0.3]),
    seed=st.integers(0, 99),
)
@settings(max_examples=15, deadline=None)
def test_it_is_torchs(mask, rows, key_heads, groups, length, scale, seed):
    torch.manual_seed(seed)
    heads = key_heads * groups
    query = torch.randn(rows, heads, 1, 8, dtype=torch.bfloat16)
    key, value = torch.randn(2, rows, key_heads, length, 8, dtype=torch.bfloat16)
    shape = (rows, heads if mask == "bool of heads" else 1, 1, length)
    seen = torch.rand(shape) < 0.7
    seen[..., -1] = True
    added = torch.where(seen, 0.0, -torch.inf).bfloat16()
    chosen = {"none": None, "float": added}.get(mask, seen)
    kwargs = {"attn_mask": chosen, "scale": scale, "enable_gqa": True}
    with OneQueryAttention():
        found = F.scaled_dot_product_attention(query, key, value, **kwargs)
    assert torch.equal(found, one_query_attention(query, key, value, **kwargs))
    if mask == "float":
        kwargs["attn_mask"] = added.float()
    expected = F.scaled_dot_product_attention(query.float(), key.float(), value.float(), **kwargs)
    torch.testing.assert_close(found.float(), expected, rtol=1e-2, atol=1e-2)


def test_what_has_more_than_one_query_is_left_to_torch(monkeypatch):
    monkeypatch.setattr(
        "actors.engines.one_query.one_query_attention", lambda *_, **__: pytest.fail("called")
    )
    query = torch.randn(1, 1, 2, 4)
    with OneQueryAttention():
        found = F.scaled_dot_product_attention(query, query, query, is_causal=True)
        F.scaled_dot_product_attention(query[:, :, :1], query, query, is_causal=True)
    assert torch.equal(found, F.scaled_dot_product_attention(query, query, query, is_causal=True))
