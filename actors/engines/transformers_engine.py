"""The `transformers` engine: `BatchGenerator` on its own thread, behind the async interface."""

import asyncio
import queue
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any, Self

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.initialization import no_init_weights

from actors.engines import cached_attention
from actors.engines.batch_generator import Ahead, BatchGenerator
from actors.engines.engine import EngineStats, Request
from actors.engines.model_files import end_ids
from actors.engines.prepared_weights import ModelWeights
from actors.threads import in_daemon_thread
from protocol.config import ActorConfig
from protocol.errors import ConfigError, EngineError, brief
from protocol.groups import Rollout
from protocol.weights import TensorSpec
from transfer.shared_memory import SharedMemory

CLOSE_TIMEOUT_S = 2.0
"""Time to finish the token at hand; `actors.actor.DRAIN_TIMEOUT_S` relies on it."""
GROUPS, MOST_GROUPS = 16, 64
"""Groups decoded at once unless told otherwise, and for small models: see `groups_at_once`. The
cache has no bound of its own."""
PASS_PRODUCTS = 40_000_000
"""Multiplications that take a core about as long as all else in a forward pass does."""


class TransformersEngine:
    """Runs anywhere torch runs; see `actors.engines.engine.Engine`."""

    def __init__(
        self, folder: Path, *, dtype: str, device: str, max_leases: int | None, num_rollouts: int
    ) -> None:
        """Decodes ``max_leases`` groups of ``num_rollouts`` at once; raises `ConfigError`."""
        self._stats = EngineStats()
        self.version = -1
        model = _empty_model(folder, dtype, device)
        self._max_leases = max_leases or groups_at_once(model, num_rollouts)
        self._weights = ModelWeights(model)
        self.pinned = next(model.parameters()).device.type == "cuda"
        self.in_place = next(model.parameters()).device.type == "cpu"
        self._generator = BatchGenerator(
            model, eos_ids=end_ids(folder), max_rows=self._max_leases * num_rollouts
        )
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._futures: dict[int, asyncio.Future[list[Rollout]]] = {}
        self._next_key = 0
        self._failure: EngineError | None = None
        self._working_since: float | None = None
        self._idle_since: float | None = None
        self._loop = asyncio.get_running_loop()
        self._thread = Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @classmethod
    async def start(cls, folder: Path, config: ActorConfig) -> Self:
        """Start with the model of ``folder``, still without weights; raises `ConfigError`."""
        return cls(
            folder,
            dtype=config.dtype,
            device=config.device,
            max_leases=config.max_leases,
            num_rollouts=config.sampling.num_rollouts,
        )

    @property
    def stats(self) -> EngineStats:
        """Totals, including the time idle until now."""
        since = self._idle_since
        idle = self._stats.idle_seconds + (time.monotonic() - since if since else 0.0)
        return replace(self._stats, idle_seconds=idle)

    @property
    def stalled_s(self) -> float:
        """Seconds since the last token or command; 0 while there is nothing to do."""
        since = self._working_since
        return time.monotonic() - since if since else 0.0

    def capacity(self, active: int, num_rollouts: int) -> int:
        """Leases that fit into the batch."""
        return self._max_leases

    async def generate(self, request: Request) -> list[Rollout]:
        """Complete a prompt; raises `EngineError`."""
        self.raise_if_dead()
        key, self._next_key = self._next_key, self._next_key + 1
        future: asyncio.Future[list[Rollout]] = self._loop.create_future()
        self._futures[key] = future
        self._commands.put(lambda: self._generator.add(key, request))
        try:
            return await future
        finally:
            del self._futures[key]
            if future.cancelled():
                self._commands.put(lambda: self._generator.abort(key))

    async def load_weights(
        self, version: int, memory: SharedMemory, specs: list[TensorSpec]
    ) -> float:
        """Switch to new weights between two tokens.

        Returns the seconds for which generation stood still. In place the rows in flight are
        computed with the new weights before, on another thread, while they go on with the old ones.
        """
        self.raise_if_dead()
        future: asyncio.Future[float] = self._loop.create_future()
        stall_s = 0.0

        def load() -> None:
            nonlocal stall_s
            started = time.monotonic()
            model = self._weights.load(memory, specs, in_place=self.in_place)
            ahead = self._generator.ahead(model) if self.in_place else None
            stall_s = time.monotonic() - started
            if ahead is None or not ahead.rows:
                switch(ahead)
            else:
                Thread(target=compute, args=(ahead,), name="ahead", daemon=True).start()

        def compute(ahead: Ahead) -> None:
            try:
                ahead.compute()
            except Exception as error:
                self._commands.put(partial(_raise, error))
            else:
                self._commands.put(lambda: switch(ahead))

        def switch(ahead: Ahead | None) -> None:
            started = time.monotonic()
            self._generator.weights_changed(version, ahead)
            self.version = version
            seconds = stall_s + time.monotonic() - started
            self._stats.stall_seconds += seconds
            self._resolve(future, seconds)

        self._commands.put(load)
        seconds: float = await self._or_failure(future)
        return seconds

    def digests(self, specs: list[TensorSpec]) -> bytes | None:
        """Digests of the model's parameters; None where it computes in the memory given to it."""
        if self.in_place:
            return None
        return self._weights.digests(specs)

    async def close(self) -> None:
        """Stop after the token at hand; unfinished requests raise `EngineError`."""
        self._commands.put(None)
        await in_daemon_thread("close-engine", partial(self._thread.join, CLOSE_TIMEOUT_S))
        self._fail(EngineError("the engine is closed"))

    # --- on the engine's thread -----------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._obey_commands():
                self._generate()
        except EngineError as error:
            self._loop.call_soon_threadsafe(self._fail, error)
        except Exception as error:
            failure = EngineError(f"the engine died: {type(error).__name__}: {error}")
            failure.__cause__ = error
            self._loop.call_soon_threadsafe(self._fail, failure)

    def _obey_commands(self) -> bool:
        """Do what is queued, and wait for more while there is nothing to generate.

        Returns False when the engine is to stop.
        """
        while True:
            try:
                command = self._commands.get_nowait()
            except queue.Empty:
                if self._generator.busy:
                    return True
                self._working_since, self._idle_since = None, time.monotonic()
                command = self._commands.get()
                self._stats.idle_seconds += time.monotonic() - self._idle_since
                self._idle_since = None
            if command is None:
                return False
            self._working_since = time.monotonic()
            command()

    def _generate(self) -> None:
        self._working_since = time.monotonic()
        num_tokens, finished = self._generator.step()
        self._stats.tokens_generated += num_tokens
        for key, rollouts in finished:
            future = self._futures.get(key)
            if future is not None:
                self._resolve(future, rollouts)

    def _resolve(self, future: asyncio.Future[Any], result: Any) -> None:
        def resolve() -> None:
            if not future.done():
                future.set_result(result)

        self._loop.call_soon_threadsafe(resolve)

    # --- failure --------------------------------------------------------------------------------

    def raise_if_dead(self) -> None:
        """Raise the error that ended the engine."""
        if self._failure is not None:
            raise self._failure

    async def _or_failure(self, future: asyncio.Future[Any]) -> Any:
        key, self._next_key = self._next_key, self._next_key + 1
        self._futures[key] = future
        try:
            return await future
        finally:
            self._futures.pop(key, None)

    def _fail(self, failure: EngineError) -> None:
        self._failure = self._failure or failure
        for future in self._futures.values():
            if not future.done():
                future.set_exception(self._failure)


def _raise(error: Exception) -> None:
    raise error


def groups_at_once(model: Any, num_rollouts: int) -> int:
    """Groups that it pays to decode together.

    On a CPU, a pass of a small model takes as long for a few rows as for many: it gets as many as
    take that time again. For larger models more rows only make each token later.
    """
    if model.device.type != "cpu":
        return GROUPS
    rows: int = PASS_PRODUCTS // sum(parameter.numel() for parameter in model.parameters())
    return min(MOST_GROUPS, max(GROUPS, rows // num_rollouts))


def _empty_model(folder: Path, dtype: str, device: str) -> Any:
    """The model of a configuration, without weights: they come from the learner."""
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        with no_init_weights(), torch.device(_resolve_device(device)):
            model: Any = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                config,
                dtype=getattr(torch, dtype),
                trust_remote_code=False,
            )
    except (OSError, ValueError, KeyError, RuntimeError, AssertionError) as error:
        raise ConfigError(f"the learner's model cannot be built here: {brief(error)}") from error
    # Tying is part of the initialisation that was left out.
    model.tie_weights()
    cached_attention.use(model)
    return model.requires_grad_(False)


def _resolve_device(device: str) -> str:
    if device != "auto":
        return device
    return "cuda" if torch.cuda.is_available() else "cpu"
