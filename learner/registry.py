"""The actors that are there, and what else all parts of the coordinator share.

One lock covers it all: whoever uses a registry, or a part that shares it, holds
`Registry.lock`, unless a method says otherwise.
"""

import logging
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from threading import Condition, RLock
from typing import Literal

from learner.prompts.work_queue import WorkQueue
from learner.weights.snapshots import Snapshot
from protocol.errors import AsyncGdpoError
from protocol.framing import Buffer
from protocol.leases import LeaseBook
from protocol.messages import Error, Header, Hello, Status

log = logging.getLogger("learner")

PONGS_REMEMBERED = 100


@dataclass(slots=True, eq=False)
class ActorState:
    """What the learner knows of one actor."""

    session: str
    hello: Hello
    first_heard: float
    joined_at: float
    """Also set back when its weights were wrong: the time that it has for them begins anew."""
    last_heard: float
    number: int
    key: str = ""
    """Public key that it joined with; empty without keys."""
    version: int = -1
    route: str = ""
    offered: int = -1
    """Version that it was last told of."""
    fed_at: float = 0.0
    """When it was last offered weights, asked for a chunk, or confirmed a version."""
    status: Status | None = None
    failures: int = 0
    """Rows in a row that failed when they were tried first."""
    wrong_digests: int = 0
    """In a row."""
    held: int = 0
    """Outstanding leases."""
    overrun: set[int] = field(default_factory=set)
    """Leases whose deadline passed, but that it may still be working on."""
    pongs: deque[tuple[int, int]] = field(default_factory=lambda: deque(maxlen=PONGS_REMEMBERED))
    """(sequence, number of the first lease issued after it) of the last answers to its status."""
    groups: int = 0
    check: Literal["off", "due", "out", "scoring", "passed"] = "off"
    """See `learner.coordinator.self_check`; off where nobody is checked."""
    check_snapshot: Snapshot | None = None
    """Of the version that it is going to be checked with."""
    check_difference: float | None = None
    """Of log-probabilities, largest; None before the check."""

    @property
    def ready(self) -> bool:
        return self.version >= 0

    @property
    def is_checked(self) -> bool:
        """Whether it may get real work, as far as the check goes."""
        return self.check in ("off", "passed")

    @property
    def room(self) -> int:
        """Leases that it can take on top."""
        if self.status is None or not self.ready:
            return 0
        return self.status.capacity - self.held - len(self.overrun)


@dataclass(slots=True)
class WireCounters:
    """What arrived that was of no use, or told of a failure."""

    bad_messages: int = 0
    unknown_session: int = 0
    verdicts: Counter[str] = field(default_factory=Counter)
    actors_lost: int = 0
    digest_mismatches: int = 0
    reward_failures: Counter[str] = field(default_factory=Counter)
    """Groups that a reward function failed on, by reward."""

    def totals(self) -> dict[str, int]:
        """Those that are numbers, for a checkpoint."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, int)}

    def restore(self, totals: Mapping[str, int]) -> None:
        for name, value in totals.items():
            if name in self.totals():
                setattr(self, name, value)


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A message for one actor."""

    session: str
    header: Header
    payloads: tuple[Buffer, ...] = ()


class Registry:
    """Who is there, what they are told, and what is wrong."""

    def __init__(
        self,
        leases: LeaseBook,
        work: WorkQueue,
        clock: Callable[[], float],
        on_failure: Callable[[], None],
    ) -> None:
        """Whoever leaves gives its ``leases`` back to ``work``."""
        self._leases = leases
        self._work = work
        self._on_failure = on_failure
        self._num_joined = 0
        self.clock = clock
        self.lock = RLock()
        self.changed = Condition(self.lock)
        """Notified when an actor joins, leaves or has other weights, and when the run ends."""
        self.live: dict[str, ActorState] = {}
        """By session, in the order in which they joined."""
        self.last_actor_at = clock()
        """When any actor was heard, or left."""
        self.draining = False
        """Whether the run is over."""
        self.failure: AsyncGdpoError | None = None
        self.counters = WireCounters()
        self.outbox: deque[Outgoing] = deque()
        self.timings: deque[tuple[str, float]] = deque(maxlen=10_000)

    def join(self, session: str, hello: Hello, now: float, key: str) -> ActorState:
        """A new actor; one that had the same session before makes room for it."""
        if old := self.live.get(session):
            self.forget(old, "said hello again", lost=False)
        self._num_joined += 1
        self.last_actor_at = now
        actor = ActorState(session, hello, now, now, now, self._num_joined, key)
        self.live[session] = actor
        log.info("actor %d joined: %s, pid %d", actor.number, hello.host, hello.pid)
        self.changed.notify_all()
        return actor

    def refuse(self, actor: ActorState, problem: str) -> None:
        """An actor that can be of no use leaves."""
        self.send(actor.session, Error(code="refused", message=problem))
        self.forget(actor, problem, lost=True)

    def forget(self, actor: ActorState, cause: str, *, lost: bool) -> None:
        """The actor is gone; what it held is issued again."""
        del self.live[actor.session]
        unfinished = self._leases.held_by(actor.session)
        for held in unfinished:
            self._leases.fail(held, "actor_lost")
            self._work.again(held.work)
        self.last_actor_at = self.clock()
        self.counters.actors_lost += lost
        log.info("actor %d left: %s; %d leases issued again", actor.number, cause, len(unfinished))
        self.changed.notify_all()

    def send(self, session: str, header: Header, payloads: tuple[Buffer, ...] = ()) -> None:
        """Put a message for one actor, or for who only thinks it is one, into the outbox."""
        self.outbox.append(Outgoing(session, header, payloads))

    def record_phase(self, actor: ActorState, phase: str, seconds: float) -> None:
        """Note a duration that an actor reports: not longer than it has been here."""
        self.timings.append((phase, min(seconds, self.clock() - actor.first_heard)))

    def fail(self, error: AsyncGdpoError) -> None:
        """Going on is impossible, because of the first such error. Takes the lock itself."""
        with self.lock:
            self.failure = self.failure or error
        self._on_failure()
