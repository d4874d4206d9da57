"""The engines that an actor can run, and the choice of one.

A new engine is a module here with a class like `actors.engines.engine.Engine`, a line in `ENGINES`,
and its name among those that `protocol.config.ActorConfig` allows.
"""

from collections.abc import Awaitable, Callable
from pathlib import Path

import torch

from actors.engines import vllm_start
from actors.engines.engine import Engine
from actors.engines.transformers_engine import TransformersEngine
from actors.engines.vllm_engine import VllmEngine
from protocol.config import ActorConfig

ENGINES: dict[str, Callable[[Path, ActorConfig], Awaitable[Engine]]] = {
    "transformers": TransformersEngine.start,
    "vllm": VllmEngine.start,
}


async def start_engine(folder: Path, config: ActorConfig) -> Engine:
    """Start the engine that ``config`` names, with the model of ``folder``, still without weights.

    Raises `ConfigError`.
    """
    return await ENGINES[chosen_engine(config)](folder, config)


def chosen_engine(config: ActorConfig) -> str:
    """The name of the engine that ``config`` leads to on this machine."""
    if config.engine != "auto":
        return config.engine
    on_gpu = config.device == "auto" and torch.cuda.is_available()
    return "vllm" if on_gpu and vllm_start.is_installed() else "transformers"
