"""What torch compiles: layers, and the step of torchao's optimiser. Compilers are processes."""

import copy

import pytest
import torch

from learner.packing.budget import bytes_per_token
from learner.packing.choice import choose
from learner.packing.forward import Forward
from learner.packing.probe import probe
from learner.training.memory import prepare_layers
from tests.unit.learner.training.models import make_model
from tests.unit.learner.training.test_optimizers import continues_the_same, make, train

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def computed(model, forward: Forward, num_trees: int) -> tuple[torch.Tensor, torch.Tensor]:
    trees = probe(model, 100) * num_trees
    logprobs_N = forward.logprobs(model, forward.rows(trees, torch.device("cpu")))
    model.zero_grad()
    logprobs_N.mean().backward()
    return logprobs_N.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.filterwarnings("ignore")  # torch's own, of its compiler.
@pytest.mark.parametrize("checkpointed", [False, True])
def test_compiled_layers_compute_the_same_for_any_number_of_tokens(checkpointed):
    model = make_model("qwen2")
    forward = Forward(choose(model, 100), temperature=1.0)
    unprepared = bytes_per_token(model, forward, 100)
    expected = [computed(model, forward, num_trees) for num_trees in (1, 2, 3)]
    prepare_layers(model, checkpointed=checkpointed, compiled=True)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for num_trees, (logprobs_N, gradient) in zip((1, 2, 3), expected, strict=True):
        found_N, found_gradient = computed(model, forward, num_trees)
        assert (found_N - logprobs_N).abs().max() < 1e-5
        assert (found_gradient - gradient).abs().max() < 1e-5
        if num_trees == 1:
            compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
            assert compiled > 0
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == compiled
    kept = bytes_per_token(model, forward, 100)
    assert kept < 0.3 * unprepared if checkpointed else kept > 0.3 * unprepared

    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert (computed(other, forward, 1)[0] - expected[0][0]).abs().max() < 1e-5


@pytest.mark.filterwarnings("ignore")  # torchao's and torch's own, about each other.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_moments_in_8_bits_train_and_continue_bit_for_bit(dtype):
    pytest.importorskip("torchao", reason="the extra 8bit is not installed")
    continues_the_same(dtype, kind="adamw_8bit")
    model, optimizer = make(dtype, kind="adamw_8bit")
    optimizer.set_lr(0.5)
    before = model.lm_head.weight.detach().clone()
    losses = train(model, optimizer, steps=8)
    assert losses[-1] < losses[0]
    assert not torch.equal(before, model.lm_head.weight)
    codes = optimizer.state_tensors()["state.model.layers.0.mlp.up_proj.weight.exp_avg.codes"]
    assert codes.dtype == torch.uint8
    assert codes.count_nonzero() > 0
