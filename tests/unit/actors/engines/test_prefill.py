"""Prompts computed once, in passes of bounded size, and rows computed anew after a push."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GptOssConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3MoeConfig,
)

from actors.engines import cached_attention, prefill
from actors.engines.batch_generator import BatchGenerator
from actors.engines.engine import Request
from actors.engines.prefill import in_parts
from protocol.groups import Rollout

VOCAB = 40
PROMPTS = ((5, 6, 7), tuple(range(2, 25)), (9,))
WINDOW = 8
FAMILIES: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "qwen2": (Qwen2Config, {}),
    "qwen2 with windows": (
        Qwen2Config,
        {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    ),
    "mistral": (MistralConfig, {"sliding_window": WINDOW}),
    "gemma3": (Gemma3TextConfig, {"sliding_window": WINDOW}),
    "phi3": (Phi3Config, {"pad_token_id": 0}),
    "gpt-oss": (GptOssConfig, {"sliding_window": WINDOW, "num_local_experts": 4}),
    "gemma2 with caps": (
        Gemma2Config,
        {
            "sliding_window": WINDOW,
            "attn_logit_softcapping": 1.0,
            "final_logit_softcapping": 5.0,
            "query_pre_attn_scalar": 1,
        },
    ),
    "qwen3-moe": (
        Qwen3MoeConfig,
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    ),
}


def make_model(family: str, seed: int = 0) -> Any:
    config_type, changes = FAMILIES[family]
    torch.manual_seed(seed)
    values: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 128,
    }
    model: Any = AutoModelForCausalLM.from_config(config_type(**(values | changes)))
    with torch.no_grad():
        for parameter in model.parameters():
            # Peaked, and different from model to model.
            parameter.mul_(4.0 if parameter.dim() > 1 else 1.0)
    cached_attention.use(model)
    return model.eval()


class Passes:
    """What a model is asked to compute: the shape of the ids of each forward pass."""

    def __init__(self, model: Any) -> None:
        self.shapes: list[torch.Size] = []
        model.register_forward_pre_hook(
            lambda _, __, kwargs: self.shapes.append(kwargs["input_ids"].shape), with_kwargs=True
        )

    def take(self) -> list[int]:
        """Tokens of each pass since the last call."""
        sizes = [shape.numel() for shape in self.shapes]
        self.shapes = []
        return sizes


def make_request(prompt: tuple[int, ...], max_tokens: int = 30, num_rollouts: int = 3) -> Request:
    return Request(prompt, num_rollouts, temperature=1.0, max_tokens=max_tokens, seed=len(prompt))


def logprobs(model: Any, prompt: tuple[int, ...], rollout: Rollout) -> np.ndarray:
    """By one pass over one sequence, with the attention that leaves nothing out."""
    exact = copy.deepcopy(model)
    exact.set_attn_implementation("eager")
    ids = torch.tensor([[*prompt, *rollout.tokens]])
    with torch.no_grad():
        logits = exact(ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
    picked = logits.float().log_softmax(-1)[torch.arange(len(rollout.tokens)), rollout.tokens]
    return picked.numpy()


def staggered(generator: BatchGenerator, steps: int) -> dict[int, list[Rollout]]:
    """Groups that begin ``steps`` apart: their completions differ in length."""
    finished: dict[int, list[Rollout]] = {}
    for key, prompt in enumerate(PROMPTS):
        generator.add(key, make_request(prompt))
        for _ in range(steps):
            finished |= dict(generator.step()[1])
    return finished


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "sizes",
    [(2048, 16384, 9999), (2048, 16384, 0), (5, 60, 0)],
    ids=["in one pass", "at once", "in small parts"],
)
def test_rows_in_flight_continue_as_if_newer_weights_had_computed_all_of_them(
    family, sizes, monkeypatch
):
    """Beyond windows, with prompts and completions of different lengths, in any parts."""
    monkeypatch.setattr(prefill, "PASS_TOKENS", sizes[0])
    monkeypatch.setattr(prefill, "PART_TOKENS", sizes[1])
    monkeypatch.setattr(prefill, "WORTH_TWO_PASSES", sizes[2])
    model, old, new = (make_model(family, seed) for seed in (0, 0, 1))
    generator = BatchGenerator(model, eos_ids=frozenset(), max_rows=64, version=0)
    finished = staggered(generator, steps=6)
    model.load_state_dict(new.state_dict())
    generator.weights_changed(1)
    while generator.busy:
        finished |= dict(generator.step()[1])
    for key, prompt in enumerate(PROMPTS):
        for rollout in finished[key]:
            # The groups had 18, 12 and 6 tokens.
            assert rollout.spans == ((0, 0), (18 - 6 * key, 1))
            before = np.arange(30) < 18 - 6 * key
            expected = np.where(
                before, logprobs(old, prompt, rollout), logprobs(new, prompt, rollout)
            )
            assert np.abs(rollout.logprobs - expected).max() < 2e-4


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "sizes",
    [(2048, 16384, 9999), (2048, 16384, 0), (5, 60, 0)],
    ids=["in one pass", "at once", "in small parts"],
)
def test_rows_computed_ahead_continue_as_if_newer_weights_had_computed_all_of_them(
    family, sizes, monkeypatch
):
    """Meanwhile all get tokens of the old weights, one group goes, and one comes."""
    monkeypatch.setattr(prefill, "PASS_TOKENS", sizes[0])
    monkeypatch.setattr(prefill, "PART_TOKENS", sizes[1])
    monkeypatch.setattr(prefill, "WORTH_TWO_PASSES", sizes[2])
    old, new = make_model(family, 0), make_model(family, 1)
    generator = BatchGenerator(old, eos_ids=frozenset(), max_rows=64, version=0)
    finished = staggered(generator, steps=6)
    ahead = generator.ahead(new)
    generator.step()
    ahead.compute()
    generator.abort(1)
    generator.add(3, make_request((4, 5, 6, 7)))
    generator.step()
    generator.step()
    generator.weights_changed(1, ahead)
    while generator.busy:
        finished |= dict(generator.step()[1])
    # The groups had 18, 12 and 6 tokens, and got 3 more; the new one got 2.
    for key, prompt, tokens in ((0, PROMPTS[0], 21), (2, PROMPTS[2], 9), (3, (4, 5, 6, 7), 2)):
        for rollout in finished[key]:
            assert rollout.spans == ((0, 0), (tokens, 1))
            before = np.arange(30) < tokens
            expected = np.where(
                before, logprobs(old, prompt, rollout), logprobs(new, prompt, rollout)
            )
            assert np.abs(rollout.logprobs - expected).max() < 2e-4
    assert finished.keys() == {0, 2, 3}


def test_what_was_computed_ahead_leaves_the_tokens_that_were_sampled_since():
    old, new = make_model("qwen2"), make_model("qwen2", seed=1)
    generator = BatchGenerator(old, eos_ids=frozenset(), max_rows=64)
    generator.add(0, make_request(PROMPTS[1]))
    generator.step()
    ahead = generator.ahead(new)
    ahead.compute()
    generator.step()
    generator.step()
    passes = Passes(new)
    generator.weights_changed(1, ahead)
    # Of each of the 3 rows the newest token that there was, and two since, in one pass.
    assert passes.take() == [3 * 3]


def test_after_a_push_a_prompt_is_computed_once_and_no_pass_is_large(monkeypatch):
    monkeypatch.setattr(prefill, "PASS_TOKENS", 64)
    model = make_model("qwen2")
    passes = Passes(model)
    generator = BatchGenerator(model, eos_ids=frozenset(), max_rows=64)
    prompt = tuple(range(2, 39))
    for key in range(4):
        generator.add(key, make_request(prompt, num_rollouts=8))
    generator.step()
    # 4 prompts of 37 tokens, in passes of 64 // 4 columns; then a token of each row.
    assert passes.take() == [4 * 16, 4 * 16, 4 * 5, 32]
    for _ in range(10):
        generator.step()
    passes.take()
    generator.weights_changed(1)
    sizes = passes.take()
    # The prompts once; 10 of the 11 sampled tokens of 32 rows; the last one of each.
    assert sum(sizes) == 4 * 37 + 10 * 32 + 32
    assert max(sizes) <= 64


def test_after_a_push_few_tokens_are_computed_in_one_pass():
    model = make_model("qwen2")
    passes = Passes(model)
    generator = BatchGenerator(model, eos_ids=frozenset(), max_rows=64)
    for key, prompt in enumerate([(5, 6, 7), (5, 6, 7, 8)]):
        generator.add(key, make_request(prompt, num_rollouts=2))
        generator.step()
    passes.take()
    generator.weights_changed(1)
    # Once more than needed: the prompts of two rows. Padded to the longest, of 3 + 2 tokens.
    assert passes.take() == [4 * 5]


def test_rows_of_a_prompt_longer_than_a_part_are_computed_one_by_one(monkeypatch):
    monkeypatch.setattr(prefill, "PART_TOKENS", 10)
    model = make_model("qwen2")
    passes = Passes(model)
    generator = BatchGenerator(model, eos_ids=frozenset(), max_rows=64)
    generator.add(0, make_request(PROMPTS[1]))
    for _ in range(3):
        generator.step()
    passes.take()
    generator.weights_changed(1)
    # The prompt once, two tokens of each of the 3 rows, then the newest of all.
    assert passes.take() == [23, 2, 2, 2, 3]


def test_parts_hold_items_of_similar_length_up_to_their_size(monkeypatch):
    monkeypatch.setattr(prefill, "PART_TOKENS", 12)
    items = [(length, length) for length in (3, 5, 3, 20, 4, 6, 1)]
    # 3 * 3 are 9, a fourth of length 4 would make 16.
    assert list(in_parts(items)) == [[1, 3, 3], [4, 5], [6], [20]]
