"""Sections about a learner and its actors: where they meet, who may join, how long to wait.

``[endpoints]``, ``[keys]``, ``[admission]``, ``[deadlines]`` and ``[launch]``.
"""

from typing import Annotated, Self

from pydantic import (
    AfterValidator,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from protocol.config import StrictModel
from protocol.sockets import parse_tcp


def _is_address(url: str) -> str:
    parse_tcp(url)
    return url


class EndpointsConfig(StrictModel):
    """Where the learner listens."""

    bind: Annotated[str, AfterValidator(_is_address)] = "tcp://127.0.0.1:5555"
    """Address that actors connect to, ``tcp://HOST:PORT``; port 0 takes any free one, and ``*`` is
    every interface. Beyond loopback it needs ``[keys]``."""
    metrics_host: str = "127.0.0.1"
    """Interface of the HTTP pages, which are neither encrypted nor authenticated."""
    metrics_port: Annotated[int, Field(ge=0, le=65_535)] = 9400
    """Port of the HTTP pages: Prometheus metrics, health and status; 0 takes any free one."""


class DeadlinesConfig(StrictModel):
    """How long the learner waits for its actors, and for its own ranks."""

    lease_timeout_s: PositiveFloat = 600.0
    """Seconds without a token of its actor after which a prompt is leased to another. An actor that
    generates keeps it for eight times what groups usually take, and at least for these seconds."""
    actor_timeout_s: PositiveFloat = 10.0
    """Seconds of silence after which an actor counts as lost."""
    join_timeout_s: PositiveFloat = 300.0
    """Longest time in seconds from an actor's hello to its first weights."""
    wait_for_actors_s: PositiveFloat = 600.0
    """Seconds without any live actor after which the run ends with an error."""
    ranks_timeout_s: PositiveFloat = 120.0
    """Longest wait of a learner on several ranks for one of them, in seconds: for a sign that its
    process lives, and for its part in what they compute together. Then the run ends, to be
    resumed."""


class AdmissionConfig(StrictModel):
    """Which actors may join."""

    max_actors: PositiveInt = 1024
    """Actors connected at once; more are refused."""
    self_check: bool = True
    """Compare the log-probabilities of every new actor with the learner's before it gets work."""
    spot_check_share: Annotated[float, Field(ge=0, le=0.5)] = 0.01
    """Share of the time of one thread in which actors at work are compared likewise, a few rollouts
    now and then; 0: never. An actor that differs is named in a warning. Needs self_check."""
    check_limit: PositiveFloat | None = None
    """Mean difference in nats above which an actor does not pass; None: twice what rounding to the
    actors' type makes in the learner's own model, and at least 0.001."""


class KeysConfig(StrictModel):
    """CURVE keys, made by ``gdpo keygen``: who may connect, over an encrypted link."""

    secret: str | None = None
    """File of the learner's own key, ``NAME.key_secret``; None: no encryption, loopback only."""
    allowed: str | None = None
    """Folder of the actors' public keys, ``NAME.key``; they may come and go while it runs."""
    actor: str | None = None
    """File of the key of the actors that ``gdpo run`` starts, ``NAME.key_secret``."""

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if (self.secret is None) != (self.allowed is None):
            raise ValueError("set keys.secret and keys.allowed, or none of them")
        if self.actor is not None and self.secret is None:
            raise ValueError("keys.actor needs keys.secret and keys.allowed")
        return self


class LaunchConfig(StrictModel):
    """What ``gdpo run`` starts on this machine."""

    actors: PositiveInt = 2
    """Actors to start, and to start again when they die."""
    actor_threads: PositiveInt = 1
    """CPU threads of each actor."""
    start_timeout_s: PositiveFloat = 3600.0
    """Seconds for the learner to load model and data, downloads included."""
    max_restarts: NonNegativeInt = 10
    """Restarts of dead actors in the whole run; the next death ends it."""
