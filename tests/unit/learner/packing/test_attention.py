"""Every kernel of packed attention against a mask over the whole row."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from learner.packing import attention
from learner.packing.attention import packed_attention
from learner.packing.trees import Segment, TokenTree
from tests.unit.learner.packing.random_trees import layout_of, trees
from tests.unit.learner.packing.test_rows import seen_by

HEADS, KEY_HEADS, SIZE = 4, 2, 8


def group() -> TokenTree:
    tokens = np.arange(40, dtype=np.int32)
    return TokenTree((Segment(-1, tokens), Segment(0, tokens), Segment(0, tokens[:7])))


def reference(query, key, value, layout, *, window, softcap, sinks):
    """Scores of all pairs, masked, in float64."""
    groups = HEADS // KEY_HEADS
    query, key, value = (x.double() for x in (query, key, value))
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.mT * SIZE**-0.5
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    mask = torch.zeros(layout.size, layout.size, dtype=torch.bool)
    for place in range(layout.size):
        seen = seen_by(layout, place)
        mask[place, seen[-window:] if window else seen] = True
    scores = scores.masked_fill(~mask, float("-inf"))
    if sinks is not None:
        column = sinks.double().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, column], -1)
    return (scores.softmax(-1)[..., : layout.size] @ value).transpose(1, 2)


@pytest.mark.parametrize("chain_work", [0, 10**9], ids=["segments", "chains"])
@settings(max_examples=25, deadline=None)
@given(
    forest=st.lists(trees(max_length=20), min_size=1, max_size=3),
    window=st.sampled_from([None, None, 1, 5]),
    softcap=st.sampled_from([None, None, 2.0]),
    with_sinks=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_outputs_and_gradients_are_those_of_a_mask(
    chain_work, forest, window, softcap, with_sinks, seed
):
    layout = layout_of(forest)
    torch.manual_seed(seed)
    leaves = [
        torch.randn(1, heads, layout.size, SIZE, requires_grad=True)
        for heads in (HEADS, KEY_HEADS, KEY_HEADS)
    ]
    sinks = torch.randn(HEADS, requires_grad=True) if with_sinks else None
    weight = torch.randn(1, layout.size, HEADS, SIZE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "_CHAIN_WORK", chain_work)
        query, key, value = leaves
        out, _ = packed_attention(
            nn.Module(),
            query,
            key,
            value,
            None,
            sliding_window=window,
            softcap=softcap,
            s_aux=sinks,
            packed_layout=layout,
        )
    wanted = reference(query, key, value, layout, window=window, softcap=softcap, sinks=sinks)
    inputs = leaves if sinks is None else [*leaves, sinks]
    grads = torch.autograd.grad((out * weight).sum(), inputs)
    wanted_grads = torch.autograd.grad((wanted * weight).sum(), inputs)
    assert (out - wanted).abs().max() < 2e-6
    for grad, wanted_grad in zip(grads, wanted_grads, strict=True):
        assert (grad - wanted_grad).abs().max() < 2e-5


def test_half_precision_stays_near(monkeypatch):
    monkeypatch.setattr(attention, "_CHAIN_WORK", 0)
    layout = layout_of([group()])
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, h, layout.size, SIZE) for h in (HEADS, KEY_HEADS, KEY_HEADS))
    exact, _ = packed_attention(nn.Module(), q, k, v, None, packed_layout=layout)
    q, k, v = q.bfloat16(), k.bfloat16(), v.bfloat16()
    rounded, _ = packed_attention(nn.Module(), q, k, v, None, packed_layout=layout)
    assert rounded.dtype == torch.bfloat16
    assert (rounded.float() - exact).abs().max() < 0.05


def test_what_it_would_leave_out_is_refused():
    layout = layout_of([group()])
    part = torch.randn(1, 1, layout.size, SIZE)
    with pytest.raises(NotImplementedError, match="does not hand on"):
        packed_attention(nn.Module(), part, part, part, None)
    with pytest.raises(NotImplementedError, match="does not hand on"):
        packed_attention(
            nn.Module(), part, part, part, None, packed_layout=layout, position_bias=part
        )
