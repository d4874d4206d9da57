"""Masters add up, in float32, what bfloat16 would round away."""

import math

import pytest
import torch
from torch import nn

from learner.training.masters import Masters
from tests.unit.learner.training.models import make_model

TOKENS = torch.arange(12).view(2, 6)


def loss_of(model, scale=1.0):
    return model(input_ids=TOKENS, labels=TOKENS).loss * scale


@pytest.mark.parametrize("tied", [False, True])
def test_the_skeleton_has_the_models_parameters_by_their_names_once(tied):
    model = make_model("llama", torch.bfloat16, tie_word_embeddings=tied)
    module = Masters(model).module
    assert module is not model
    named = dict(module.named_parameters())
    assert list(named) == [name for name, _ in model.named_parameters()]
    for name, parameter in model.named_parameters():
        assert named[name].dtype == torch.float32
        assert torch.equal(named[name].bfloat16(), parameter)


def test_a_float32_model_is_its_own_masters():
    model = make_model("llama", torch.float32)
    masters = Masters(model)
    assert masters.module is model
    assert masters.state_tensors() == {}
    loss_of(model).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_disabled_masters_leave_a_small_model_as_it_is():
    model = make_model("llama", torch.bfloat16)
    masters = Masters(model, enabled=False)
    assert masters.module is model
    assert masters.state_tensors() == {}


def test_parameters_that_are_float32_already_are_their_own_masters():
    model = make_model("llama", torch.bfloat16)
    model.model.norm.float()
    masters = Masters(model)
    assert dict(masters.module.named_parameters())["model.norm.weight"] is model.model.norm.weight
    assert "master.model.norm.weight" not in masters.state_tensors()


@pytest.mark.parametrize("tied", [False, True])
def test_gradients_of_several_backward_passes_are_summed_in_float32(tied):
    plain = make_model("llama", torch.bfloat16, tie_word_embeddings=tied)
    model = make_model("llama", torch.bfloat16, tie_word_embeddings=tied)
    masters = Masters(model)
    expected: dict[str, torch.Tensor] = {}
    # A bfloat16 sum would lose the small ones behind the large one.
    for scale in (1.0, 1e-3, 1e-3, 1e-3):
        loss_of(model, scale).backward()
        assert all(p.grad is None for p in model.parameters())
        plain.zero_grad()
        loss_of(plain, scale).backward()
        for name, parameter in plain.named_parameters():
            expected[name] = expected.get(name, 0.0) + parameter.grad.float()
    for name, master in masters.module.named_parameters():
        assert master.grad is not None
        assert torch.equal(master.grad, expected[name])
    masters.zero_grad()
    assert all(m.grad is None for m in masters.parameters())


def test_a_parameter_without_a_gradient_stays_as_it_is():
    model = nn.Module()
    model.used = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    model.unused = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    model.frozen = nn.Parameter(torch.ones(3, dtype=torch.bfloat16), requires_grad=False)
    masters = Masters(model)
    (model.used * model.frozen).sum().backward()
    torch.optim.AdamW(masters.parameters(), lr=0.5, weight_decay=0.1).step()
    masters.copy_back()
    assert (model.used < 1).all()
    assert (model.unused == 1).all()
    assert (model.frozen == 1).all()
    assert set(masters.state_tensors()) == {"master.used", "master.unused"}


def test_masters_begin_anywhere_in_what_rounds_to_the_weights():
    everything = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    weights = everything.view(torch.bfloat16)
    model = nn.Module()
    model.weight = nn.Parameter(weights[weights.isfinite()])
    [master] = Masters(model).parameters()
    assert torch.equal(master.bfloat16(), model.weight)
    assert torch.equal(master == 0, model.weight == 0)
    large = model.weight.float().abs() > 1e-30
    # A step of bfloat16 is 1/128 of the power of two below the weight. A master is up to half of
    # one away, a quarter on average; the average of 1/m is log 2 for m from 1 to 2.
    share = ((master - model.weight) / model.weight.float())[large]
    assert share.abs().max() < 1 / 256
    assert share.abs().mean().item() == pytest.approx(math.log(2) / 128 / 4, rel=0.02)
    [again] = Masters(model).parameters()
    [other] = Masters(model, seed=1).parameters()
    assert torch.equal(master, again)
    assert not torch.equal(master, other)


@pytest.mark.parametrize("steps", [10, 100, 1000])
def test_the_model_follows_updates_that_bfloat16_does_not_resolve(steps):
    """Below 1 its steps are 1/256: half of that is 195 updates of 1e-5, each of which it loses."""
    moved = {}
    for enabled in (True, False):
        model = nn.Module()
        model.weight = nn.Parameter(torch.full((100_000,), 0.9, dtype=torch.bfloat16))
        before = model.weight.float().mean().item()
        masters = Masters(model, enabled=enabled)
        optimizer = torch.optim.AdamW(masters.parameters(), lr=1e-5, weight_decay=0.0, fused=True)
        for _ in range(steps):
            masters.zero_grad()
            model.weight.sum().backward()
            optimizer.step()
            masters.copy_back()
        moved[enabled] = before - model.weight.float().mean().item()
    assert moved[True] == pytest.approx(steps * 1e-5, rel=0.1)
    assert moved[False] == 0


def test_copies_back_what_the_state_was_filled_with():
    model = make_model("llama", torch.bfloat16)
    masters = Masters(model)
    for tensor in masters.state_tensors().values():
        tensor.fill_(0.3)
    masters.copy_back()
    assert all((p == torch.tensor(0.3, dtype=p.dtype)).all() for p in model.parameters())
    assert all((m == 0.3).all() for m in masters.parameters())
