"""One vLLM engine for all tests that only read from it: it takes seconds to start."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import torch
from transformers import AutoModelForCausalLM

from actors.engines.vllm_engine import VllmEngine
from protocol.config import ActorConfig, SamplingConfig
from protocol.weights import TensorSpec, layout, total_bytes
from tests.unit.factories import pack_alone
from transfer.shared_memory import SharedMemory

MAX_PROMPT_TOKENS, MAX_TOKENS = 160, 90


@dataclass
class Served:
    """An engine, and the models whose weights it has been given, by version."""

    engine: VllmEngine
    models: dict[int, Any]
    specs: list[TensorSpec]
    memory: SharedMemory

    async def load(self, version: int) -> float:
        """Have the engine load a model; its version becomes the newest one."""
        snapshot = pack_alone(version, self.models[version], self.specs)
        self.memory.tensor.copy_(snapshot.packed)
        return await self.engine.load_weights(version, self.memory, self.specs)


def perturbed(model: Any, scale: float) -> Any:
    """The model with random changes to all of its parameters."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter += scale * parameter.std() * noise
    return model


@pytest.fixture(scope="session")
def load_model(base_folder: Path) -> Callable[[], Any]:
    return lambda: AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32).eval()


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def served(base_folder: Path, load_model: Callable[[], Any]):
    sampling = SamplingConfig(max_prompt_tokens=MAX_PROMPT_TOKENS, max_tokens=MAX_TOKENS)
    engine = await VllmEngine.start(base_folder, ActorConfig(dtype="float32", sampling=sampling))
    models = {0: load_model(), 1: perturbed(load_model(), 0.1), 2: perturbed(load_model(), 0.3)}
    specs = layout((n, "float32", tuple(p.shape)) for n, p in models[0].named_parameters())
    served = Served(engine, models, specs, SharedMemory(total_bytes(specs)))
    yield served
    await engine.close()
