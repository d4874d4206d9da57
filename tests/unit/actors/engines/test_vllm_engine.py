"""What the vLLM engine decides without vLLM; tests/vllm has the rest."""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import get_args

import pytest

from actors.engines import choice, vllm_load, vllm_start
from actors.engines.choice import ENGINES, chosen_engine
from actors.engines.vllm_engine import VllmEngine
from actors.engines.vllm_load import EngineLoad
from actors.engines.vllm_start import VERSION
from protocol.config import ActorConfig, SamplingConfig
from protocol.errors import ConfigError


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """vLLM's settings stay in the test."""
    monkeypatch.setattr(vllm_start.os, "environ", dict(vllm_start.os.environ))


async def refusal(**config) -> str:
    with pytest.raises(ConfigError) as caught:
        await VllmEngine.start(Path("nowhere"), ActorConfig(dtype="float32", **config))
    return str(caught.value)


async def test_without_vllm_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    message = await refusal()
    assert f"install vllm=={VERSION}" in message
    assert "or use the engine transformers" in message


async def test_another_version_of_vllm_is_refused(monkeypatch):
    other = ModuleType("vllm")
    other.__version__ = "0.31.2+cpu"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", other)
    assert f"vLLM 0.31.2+cpu is installed, this actor is made for {VERSION}" in await refusal()


async def test_a_temperature_that_vllm_does_not_take_is_refused_at_once():
    message = await refusal(sampling=SamplingConfig(temperature=2.5))
    assert "sampling.temperature = 2.5: vLLM takes 2 at most" in message


@pytest.mark.parametrize(
    ("engine", "gpu", "installed", "expected"),
    [
        ("auto", True, True, "vllm"),
        ("auto", False, True, "transformers"),
        ("auto", True, False, "transformers"),
        ("vllm", False, False, "vllm"),
        ("transformers", True, True, "transformers"),
    ],
)
def test_vllm_is_taken_where_it_is_installed_and_there_is_a_gpu(
    monkeypatch, engine, gpu, installed, expected
):
    monkeypatch.setattr(choice.torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(vllm_start, "is_installed", lambda: installed)
    assert chosen_engine(ActorConfig(engine=engine)) == expected


def test_every_engine_that_a_run_can_name_can_be_started():
    allowed = get_args(ActorConfig.model_fields["engine"].annotation)
    assert set(allowed) == {"auto", *ENGINES}


# ---- How many leases ---------------------------------------------------------------------------


def make_load(max_sequences: int = 64) -> EngineLoad:
    load = EngineLoad()
    load.max_sequences = max_sequences
    return load


def report(load: EngineLoad, *, waiting: int = 0, skipped: int = 0, cache: float = 0.0) -> None:
    load._record(
        SimpleNamespace(
            num_waiting_reqs=waiting, num_skipped_waiting_reqs=skipped, kv_cache_usage=cache
        ),
        None,
    )


def test_the_first_guess_fills_the_sequences_of_the_engine():
    assert make_load(64).capacity(active=0, num_rollouts=8) == 8
    # A group larger than all of them still has to run.
    assert make_load(4).capacity(active=0, num_rollouts=8) == 1


def test_a_quarter_more_is_taken_while_nothing_waits():
    load = make_load(64)
    assert load.capacity(active=8, num_rollouts=8) == 10
    assert load.capacity(active=40, num_rollouts=8) == 50


FULL = [{"waiting": 1}, {"skipped": 1}, {"cache": 0.95}]


@pytest.mark.parametrize("state", FULL)
def test_a_full_engine_takes_no_more(state):
    load = make_load(64)
    report(load, **state)
    assert load.capacity(active=5, num_rollouts=8) == 5


@pytest.mark.parametrize("state", FULL)
def test_what_ran_without_waiting_is_taken_again_at_once(state):
    load = make_load(64)
    assert load.capacity(active=20, num_rollouts=8) == 25
    # Everything waits for a moment after a change of weights.
    report(load, **state)
    assert load.capacity(active=20, num_rollouts=8) == 20
    report(load)
    assert load.capacity(active=0, num_rollouts=8) == 20


def test_after_a_long_wait_fewer_leases_are_taken_to_be_enough(monkeypatch):
    now = 100.0
    monkeypatch.setattr(vllm_load.time, "monotonic", lambda: now)
    load = make_load(64)
    report(load, waiting=3)
    assert load.capacity(active=6, num_rollouts=8) == 6
    now += 3.0
    report(load, waiting=3)
    assert load.capacity(active=6, num_rollouts=8) == 6
    report(load)
    assert load.capacity(active=0, num_rollouts=8) == 6


def test_a_request_without_progress_is_a_stall_and_none_is_idleness():
    load = make_load()
    assert load.stalled_s == 0
    with load.request():
        assert load.stalled_s > 0
        idle = load.totals().idle_seconds
        assert load.totals().idle_seconds == idle
    assert load.stalled_s == 0
    assert load.totals().idle_seconds >= idle
