"""``gdpo`` for a test, with an engine that takes so many seconds to load.

python -m tests.integration.slow_load SECONDS actor --learner URL
"""

import asyncio
import sys

from actors.engines.transformers_engine import TransformersEngine
from deploy.cli import main
from protocol.process import leave
from protocol.weights import TensorSpec
from transfer.shared_memory import SharedMemory

_load_weights = TransformersEngine.load_weights


async def load_slowly(
    self: TransformersEngine, version: int, memory: SharedMemory, specs: list[TensorSpec]
) -> float:
    await asyncio.sleep(_load_s)
    return await _load_weights(self, version, memory, specs)


if __name__ == "__main__":
    _load_s = float(sys.argv[1])
    TransformersEngine.load_weights = load_slowly  # type: ignore[method-assign]
    leave(main(sys.argv[2:]))
