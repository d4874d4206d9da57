"""An engine without a model, for actors that are to be many, and to start and die quickly.

Tokens and log-probabilities are a pure function of (request seed, rollout, policy version), so
that whoever gets the weights wrong gets different tokens. The weights themselves are only digested.
"""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from actors.engines.engine import EngineStats, Request
from protocol.groups import Rollout
from protocol.weights import TensorSpec, whole_digest
from tests.chaos.record import Record, content
from tests.packed import packed_digests
from transfer.shared_memory import SharedMemory

TOKENS = 8
"""Of every completion; half of them before, half of them after the middle of its time."""


@dataclass(slots=True)
class Toy:
    """How the toy behaves."""

    group_s: float = 0.2
    """Time that one group takes, however many run at once."""
    start_s: float = 0.0
    """Time until the engine is there."""
    max_leases: int = 4
    record: Record | None = None


@dataclass(slots=True)
class ToyEngine:
    """See `actors.engines.engine.Engine`."""

    toy: Toy
    version: int = -1
    in_place: bool = True
    pinned: bool = False
    _packed: torch.Tensor | None = None
    _active: int = 0
    _idle_since: float | None = field(default_factory=time.monotonic)
    _stats: EngineStats = field(default_factory=EngineStats)

    @property
    def stats(self) -> EngineStats:
        since = self._idle_since
        idle = time.monotonic() - since if since is not None else 0.0
        return EngineStats(self._stats.tokens_generated, self._stats.idle_seconds + idle)

    @property
    def stalled_s(self) -> float:
        return 0.0

    def raise_if_dead(self) -> None:
        """It lives as long as its process."""

    async def generate(self, request: Request) -> list[Rollout]:
        self._begin()
        try:
            first = self.version
            await asyncio.sleep(self.toy.group_s / 2)
            second = self.version
            await asyncio.sleep(self.toy.group_s / 2)
        finally:
            self._end()
        length = min(TOKENS, request.max_tokens)
        self._stats.tokens_generated += length * request.num_rollouts
        return [
            toy_rollout(request.seed, number, length, first, second)
            for number in range(request.num_rollouts)
        ]

    def capacity(self, active: int, num_rollouts: int) -> int:
        return self.toy.max_leases

    async def load_weights(
        self, version: int, memory: SharedMemory, specs: list[TensorSpec]
    ) -> float:
        started = time.monotonic()
        record = self.toy.record
        if record is not None and self._packed is not None:
            # Nothing may have written there while they were in use.
            record.write("replaced", version=self.version, content=content(self._packed))
        packed = self._packed = memory.tensor
        self.version = version
        if record is not None:
            digest = whole_digest(packed_digests(packed, specs), specs)
            record.write("loaded", version=version, digest=digest, content=content(packed))
        return time.monotonic() - started

    def digests(self, specs: list[TensorSpec]) -> bytes | None:
        return None

    async def close(self) -> None:
        """Nothing to stop."""

    def _begin(self) -> None:
        if self._idle_since is not None:
            self._stats.idle_seconds += time.monotonic() - self._idle_since
            self._idle_since = None
        self._active += 1

    def _end(self) -> None:
        self._active -= 1
        if self._active == 0:
            self._idle_since = time.monotonic()


def toy_rollout(seed: int, number: int, length: int, first: int, second: int) -> Rollout:
    """``length`` tokens, the first half of version ``first``, the others of ``second``."""
    middle = length // 2
    halves = [
        np.random.default_rng([seed, number, version]).integers(3, 40, size=length)[part]
        for version, part in ((first, slice(None, middle)), (second, slice(middle, None)))
    ]
    tokens = np.concatenate(halves).astype(np.int32)
    spans = ((0, first),) if first == second else ((0, first), (middle, second))
    return Rollout(
        tokens=tokens,
        logprobs=-1.0 - tokens.astype(np.float32) / 40,
        spans=spans,
        finish="length",
    )


def use_toy(toy: Toy) -> None:
    """Actors of this process generate with toys from now on."""
    import actors.build

    async def start(*_: object) -> ToyEngine:
        await asyncio.sleep(toy.start_s)
        return ToyEngine(toy)

    # Through the name by which the actor knows it, which is what tests of the start wrap too.
    starter: Callable[..., object] = start
    setattr(actors.build, "start_engine", starter)  # noqa: B010
