"""Which engine an actor runs."""

from pathlib import Path

import torch

from actors.engines import vllm_engine
from actors.engines.engine import Engine
from actors.engines.transformers_engine import TransformersEngine
from actors.engines.vllm_engine import VllmEngine
from protocol.config import ActorConfig

TRANSFORMERS_LEASES = 16
"""Groups that it decodes at once unless told otherwise: its cache has no bound of its own."""


async def start_engine(folder: Path, config: ActorConfig) -> Engine:
    """The engine that ``config`` names, with the model of ``folder``, still without weights.

    Raises `ConfigError`.
    """
    if chosen_engine(config) == "vllm":
        return await VllmEngine.start(folder, config)
    return TransformersEngine(
        folder,
        dtype=config.dtype,
        device=config.device,
        max_leases=config.max_leases or TRANSFORMERS_LEASES,
        num_rollouts=config.sampling.num_rollouts,
    )


def chosen_engine(config: ActorConfig) -> str:
    if config.engine != "auto":
        return config.engine
    on_gpu = config.device == "auto" and torch.cuda.is_available()
    return "vllm" if on_gpu and vllm_engine.is_installed() else "transformers"
