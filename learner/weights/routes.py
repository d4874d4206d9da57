"""The route by which each actor gets a push."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from learner.config.run import RunConfig
from learner.registry import ActorState
from protocol.errors import ConfigError
from protocol.machine import machine_id
from protocol.messages import Route
from transfer.backends import gpu_identity, nccl_available

MAX_PUSHES_OUT = 63


@dataclass(frozen=True, slots=True)
class Topology:
    """Where the learner is, as far as routes depend on it."""

    backend: Literal["gloo", "nccl", "shared", "stream"]
    machine: str
    device: torch.device
    """The device of the model in training; NCCL sends from there."""
    gpu: str
    """UUID of that GPU; empty without, or if NCCL cannot use it."""


def topology_of(config: RunConfig, device: torch.device) -> Topology:
    """Find out where a learner with its model on ``device`` is; raises `ConfigError`."""
    gpu = gpu_identity(device) if nccl_available() else ""
    backend = config.weights.backend
    if config.all_pull:
        backend = "stream"
    elif backend == "auto":
        backend = "nccl" if gpu else "gloo"
    if backend == "nccl" and not gpu:
        raise ConfigError(
            f'weights.backend = "nccl" needs the model on a GPU and a torch with NCCL; it is on '
            f'{device.type}: take "gloo", or leave it out'
        )
    return Topology(backend, machine_id(), device, gpu)


def plan_routes(actors: Sequence[ActorState], learner: Topology) -> dict[str, Route]:
    """Return the route of each session.

    NCCL takes one rank a GPU: an actor on the learner's, or a second one on another, gets its
    weights through the memory of the machine, or by stream where that is another.
    """
    routes: dict[str, Route] = {}
    taken = {learner.gpu, ""}
    for actor in actors:
        near = bool(learner.machine) and actor.hello.machine == learner.machine
        if learner.backend == "gloo" or (
            learner.backend == "nccl" and actor.hello.gpu not in taken
        ):
            routes[actor.session] = "collective"
            taken.add(actor.hello.gpu)
        elif near and learner.backend != "stream":
            routes[actor.session] = "shared"
        else:
            routes[actor.session] = "stream"
    return routes


@dataclass(slots=True)
class Probation:
    """Actors that made broadcasts fail stay out of the next 0, 1, 3, 7 ... pushes.

    So one that no broadcast reaches costs the others a deadline less and less often, and one that
    was unlucky once costs nothing.
    """

    _failures: dict[str, int] = field(default_factory=dict)
    """How many in a row, by session."""
    _out: dict[str, int] = field(default_factory=dict)
    """Pushes that are left."""

    def failed(self, session: str) -> None:
        """Keep an actor out of the next pushes: a broadcast failed because of it."""
        count = self._failures[session] = self._failures.get(session, 0) + 1
        # One more, because the push that follows counts it down first.
        self._out[session] = min(2 ** (count - 1), MAX_PUSHES_OUT + 1)

    def passed(self, session: str) -> None:
        """Forget the failures of an actor that a broadcast reached."""
        self._failures.pop(session, None)

    def admits(self, session: str) -> bool:
        """Whether an actor may be in a broadcast now."""
        return not self._out.get(session)

    def next_push(self, live: set[str]) -> None:
        """Count another push; sessions that are gone are forgotten."""
        self._failures = {s: n for s, n in self._failures.items() if s in live}
        self._out = {s: n - 1 for s, n in self._out.items() if s in live and n > 1}
