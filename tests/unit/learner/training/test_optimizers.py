"""The optimiser is what the configuration says, and its state goes into plain tensors and back."""

import builtins

import pytest
import torch

from learner.config.training import OptimizerConfig
from learner.training.optimizers import PolicyOptimizer
from protocol.errors import ConfigError
from tests.unit.learner.training.models import make_model

TOKENS = torch.arange(12).view(2, 6)


def train(model, optimizer: PolicyOptimizer, *, steps: int) -> list[float]:
    """Losses before each step."""
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(input_ids=TOKENS, labels=TOKENS).loss
        loss.backward()
        optimizer.clip()
        optimizer.step()
        losses.append(loss.item())
    return losses


def make(dtype: torch.dtype = torch.float32, **changes):
    model = make_model("llama", dtype)
    return model, PolicyOptimizer(model, OptimizerConfig(**{"lr": 1e-3} | changes))


def test_adamw_is_torchs():
    model, optimizer = make(betas=(0.8, 0.95), weight_decay=0.1, max_grad_norm=1e9)
    losses = train(model, optimizer, steps=3)
    plain = make_model("llama")
    torchs = torch.optim.AdamW(plain.parameters(), lr=1e-3, betas=(0.8, 0.95), weight_decay=0.1)
    for expected in losses:
        torchs.zero_grad()
        loss = plain(input_ids=TOKENS, labels=TOKENS).loss
        loss.backward()
        torchs.step()
        assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_the_gradient_is_clipped_and_its_norm_before_is_returned():
    model, optimizer = make(torch.bfloat16, max_grad_norm=0.5)
    model(input_ids=TOKENS, labels=TOKENS).loss.mul(100).backward()
    assert optimizer.clip() > 0.5
    assert optimizer.clip() == pytest.approx(0.5, rel=1e-3)


def test_the_learning_rate_is_a_share_of_the_configured_one():
    model, optimizer = make(max_grad_norm=1e9)
    before = model.lm_head.weight.detach().clone()
    optimizer.set_lr(0.5)
    optimizer.scale_lr(0.1)
    train(model, optimizer, steps=1)
    # AdamW's first step is the learning rate, 1e-3 * 0.5 * 0.1, for any gradient that is not tiny.
    assert (model.lm_head.weight - before).abs().max().item() == pytest.approx(5e-5, rel=1e-2)


def continues_the_same(dtype: torch.dtype, **changes) -> None:
    """Two steps, a checkpoint of model and optimiser, two more: with and without a restart."""
    model, optimizer = make(dtype, **changes)
    train(model, optimizer, steps=2)
    kept = {name: tensor.clone() for name, tensor in optimizer.state_tensors().items()}
    assert all(type(tensor) is torch.Tensor for tensor in kept.values())
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    losses = train(model, optimizer, steps=2)

    again, new = make(dtype, **changes)
    again.load_state_dict(weights)
    filled = new.state_tensors()
    assert filled.keys() == kept.keys()
    for name, tensor in filled.items():
        tensor.copy_(kept[name])
    new.filled()
    assert train(again, new, steps=2) == losses
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name])


@pytest.mark.parametrize("master_weights", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_its_state_continues_it_bit_for_bit(dtype, master_weights):
    continues_the_same(dtype, master_weights=master_weights)


def test_looking_at_the_state_of_a_new_one_changes_nothing():
    model, optimizer = make()
    seen, looked_at = make()
    assert all((t == 0).all() for t in looked_at.state_tensors().values())
    assert train(seen, looked_at, steps=3) == train(model, optimizer, steps=3)


def test_without_torchao_it_says_what_to_install(monkeypatch):
    real = builtins.__import__

    def without_torchao(name, *arguments, **keywords):
        if name.startswith("torchao"):
            raise ImportError("No module named 'torchao'")
        return real(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", without_torchao)
    with pytest.raises(ConfigError, match=r'pip install "async-gdpo\[8bit\]"'):
        make(kind="adamw_8bit")


@pytest.mark.filterwarnings("ignore")
def test_where_the_8_bit_step_does_not_run_it_says_so(monkeypatch):
    import sys
    from types import ModuleType

    class Broken(torch.optim.SGD):
        def step(self, closure=None):
            raise RuntimeError("no compiler here")

        def __init__(self, params, lr, **_):
            super().__init__(params, lr)

    fake = ModuleType("torchao.optim")
    fake.AdamW8bit = Broken  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torchao", ModuleType("torchao"))
    monkeypatch.setitem(sys.modules, "torchao.optim", fake)
    with pytest.raises(ConfigError, match=r"does not run on cpu: .*no compiler here"):
        make(kind="adamw_8bit")
