"""Checkpointed layers keep less and compute the same."""

import copy

import pytest
import torch
from torch import nn

from learner.config.training import TrainingConfig
from learner.packing import budget
from learner.packing.budget import bytes_per_token
from learner.packing.choice import choose
from learner.packing.forward import Forward
from learner.packing.probe import probe
from learner.training.masters import Masters
from learner.training.memory import prepare_layers, prepared
from protocol.errors import ConfigError
from tests.unit.learner.training.models import make_model

DROPOUT = {
    "qwen2": {"attention_dropout": 0.5},
    "llama": {"attention_dropout": 0.5},
    "gemma2": {"attention_dropout": 0.5},
    "gemma3_text": {"attention_dropout": 0.5},
    "gpt2": {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5},
    # Its layers have dropout themselves, by their own training flag.
    "opt": {"dropout": 0.5, "attention_dropout": 0.5, "ffn_dim": 96, "word_embed_proj_dim": 64},
}


def results(model) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Log-probabilities as the trainer computes them, and their gradients."""
    forward = Forward(choose(model, 100), temperature=1.0)
    return computed(model, forward)


def computed(model, forward: Forward) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    logprobs_N = forward.logprobs(model, forward.rows(probe(model, 100), torch.device("cpu")))
    model.zero_grad()
    logprobs_N.mean().backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return logprobs_N.detach(), gradients


@pytest.mark.parametrize("family", DROPOUT)
def test_log_probabilities_and_gradients_are_the_same_bit_for_bit(family):
    model = make_model(family, torch.float32, **DROPOUT[family])
    assert not model.training
    expected, gradients = results(model)
    names = [name for name, _ in model.named_parameters()]
    prepare_layers(model, checkpointed=True, compiled=False)
    assert not any(module.training for module in model.modules())
    assert [name for name, _ in model.named_parameters()] == names
    found, found_gradients = results(model)
    assert torch.equal(found, expected)
    assert found_gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert torch.equal(found_gradients[name], gradient), name


def test_layers_keep_only_what_goes_into_them():
    model = make_model("llama", num_hidden_layers=8)
    forward = Forward(choose(model, 100), temperature=1.0)
    before = bytes_per_token(model, forward, 100)
    prepare_layers(model, checkpointed=True, compiled=False)
    after = bytes_per_token(model, forward, 100)
    print(f"kept bytes a token: {before:.0f}, checkpointed {after:.0f}")
    # A layer's input is 64 float32; a layer keeps more than ten times that.
    assert after < before / 4


def test_a_pass_leaves_room_for_the_layer_that_is_computed_again(monkeypatch):
    """Eight layers: checkpointed, a pass may be larger, but by less than what is kept shrinks."""
    monkeypatch.setattr(budget, "_total_memory", lambda: 2**26)
    tokens = {}
    for checkpointed in (False, True):
        model = make_model("llama", num_hidden_layers=8)
        forward = Forward(choose(model, 100), temperature=1.0)
        training = TrainingConfig(activation_checkpointing=checkpointed)
        tokens[checkpointed] = prepared(model, forward, 100, training).most
    # 2 ** 24 / 1.25 / 37909 bytes a token = 354; of a layer 4739, and 2712 kept: 1801.
    assert tokens == {False: 256, True: 1024}
    fixed = prepared(model, forward, 100, TrainingConfig(microbatch_tokens=77))
    assert fixed == budget.Budget(77, 77)


def test_masters_get_the_same_gradients():
    gradients = []
    for checkpointed in (False, True):
        model = make_model("llama", torch.bfloat16, tie_word_embeddings=True)
        masters = Masters(model)
        if checkpointed:
            prepare_layers(model, checkpointed=True, compiled=False)
        tokens = torch.arange(12).view(2, 6)
        for _ in range(2):
            model(input_ids=tokens, labels=tokens).loss.backward()
        gradients.append([p.grad for p in masters.parameters()])
    assert all(map(torch.equal, *gradients))


def test_a_copy_of_the_model_computes_with_its_own_weights():
    model = make_model("llama")
    forward = Forward(choose(model, 100), temperature=1.0)
    prepare_layers(model, checkpointed=True, compiled=False)
    other = copy.deepcopy(model)
    expected, _ = computed(model, forward)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(computed(other, forward)[0], expected)


@pytest.mark.parametrize("option", ["checkpointed", "compiled"])
def test_a_model_without_such_layers_is_refused(option):
    with pytest.raises(ConfigError, match=r"Linear has no layers .* off"):
        prepare_layers(nn.Linear(2, 2), **{"checkpointed": False, "compiled": False, option: True})


def test_without_either_every_model_is_left_as_it_is():
    prepare_layers(nn.Linear(2, 2), checkpointed=False, compiled=False)
