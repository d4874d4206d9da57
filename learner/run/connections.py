"""The learner's ports and the threads that serve them: once they are open, actors may join."""

import logging
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import zmq

from learner.coordinator.access import Access
from learner.coordinator.intake import Intake
from learner.run.parts import Parts
from learner.weights.publisher import Publisher
from learner.weights.push_metrics import PushMetrics
from protocol.keys import AllowList
from protocol.observability import Heartbeat
from protocol.sockets import LearnerSockets, bind_learner, is_wildcard, parse_tcp

log = logging.getLogger("learner")


@dataclass(frozen=True, slots=True, eq=False)
class Connections:
    """What actors are reached through."""

    url: str
    """Where actors on this machine join."""
    join_url: str
    """Where all other actors join, too."""
    access: Access
    intake: Intake
    heartbeat: Heartbeat
    """The intake thread's."""
    publisher: Publisher
    context: "zmq.Context[Any]"


def connect(parts: Parts) -> Connections:
    """Open the port for actors and start the threads; raises `ConfigError`."""
    config, coordinator = parts.config, parts.coordinator
    context: zmq.Context[Any] = zmq.Context()
    sockets = _bind(parts, context)
    access = _access(parts, sockets)
    heartbeat = Heartbeat("intake", limit_s=10.0)
    intake = Intake(sockets, access, coordinator, heartbeat)

    if journal := parts.history.journal:
        journal.start(coordinator.stored, coordinator.fail)
        parts.rewards.record = parts.history.record_command
    if parts.self_check is not None:
        parts.self_check.start(coordinator.fail)
    parts.weights_stream.start(coordinator.answer_pull, coordinator.fail)
    publisher = Publisher(
        coordinator,
        parts.snapshots,
        parts.weights_stream,
        config.weights,
        parts.topology,
        config.collective_address,
        PushMetrics(parts.registry, parts.phases),
        coordinator.fail,
    )
    return Connections(
        url=_reachable(sockets.url, config.collective_address or "127.0.0.1"),
        join_url=_reachable(sockets.url, config.collective_address or socket.gethostname()),
        access=access,
        intake=intake,
        heartbeat=heartbeat,
        publisher=publisher,
        context=context,
    )


def _bind(parts: Parts, context: "zmq.Context[Any]") -> LearnerSockets:
    config = parts.config
    # The largest frame of a group is its version spans: at most one triple a token.
    tokens = config.sampling.max_tokens * max(
        config.sampling.num_rollouts, *(s.num_rollouts for s in config.heldout_sets), 1
    )
    return bind_learner(context, config.endpoints.bind, max(1 << 20, 12 * tokens), parts.keys)


def _access(parts: Parts, sockets: LearnerSockets) -> Access:
    folder = parts.config.keys.allowed
    allowed = AllowList(Path(folder)) if folder else None
    if parts.keys is not None and allowed is not None:
        parts.folder.write_learner_key(parts.keys.public)
        log.info("encrypted, with the key %s; %d keys may connect", parts.keys.public, len(allowed))
    return Access(sockets, allowed)


def _reachable(bound: str, host_of_wildcard: str) -> str:
    """``bound``, with a host that actors can connect to in the place of a wildcard."""
    host, port = parse_tcp(bound)
    return f"tcp://{host_of_wildcard}:{port}" if is_wildcard(host) else bound
