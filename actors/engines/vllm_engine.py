"""The vLLM engine, behind `actors.engines.engine.Engine`.

    actor process                              engine process (of vLLM)
    requests ────────── AsyncLLM ────────────► scheduler, worker(s)
    weights  ──► shared memory ◄── mapped ──── `WorkerExtension`: loads between two steps

Weights arrive in memory that the worker has mapped, while it generates. Only the switch stops it:

    pause ("keep", caches cleared) ─► load ─► set the version ─► resume

Requests in flight go on: their keys and values are computed anew under the new weights, and vLLM
itself notes from which token on. So no request uses keys or values of older weights, nor does a
later one through the prefix cache.

Made for, and checked against, one version of vLLM: its interface for weights changes. Only the
modules named ``vllm_...`` import vLLM.
"""

import asyncio
import contextlib
import time
import uuid
from collections.abc import Awaitable, Iterator
from dataclasses import astuple, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from actors.engines.engine import EngineStats, Request, UnusableRow
from actors.engines.model_files import end_ids
from actors.engines.vllm_load import EngineLoad
from actors.engines.vllm_start import prepare_environment, start_vllm
from actors.threads import in_daemon_thread
from protocol.config import ActorConfig
from protocol.errors import ConfigError, EngineError, brief
from protocol.groups import Rollout
from protocol.weights import TensorSpec
from transfer.shared_memory import SharedMemory

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM

MAX_TEMPERATURE = 2.0
LIVENESS_S = 0.5
"""Time between two looks at whether the engine's process is still there."""


class VllmEngine:
    """Continuous batching by vLLM; see `actors.engines.engine.Engine`. Made by `start`."""

    def __init__(
        self, engine: "AsyncLLM", load: EngineLoad, end_ids: frozenset[int], timeout_s: float
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
        """Memory that the worker has mapped; None before the first weights."""

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
        prepare_environment()
        load = EngineLoad()
        # It takes seconds on a CPU and a minute on a GPU, in which the event loop has to go on.
        engine = await in_daemon_thread("start-vllm", lambda: start_vllm(folder, config, load))
        load.max_sequences = engine.scheduler_config.max_num_seqs
        return cls(engine, load, end_ids(folder), config.engine_timeout_s)

    @property
    def stats(self) -> EngineStats:
        """Totals, including the time idle until now."""
        return replace(self._load.totals(), stall_seconds=self._stall_seconds)

    @property
    def stalled_s(self) -> float:
        """Seconds since vLLM's last progress, or since loading began."""
        since = self._loading_since
        return max(self._load.stalled_s, time.monotonic() - since if since else 0.0)

    def capacity(self, active: int, num_rollouts: int) -> int:
        """Leases that keep vLLM busy; see `actors.engines.vllm_load.EngineLoad`."""
        return self._load.capacity(active, num_rollouts)

    async def generate(self, request: Request) -> list[Rollout]:
        """Complete a prompt; raises `UnusableRow` or `EngineError`."""
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
        """Pause, load and go on; returns the seconds that it took, raises `EngineError`."""
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
        """None: vLLM has no copy of the parameters as they were sent."""
        # vLLM fuses, splits and repacks: what it computes is compared with the learner's model
        # instead, when an actor joins.
        return None

    async def close(self) -> None:
        """Shut vLLM down; unfinished requests raise `EngineError`."""
        self._failure = EngineError("the engine is closed")
        await in_daemon_thread("close-engine", partial(self._engine.shutdown, timeout=5.0))

    def raise_if_dead(self) -> None:
        """Raise `EngineError` if vLLM's process has died, or loading failed."""
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
