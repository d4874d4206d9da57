"""The engine as actors use it: empty until it gets weights, never half loaded."""

import asyncio
from dataclasses import replace
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from actors.engines.batch_generator import Ahead
from actors.engines.engine import Request
from actors.engines.prepared_weights import PreparedWeights
from actors.engines.transformers_engine import TransformersEngine, groups_at_once
from protocol.errors import ConfigError, EngineError
from protocol.weights import TensorSpec, layout, total_bytes
from tests.packed import shared
from tests.unit.factories import pack_alone


def load(folder: Path):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    manifest = [(n, "float32", tuple(p.shape)) for n, p in model.named_parameters()]
    return model, layout(manifest)


def make_engine(folder: Path) -> TransformersEngine:
    return TransformersEngine(folder, dtype="float32", device="cpu", max_leases=8, num_rollouts=4)


def make_request(max_tokens: int = 16, temperature: float = 0.0) -> Request:
    return Request(
        prompt_tokens=(7, 20, 30),
        num_rollouts=2,
        temperature=temperature,
        max_tokens=max_tokens,
        seed=1,
    )


@pytest.mark.parametrize("in_place", [True, False])
async def test_weights_from_the_learner_give_its_digest_and_its_generations(base_folder, in_place):
    model, specs = load(base_folder)
    snapshot = pack_alone(5, model, specs)
    engine = make_engine(base_folder)
    assert engine.in_place
    # As on a GPU.
    engine.in_place = in_place
    seconds = await engine.load_weights(5, shared(snapshot.packed), specs)
    assert engine.digests(specs) == (None if in_place else snapshot.digests)
    assert engine.version == 5
    assert seconds >= 0
    rollouts = await engine.generate(make_request())
    expected = model.generate(torch.tensor([[7, 20, 30]]), max_new_tokens=16, do_sample=False)[
        0, 3:
    ]
    assert rollouts[0].tokens.tolist() == expected.tolist()
    assert rollouts[0].spans == ((0, 5),)
    assert engine.stats.tokens_generated == sum(len(r.tokens) for r in rollouts)
    await engine.close()


async def test_a_request_in_flight_continues_under_new_weights(base_folder):
    model, specs = load(base_folder)
    engine = make_engine(base_folder)
    first, second = (shared(pack_alone(version, model, specs).packed) for version in (0, 1))
    await engine.load_weights(0, first, specs)
    # Without an end token in sight the request runs until its limit.
    running = asyncio.create_task(engine.generate(make_request(max_tokens=200, temperature=50.0)))
    while engine.stats.tokens_generated < 20:
        await asyncio.sleep(0)
    await engine.load_weights(1, second, specs)
    rollouts = await running
    assert any([version for _, version in r.spans] == [0, 1] for r in rollouts)
    await engine.close()


async def test_generation_goes_on_while_rows_in_flight_are_computed_ahead(base_folder, monkeypatch):
    model, specs = load(base_folder)
    engine = make_engine(base_folder)
    engine._generator._eos_ids = frozenset()
    await engine.load_weights(0, shared(pack_alone(0, model, specs).packed), specs)
    running = asyncio.create_task(engine.generate(make_request(max_tokens=220, temperature=50.0)))
    while engine.stats.tokens_generated < 10:
        await asyncio.sleep(0.001)
    may_end, compute = Event(), Ahead.compute
    monkeypatch.setattr(Ahead, "compute", lambda ahead: may_end.wait(20) and compute(ahead))
    second = shared(pack_alone(1, model, specs).packed)
    loading = asyncio.create_task(engine.load_weights(1, second, specs))
    before = engine.stats.tokens_generated
    while engine.stats.tokens_generated < before + 20:
        await asyncio.sleep(0.001)
    assert engine.version == 0 and not loading.done()
    may_end.set()
    await loading
    rollouts = await running
    assert [version for _, version in rollouts[0].spans] == [0, 1]
    await engine.close()


async def test_an_engine_that_cannot_compute_ahead_dies_and_says_why(base_folder, monkeypatch):
    model, specs = load(base_folder)
    engine = make_engine(base_folder)
    await engine.load_weights(0, shared(pack_alone(0, model, specs).packed), specs)
    running = asyncio.create_task(engine.generate(make_request(max_tokens=220, temperature=50.0)))
    while engine.stats.tokens_generated < 10:
        await asyncio.sleep(0.001)

    def fails(ahead: Ahead) -> None:
        raise MemoryError("no room for the cache")

    monkeypatch.setattr(Ahead, "compute", fails)
    with pytest.raises(EngineError, match="no room for the cache"):
        await engine.load_weights(1, shared(pack_alone(1, model, specs).packed), specs)
    with pytest.raises(EngineError, match="no room for the cache"):
        await running


async def test_cancelling_a_request_ends_its_generation(base_folder):
    model, specs = load(base_folder)
    engine = make_engine(base_folder)
    await engine.load_weights(0, shared(pack_alone(0, model, specs).packed), specs)
    running = asyncio.create_task(engine.generate(make_request(max_tokens=220, temperature=50.0)))
    while engine.stats.tokens_generated < 10:
        await asyncio.sleep(0)
    assert engine.stalled_s > 0
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    while engine.stalled_s > 0:
        await asyncio.sleep(0)
    # Far from the 2 * 220 tokens that it would have taken.
    assert engine.stats.tokens_generated < 300
    await engine.close()


async def test_closing_ends_requests_in_flight(base_folder):
    model, specs = load(base_folder)
    engine = make_engine(base_folder)
    await engine.load_weights(0, shared(pack_alone(0, model, specs).packed), specs)
    running = asyncio.create_task(engine.generate(make_request(max_tokens=220, temperature=50.0)))
    await asyncio.sleep(0)
    await engine.close()
    with pytest.raises(EngineError, match="closed"):
        await running
    with pytest.raises(EngineError, match="closed"):
        await engine.generate(make_request())


async def test_an_engine_that_dies_tells_every_caller_why(base_folder):
    engine = make_engine(base_folder)
    wrong = [TensorSpec("no.such.weight", "float32", (1,), 0, 4)]
    with pytest.raises(EngineError, match=r"no\.such\.weight"):
        await engine.load_weights(0, shared(torch.zeros(4, dtype=torch.uint8)), wrong)
    with pytest.raises(EngineError, match=r"no\.such\.weight"):
        await engine.generate(make_request())
    await engine.close()


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("change", ["shape", "dtype"])
def test_weights_that_do_not_fit_change_nothing(base_folder, in_place, change):
    model, specs = load(base_folder)
    before = pack_alone(0, model, specs).digest
    last = specs[-1]
    changes: dict[str, dict[str, Any]] = {
        "shape": {"shape": (*last.shape, 1)},
        "dtype": {"dtype": "bfloat16"},
    }
    specs[-1] = replace(last, **changes[change])
    packed = torch.zeros(last.offset + last.num_bytes, dtype=torch.uint8)
    with pytest.raises(EngineError, match=last.name):
        PreparedWeights(model, packed, specs, in_place=in_place)
    assert pack_alone(0, model, load(base_folder)[1]).digest == before


@pytest.mark.parametrize("in_place", [True, False])
def test_weights_are_taken_with_tied_parameters_once(base_folder, in_place):
    """And in place they are the memory itself, so that nothing is copied."""
    model, specs = load(base_folder)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied
    snapshot = pack_alone(1, load(base_folder)[0], specs)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    PreparedWeights(model, snapshot.packed, specs, in_place=in_place).assign()
    assert pack_alone(0, model, specs).digest == snapshot.digest
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    snapshot.packed.zero_()
    assert (model.get_input_embeddings().weight.abs().sum() == 0) == in_place


@pytest.mark.parametrize("in_place", [True, False])
def test_prepared_weights_are_those_that_come_later(in_place):
    """Also of a parameter that mixed types leave without alignment, which has no lasting view."""
    model = torch.nn.Module()
    model.register_parameter("a", torch.nn.Parameter(torch.empty(1, dtype=torch.bfloat16)))
    model.register_parameter("b", torch.nn.Parameter(torch.empty(2)))
    specs = layout([("a", "bfloat16", (1,)), ("b", "float32", (2,))])
    packed = torch.empty(total_bytes(specs), dtype=torch.uint8)
    prepared = PreparedWeights(model, packed, specs, in_place=in_place)
    for value in (1.0, 2.0):
        packed[:2] = torch.tensor([value], dtype=torch.bfloat16).view(torch.uint8)
        packed[2:] = torch.tensor([value, -value]).view(torch.uint8)
        prepared.assign()
        assert [p.tolist() for p in model.parameters()] == [[value], [value, -value]]


async def test_a_folder_without_a_model_is_the_users_mistake(tmp_path):
    with pytest.raises(ConfigError, match="cannot be built"):
        make_engine(tmp_path)


@pytest.mark.parametrize(
    ("parameters", "device", "num_rollouts", "expected"),
    [
        (280_000, "cpu", 4, 35),  # 142 rows
        (1_000_000, "cpu", 4, 32),  # 128 rows
        (1_000_000, "cpu", 16, 16),
        (1_000, "cpu", 4, 64),
        (280_000, "cuda", 4, 16),
    ],
)
def test_of_a_small_model_more_groups_are_decoded_at_once(
    parameters, device, num_rollouts, expected
):
    parameter = SimpleNamespace(numel=lambda: parameters)
    model = SimpleNamespace(device=torch.device(device), parameters=lambda: [parameter])
    assert groups_at_once(model, num_rollouts) == expected
