"""How a model's sequences are computed is found out by comparing, and said."""

import logging

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from learner.packing.attention import PACKED
from learner.packing.budget import bytes_per_token, token_budget
from learner.packing.choice import choose
from learner.packing.forward import Forward, Way
from protocol.errors import ConfigError

SHAPE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}


def make_model(family: str, **changes):
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **SHAPE | changes)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def test_usual_models_are_packed(caplog):
    caplog.set_level(logging.INFO, "learner")
    model = make_model("qwen2")
    assert choose(model, 100) == Way(packed=True, fused_head=True)
    assert model.config._attn_implementation == PACKED
    assert "packed" in caplog.text


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_is_no_reason_against_packing(dtype):
    assert choose(make_model("llama").to(dtype), 100) == Way(packed=True, fused_head=True)


@pytest.mark.parametrize("longest", [2, 5, 16, 128])
def test_sequences_may_be_short(longest):
    assert choose(make_model("qwen2"), longest).packed


@pytest.mark.parametrize("family", ["bloom", "falcon_mamba"])
def test_a_model_without_the_usual_attention_pads(family, caplog):
    way = choose(make_model(family), 100)
    assert way == Way(packed=False, fused_head=True)
    assert "padded" in caplog.text
    assert "the attention of" in caplog.text


def test_positions_that_change_with_the_length_are_computed_one_by_one(caplog):
    rope = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0] * 4,
        "long_factor": [2.0] * 4,
        "original_max_position_embeddings": 64,
    }
    assert choose(make_model("llama", rope_parameters=rope), 64).packed
    way = choose(make_model("llama", rope_parameters=rope), 65)
    assert way == Way(packed=False, fused_head=True, max_sequences=1)
    assert "one by one" in caplog.text


def test_positions_that_depend_on_earlier_sequences_are_refused():
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    assert choose(make_model("llama", rope_parameters=rope), 128).packed
    with pytest.raises(ConfigError, match=r"dynamic RoPE.*sampling\.max_tokens = 129 within 128"):
        choose(make_model("llama", rope_parameters=rope), 129)


@pytest.mark.parametrize("window", [16, 5000])
def test_a_window_that_is_only_in_the_mask_is_found_out(window):
    """The attention is told nothing of it; published models have windows longer than a probe."""
    model = make_model("phimoe", sliding_window=window, num_local_experts=2)
    assert not choose(model, 9000).packed
    assert model.config.sliding_window == window
    model = make_model("mistral", sliding_window=window)
    assert choose(model, 9000).packed
    assert model.config.sliding_window == window


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_family_that_ignores_the_layout_is_found_out(monkeypatch, dtype):
    """Its attention is plain causal, so that completions see each other."""
    from learner.packing import attention

    def causal(module, query, key, value, mask, scaling=None, **_):
        out = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scaling, enable_gqa=True
        )
        return out.transpose(1, 2), None

    monkeypatch.setattr(attention, "packed_attention", causal)
    assert not choose(make_model("qwen2").to(dtype), 100).packed


def test_a_head_that_does_more_than_it_says_makes_its_own_logits(caplog):
    model = make_model("qwen2")
    forward = model.forward

    def strange(*args, **kwargs):
        out = forward(*args, **kwargs)
        out.logits = out.logits * 1.5
        return out

    model.forward = strange
    assert choose(model, 100) == Way(packed=True, fused_head=False)
    assert "head" in caplog.text


def test_a_head_without_a_part_that_gives_hidden_states_makes_its_own_logits():
    model = make_model("qwen2")
    type(model).base_model_prefix, before = "nothing", type(model).base_model_prefix
    try:
        assert choose(model, 100) == Way(packed=True, fused_head=False)
    finally:
        type(model).base_model_prefix = before


def test_damaged_weights_are_an_error_of_one_line():
    model = make_model("qwen2")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[:] = float("nan")
    with pytest.raises(ConfigError, match="not finite"):
        choose(model, 100)


def test_the_budget_follows_what_a_token_keeps(monkeypatch):
    from learner.packing import budget

    budgets, kept = [], []
    for layers in (2, 8):
        model = make_model("qwen2", num_hidden_layers=layers)
        forward = Forward(choose(model, 100), 1.0)
        kept.append(bytes_per_token(model, forward, 100))
        monkeypatch.setattr(budget, "_total_memory", lambda: 64e6)
        budgets.append(token_budget(model, forward, 100).most)
    # Four times the layers keep nearly four times as much.
    assert 3 < kept[1] / kept[0] < 4
    assert budgets[0] in (2 * budgets[1], 4 * budgets[1])
    assert budgets[0] * kept[0] < 64e6
