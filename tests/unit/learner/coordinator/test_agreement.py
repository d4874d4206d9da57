"""Honest engines of any type, depth and scale pass; wrong ones do not, also those near rounding.

The engine is the real one, `actors.engines.batch_generator`, which computes token after token with
a cache what the learner computes at once.
"""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    LlamaConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3MoeConfig,
)

from actors.engines.batch_generator import BatchGenerator
from actors.engines.engine import Request
from learner.coordinator.agreement import Agreement, TokenScores, compare
from learner.coordinator.learner_logprobs import ENOUGH_TOKENS, LearnerLogprobs
from learner.packing.choice import PLAIN, choose
from learner.packing.forward import Way
from learner.training.policy import Policy
from protocol.groups import Group, Rollout
from protocol.weights import layout
from tests.unit.factories import pack_alone

VOCAB = 300
PROMPT = tuple(range(20, 45))


def make_model(
    config_type: type[PreTrainedConfig] = Qwen2Config,
    *,
    layers: int = 3,
    scale: float = 6.0,
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    **changes: Any,
) -> Any:
    """A random model; ``scale`` times larger weights make peaked distributions and rough sums."""
    torch.manual_seed(seed)
    values: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 256,
        "attn_implementation": "eager",
    }
    model: Any = AutoModelForCausalLM.from_config(config_type(**(values | changes)))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(scale)
    return model.to(dtype).eval()


def agreement(
    engine: Any, learner: Any, *, engine_temperature: float = 1.0, tokens: int = 48
) -> Agreement:
    """What the check finds for an engine that has the model ``engine``."""
    generator = BatchGenerator(engine, eos_ids=frozenset(), max_rows=4, version=0)
    generator.add(0, Request(PROMPT, 4, engine_temperature, tokens, seed=3))
    finished: list[Any] = []
    while generator.busy:
        finished += generator.step()[1]
    [(_, rollouts)] = finished
    prompt = np.array(PROMPT, dtype=np.int32)
    group = Group(1, prompt, tuple(rollouts), ("x",), np.zeros((4, 1), dtype=np.float32))
    dtype = str(learner.dtype).removeprefix("torch.")
    specs = layout((n, dtype, tuple(p.shape)) for n, p in learner.named_parameters())
    policy = Policy(learner, Path(), {}, "", specs)
    scores = LearnerLogprobs(policy, PLAIN).scores(
        group, pack_alone(0, learner, specs), learner.dtype, temperature=1.0
    )
    return compare(scores, check_limit=None)


def with_attention(model: Any, implementation: str) -> Any:
    """A copy that computes attention by another function."""
    config = copy.deepcopy(model.config)
    config._attn_implementation = implementation
    other: Any = AutoModelForCausalLM.from_config(config).to(model.dtype).eval()
    other.load_state_dict(model.state_dict())
    return other


@pytest.mark.parametrize(
    "changes",
    [
        {"layers": 1, "scale": 1.0},
        {"layers": 3, "scale": 8.0},
        {"layers": 16, "scale": 5.0},
        {"dtype": torch.float16},
        {"dtype": torch.float32},
        {"config_type": LlamaConfig, "tie_word_embeddings": True},
        {"config_type": Qwen3MoeConfig, "num_experts": 8, "moe_intermediate_size": 32},
    ],
    ids=str,
)
def test_rounding_is_no_reason_to_refuse_an_engine(changes):
    """Whose attention adds in another order than the learner's."""
    model = make_model(**changes)
    found = agreement(with_attention(model, "sdpa"), model)
    assert found.agrees, found
    # The yardstick is one: neither type nor depth nor scale is known to it.
    assert found.mean < 0.75 * found.limit
    if model.dtype != torch.float32:
        assert 0.5 < found.mean / found.rounding < 1.5


def test_few_tokens_do_not_refuse_an_engine_either():
    model = make_model(layers=3)
    assert agreement(with_attention(model, "sdpa"), model, tokens=2).agrees


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("layers", "scale"), [(1, 1.0), (3, 8.0), (16, 5.0)])
def test_a_wrong_temperature_is_refused_and_estimated(dtype, layers, scale):
    """Half of the differences are smaller than rounding in a model as rough as the second."""
    model = make_model(layers=layers, scale=scale, dtype=dtype)
    found = agreement(model, model, engine_temperature=0.9)
    assert not found.agrees
    # logits / .9 are 1.111 times the logits.
    assert found.gain == pytest.approx(1 / 0.9 - 1, abs=0.02)


def test_a_temperature_that_rounding_hides_from_the_size_of_differences_is_refused():
    model = make_model(scale=8.0)
    found = agreement(model, model, engine_temperature=0.97, tokens=96)
    assert found.mean < found.limit
    assert not found.agrees


@pytest.mark.parametrize(("layers", "scale"), [(1, 2.0), (3, 6.0), (16, 5.0)])
def test_one_layer_with_other_weights_is_refused(layers, scale):
    learner, other = (make_model(layers=layers, scale=scale, seed=seed) for seed in (0, 1))
    engine = copy.deepcopy(learner)
    pairs = zip(
        engine.model.layers[layers // 2].parameters(),
        other.model.layers[layers // 2].parameters(),
        strict=True,
    )
    for parameter, others in pairs:
        # A tenth of the way: as after many steps of training.
        parameter.data.lerp_(others.data, 0.1)
    assert not agreement(engine, learner).agrees


@pytest.mark.parametrize("cap", ["attn_logit_softcapping", "final_logit_softcapping"])
def test_a_dropped_softcap_is_refused(cap):
    caps: dict[str, Any] = {
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        cap: 2.0,
    }
    # Attention whose scores are as large as the cap.
    learner = make_model(Gemma2Config, sliding_window=256, query_pre_attn_scalar=1, **caps)
    engine = copy.deepcopy(learner)
    setattr(engine.config, cap, None)
    for layer in engine.model.layers:
        layer.self_attn.attn_logit_softcapping = engine.config.attn_logit_softcapping
    assert not agreement(engine, learner).agrees
    assert agreement(learner, learner).agrees


def scores(differences: torch.Tensor, rounding: torch.Tensor) -> TokenScores:
    learner_N = torch.linspace(-3.0, -0.1, len(differences))
    # Up and down again: nothing of the other series is along it.
    gain_N = torch.cos(torch.arange(len(differences)) * 1.3)
    return TokenScores(learner_N + differences, learner_N, learner_N + rounding, gain_N)


def test_differences_as_small_as_rounding_that_lean_to_one_side_are_refused():
    """As those of a distribution that is cut off and normalised again."""
    noise_N = 0.03 * torch.sin(torch.arange(160) * 2.1)
    leaning = compare(scores(0.03 + 0.3 * noise_N, noise_N), check_limit=None)
    assert leaning.mean < leaning.limit
    assert leaning.leans
    assert not leaning.agrees
    assert compare(scores(noise_N.flip(0), noise_N), check_limit=None).agrees


def test_the_limit_is_twice_the_rounding_and_more_for_few_tokens():
    noise_N = 0.03 * torch.tensor([1.0, -1.0]).repeat(50)
    # 2 * (1 + 2 / 10) * .03
    assert compare(scores(noise_N, noise_N), None).limit == pytest.approx(0.072)
    assert compare(scores(noise_N, 0 * noise_N), None).limit == 1e-3


def test_a_limit_of_the_users_is_the_only_one():
    leaning_N = torch.full((100,), 0.3)
    found = compare(scores(leaning_N, 0 * leaning_N), check_limit=0.4)
    assert (found.limit, found.agrees) == (0.4, True)
    assert not compare(scores(leaning_N, 0 * leaning_N), check_limit=0.2).agrees


def test_weights_are_lent_to_the_learners_model_for_no_longer_than_a_pass():
    model = make_model(LlamaConfig, tie_word_embeddings=True)
    specs = layout((n, "bfloat16", tuple(p.shape)) for n, p in model.named_parameters())
    snapshot = pack_alone(0, model, specs)
    learner = LearnerLogprobs(Policy(model, Path(), {}, "", specs), PLAIN)
    seen: list[int] = []
    embedding = learner._model.get_input_embeddings()
    for layer in learner._model.model.layers:
        layer.self_attn.register_forward_hook(
            lambda *_: seen.append(sum(not p.is_meta for p in learner._model.parameters()))
        )
    tokens = np.arange(5, dtype=np.int32)
    rollout = Rollout(tokens, np.zeros(5, dtype=np.float32), ((0, 0),), "stop")
    group = Group(1, tokens, (rollout,), ("x",), np.zeros((1, 1), dtype=np.float32))
    learner.scores(group, snapshot, torch.float32, 1.0)
    # Those of one layer (9), the embedding, which is the head too, and the last norm.
    assert seen == [11] * 3
    assert embedding.weight.is_meta


def made_group(model: Any, *spans: tuple[tuple[int, int], ...], length: int = 8) -> Group:
    """Rollouts of so many random tokens, sampled from these versions."""
    random = np.random.default_rng(0)

    def ids(number: int) -> Any:
        return random.integers(0, model.config.vocab_size, number, dtype=np.int32)

    rollouts = tuple(Rollout(ids(length), np.zeros(length, np.float32), s, "stop") for s in spans)
    return Group(1, ids(5), rollouts, ("x",), np.zeros((len(spans), 1), dtype=np.float32))


def test_the_trainers_way_gives_what_the_model_gives_one_by_one():
    model = make_model(LlamaConfig)
    specs = layout((n, "float32", tuple(p.shape)) for n, p in model.named_parameters())
    policy, snapshot = Policy(model, Path(), {}, "", specs), pack_alone(0, model, specs)
    group = made_group(model, *[((0, 0),)] * 4)

    def computed(way: Way) -> torch.Tensor:
        scores = LearnerLogprobs(policy, way).scores(group, snapshot, torch.bfloat16, 0.7)
        return torch.stack([scores.learner_N, scores.gain_N, scores.rounded_N])

    plain = computed(PLAIN)
    way = choose(model, 64)
    assert way.packed
    exact, gain, rounded = (computed(way) - plain).abs()
    assert max(exact.max(), gain.max()) < 1e-4
    assert rounded.mean() < 0.02


def test_of_a_group_only_rollouts_with_tokens_of_the_version_are_compared_and_no_more_than_enough():
    model = make_model(LlamaConfig)
    specs = layout((n, "float32", tuple(p.shape)) for n, p in model.named_parameters())
    learner = LearnerLogprobs(Policy(model, Path(), {}, "", specs), PLAIN)
    snapshot = pack_alone(1, model, specs)

    def number(group: Group) -> int:
        return len(learner.scores(group, snapshot, torch.float32, 1.0).engine_N)

    assert number(made_group(model, ((0, 0),))) == 0
    assert number(made_group(model, ((0, 0),), ((0, 0), (2, 1)))) == 6
    many = made_group(model, *[((0, 1),)] * 9, length=ENOUGH_TOKENS // 4)
    assert number(many) == ENOUGH_TOKENS
