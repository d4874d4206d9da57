"""What the rollout loop needs of an inference engine: the seam to transformers and others."""

from dataclasses import dataclass
from typing import Protocol

from protocol.errors import AsyncGdpoError
from protocol.groups import Rollout
from protocol.weights import TensorSpec
from transfer.shared_memory import SharedMemory


class UnusableRow(AsyncGdpoError):
    """A data row that cannot be rolled out."""


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt to be completed ``num_rollouts`` times."""

    prompt_tokens: tuple[int, ...]
    num_rollouts: int
    temperature: float
    """0 takes the most likely token, and records its log-probability at temperature 1."""
    max_tokens: int
    seed: int
    """Rollout j draws from the stream (seed, j), whatever else is in the batch."""


@dataclass(slots=True)
class EngineStats:
    """Totals since the start of the engine."""

    tokens_generated: int = 0
    idle_seconds: float = 0.0
    """Nothing to generate."""
    stall_seconds: float = 0.0
    """Generation stood still to load weights."""


class Engine(Protocol):
    """Generates groups while its weights change underneath.

    Log-probabilities are of the sampled tokens under the distribution really sampled from, and
    every token carries the version of the weights that produced its distribution.
    """

    version: int
    """Of the weights in use; -1 before the first `load_weights`."""

    in_place: bool
    """Whether it computes in the memory that it loads from, which must not be written to then
    before it has loaded from another."""

    pinned: bool
    """Whether what it loads from should be page-locked, for a GPU."""

    @property
    def stats(self) -> EngineStats: ...

    @property
    def stalled_s(self) -> float:
        """Seconds since it began what it is doing now; 0 while it has nothing to do."""
        ...

    def raise_if_dead(self) -> None:
        """Raise `EngineError` if it can be of no more use."""
        ...

    async def generate(self, request: Request) -> list[Rollout]:
        """Complete a prompt; raises `UnusableRow` for a request that the engine does not take, and
        `EngineError` when it is dead or closed.

        Cancelling it ends the generation.
        """
        ...

    def capacity(self, active: int, num_rollouts: int) -> int:
        """Leases that it can make use of now, including the ``active`` ones that it has.

        A lease is ``num_rollouts`` sequences.
        """
        ...

    async def load_weights(
        self, version: int, memory: SharedMemory, specs: list[TensorSpec]
    ) -> float:
        """Switch to new weights between two tokens; requests in flight continue under them.

        ``memory`` is laid out by ``specs``, and always the same one; for an engine that computes
        `in_place`, one of two in turn.
        Returns the seconds in which generation stood still.
        """
        ...

    def digests(self, specs: list[TensorSpec]) -> bytes | None:
        """Digest of each parameter in its own copy of them (`protocol.weights`), while it
        generates.

        None from an engine that has no such copy: it computes in the memory that it loaded from,
        or has fused and repacked what it read there.
        Blocks; not to be called while weights are loaded.
        """
        ...

    async def close(self) -> None:
        """Stop; unfinished requests raise `EngineError`."""
        ...
