"""The worker extension, which vLLM runs in the engine's process.

`actors.engines.vllm_engine` is the other side.

vLLM imports this module in every worker process before it loads a model, and in no other: so this
is where an engine is tied to its actor.
"""

import contextlib
import os
import select
from collections.abc import Iterator
from threading import Thread
from typing import Any

import torch

from actors.engines.vllm_start import ACTOR_PID
from protocol.weights import TensorSpec
from transfer.views import view


def _exit_with(pid: int) -> None:
    """End when process ``pid`` ends, even by SIGKILL: the next engine needs the GPU's memory."""
    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        os._exit(1)

    def wait() -> None:
        select.select([process], [], [])
        os._exit(1)

    Thread(target=wait, name="exit-with-actor", daemon=True).start()


_exit_with(int(os.environ[ACTOR_PID]))
# Ctrl-C in the actor's terminal is for the actor, which finishes its leases. A session's leader
# cannot leave its group, and need not.
with contextlib.suppress(PermissionError):
    os.setpgid(0, 0)


class WorkerExtension:
    """Methods that vLLM adds to its worker, in the engine's process."""

    def gdpo_load_weights(self, path: str, num_bytes: int, specs: list[list[Any]]) -> None:
        """Load all parameters from the shared memory ``path``; raises if any is left out."""
        from vllm.config import set_current_vllm_config
        from vllm.model_executor.model_loader.reload import (
            finalize_layerwise_reload,
            initialize_layerwise_reload,
        )

        worker: Any = self
        if not hasattr(worker, "gdpo_packed"):
            worker.gdpo_packed = torch.from_file(
                path, shared=True, size=num_bytes, dtype=torch.uint8
            )
        model = worker.model_runner.get_model()
        with set_current_vllm_config(worker.vllm_config):
            initialize_layerwise_reload(model)
            try:
                loaded = model.load_weights(_tensors(worker.gdpo_packed, specs))
            finally:
                finalize_layerwise_reload(model, worker.vllm_config.model_config)
        if missing := {name for name, _ in model.named_parameters()} - loaded:
            raise RuntimeError(f"no weights came for {', '.join(sorted(missing))}")
        _repack_tied_embeddings(model)


def _tensors(packed: torch.Tensor, specs: list[list[Any]]) -> Iterator[tuple[str, torch.Tensor]]:
    """Named tensors, each a copy: vLLM keeps references until a layer is complete."""
    for fields in specs:
        spec = TensorSpec(*fields)
        yield spec.name, view(packed, spec).clone()


def _repack_tied_embeddings(model: Any) -> None:
    """Renew the packed copy of the embedding that a tied head computes with on a CPU.

    vLLM makes that copy when it first loads and, in this version, not when it reloads: it would
    silently go on with the old weights.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    for module in model.modules():
        if isinstance(module, VocabParallelEmbedding) and hasattr(module, "cpu_linear"):
            module.quant_method.process_weights_after_loading(module)
