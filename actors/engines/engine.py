"""The interface of inference engines, and what an engine is asked and answers.

A new engine is a class like `Engine`, with a function that starts it in `actors.engines.choice`.
"""

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
    """Time without anything to generate."""
    stall_seconds: float = 0.0
    """Time in which generation stood still to load weights."""


class Engine(Protocol):
    """Generates groups while its weights change underneath.

    Log-probabilities are those of the sampled tokens under the distribution really sampled from,
    and every token carries the version of the weights that produced its distribution.
    """

    version: int
    """Version of the weights in use; -1 before the first `load_weights`."""

    in_place: bool
    """Whether it computes in the memory that it loads from.

    That memory must not be written to before the engine has loaded from another."""

    pinned: bool
    """Whether what it loads from should be page-locked, for a GPU."""

    @property
    def stats(self) -> EngineStats:
        """Totals until now."""
        ...

    @property
    def stalled_s(self) -> float:
        """Seconds since its last progress; 0 while it has nothing to do."""
        ...

    def raise_if_dead(self) -> None:
        """Raise `EngineError` if the engine cannot go on."""
        ...

    async def generate(self, request: Request) -> list[Rollout]:
        """Complete a prompt; cancelling the call ends the generation.

        Raises `UnusableRow` for a request that the engine does not take, and `EngineError` when it
        is dead or closed.
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
        `in_place`, one of two in turn. Returns the seconds in which generation stood still.
        """
        ...

    def digests(self, specs: list[TensorSpec]) -> bytes | None:
        """Digest of each parameter in the engine's own copy (`protocol.weights`).

        None from an engine that has no such copy: it computes in the memory that it loaded from,
        or has fused and repacked what it read there. Blocks, while the engine generates; not to be
        called while weights are loaded.
        """
        ...

    async def close(self) -> None:
        """Stop; unfinished requests raise `EngineError`."""
        ...
