"""The actors that are there, and what else all parts of the coordinator share.

There is no lock in here, nor in any other part: `learner.coordinator.coordinator` holds its own
whenever it calls one.
"""

import logging
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Literal

from learner.phases import Phases
from protocol.errors import AsyncGdpoError, TrainingError
from protocol.framing import Buffer
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
    """Set anew when its weights were wrong: then the time that it has for them begins again."""
    last_heard: float
    number: int
    key: str = ""
    """The public key that it joined with; empty without keys."""
    version: int = -1
    route: str = ""
    offered: int = -1
    """Version that it was last told of."""
    progressed_at: float = 0.0
    """When it was last heard to have generated a token."""
    weights_active_at: float = 0.0
    """When it was last offered weights, asked for a chunk, loaded or confirmed a version."""
    status: Status | None = None
    failures: int = 0
    """Rows in a row that failed when they were tried first."""
    wrong_digests: int = 0
    """How many in a row."""
    num_leases: int = 0
    """Outstanding leases."""
    num_evaluating: int = 0
    """Those of them that belong to evaluations."""
    evaluates: bool = False
    """Whether it keeps its version, because that one is evaluated."""
    overrun: set[int] = field(default_factory=set)
    """Leases whose deadline passed, but that it may still be working on."""
    pongs: deque[tuple[int, int]] = field(default_factory=lambda: deque(maxlen=PONGS_REMEMBERED))
    """(sequence, number of the first lease issued after it) of the last answers to its status."""
    groups: int = 0
    check: Literal["off", "due", "out", "scoring", "passed"] = "off"
    """See `learner.coordinator.self_check`; off where nobody is checked."""
    check_difference: float | None = None
    """The largest of log-probabilities; None before the check."""
    difference_mean: float | None = None
    """The mean one of log-probabilities, in nats, when they were last compared."""
    difference_largest: float | None = None
    """The largest one that was ever found."""
    drifted: bool = False
    """Whether a spot check found that it does not compute the learner's policy any more."""

    @property
    def ready(self) -> bool:
        """Whether it samples from some version of the weights."""
        return self.version >= 0

    def note_difference(self, mean: float, largest: float) -> None:
        """Note what a comparison of log-probabilities found."""
        self.difference_mean = mean
        # Not "is above": a NaN is no agreement.
        if self.difference_largest is None or not largest <= self.difference_largest:
            self.difference_largest = largest

    @property
    def is_checked(self) -> bool:
        """Whether it may get real work, as far as the check goes."""
        return self.check in ("off", "passed")

    @property
    def capacity(self) -> int:
        """Leases that it can hold at once."""
        return self.status.capacity if self.status is not None and self.ready else 0

    @property
    def room(self) -> int:
        """Leases that it can take on top."""
        return self.capacity - self.num_leases - len(self.overrun) if self.capacity else 0


@dataclass(slots=True)
class WireCounters:
    """Counts of messages and of failures."""

    bad_messages: int = 0
    unknown_session: int = 0
    verdicts: Counter[str] = field(default_factory=Counter)
    actors_lost: int = 0
    digest_mismatches: int = 0
    spot_checks: int = 0
    reward_failures: Counter[str] = field(default_factory=Counter)
    """Groups that a reward function failed on, by reward."""

    def totals(self) -> dict[str, int]:
        """Return the counters that are numbers, for a checkpoint."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, int)}

    def restore(self, totals: Mapping[str, int]) -> None:
        """Carry on from the `totals` of the learner before."""
        for name, value in totals.items():
            if name in self.totals():
                setattr(self, name, value)


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A message for one actor."""

    session: str
    header: Header
    payloads: tuple[Buffer, ...] = ()


class Outbox:
    """Messages on their way to the actors: any thread puts one in, intake alone takes them out."""

    def __init__(self) -> None:
        self._messages: deque[Outgoing] = deque()
        self._wake: Callable[[], None] = lambda: None

    def __len__(self) -> int:
        return len(self._messages)

    def wakes(self, wake: Callable[[], None]) -> None:
        """Call ``wake`` after every message from now on, on the thread that put it in."""
        self._wake = wake

    def wake(self) -> None:
        """Have whoever sends the messages look for more of them."""
        self._wake()

    def put(self, message: Outgoing) -> None:
        """Have a message sent."""
        self._messages.append(message)
        self._wake()

    def pop(self) -> Outgoing:
        """Take the oldest message out; raises IndexError if there is none."""
        return self._messages.popleft()


class Registry:
    """The actors that are there, what they are told, and what is wrong."""

    def __init__(
        self,
        clock: Callable[[], float],
        phases: Phases,
        *,
        on_leave: Callable[[ActorState], int],
        on_change: Callable[[], None],
        on_failure: Callable[[], None],
    ) -> None:
        """Start with nobody there; ``phases`` counts what actors report.

        ``on_leave`` takes back what an actor holds, and returns how many leases those were.
        ``on_change`` is called when an actor joins, leaves or has other weights; ``on_failure``
        when the run cannot continue.
        """
        self._phases = phases
        self._on_leave = on_leave
        self._on_failure = on_failure
        self._num_joined = 0
        self.clock = clock
        self.changed = on_change
        self.live: dict[str, ActorState] = {}
        """The actors by session, in the order in which they joined."""
        self.last_actor_at = clock()
        """When an actor was last heard, or left."""
        self.draining = False
        """Whether the run is over."""
        self.failure: AsyncGdpoError | None = None
        self.counters = WireCounters()
        self.outbox = Outbox()

    def join(self, session: str, hello: Hello, now: float, key: str) -> ActorState:
        """Register a new actor; one that had the same session before makes room for it."""
        if old := self.live.get(session):
            self.forget(old, "said hello again", lost=False)
        self._num_joined += 1
        self.last_actor_at = now
        actor = ActorState(session, hello, now, now, now, self._num_joined, key)
        self.live[session] = actor
        log.info("actor %d joined: %s, pid %d", actor.number, hello.host, hello.pid)
        self.changed()
        return actor

    def refuse(self, actor: ActorState, problem: str) -> None:
        """Forget an actor that cannot take part, and tell it why."""
        self.send(actor.session, Error(code="refused", message=problem))
        self.forget(actor, problem, lost=True)

    def forget(self, actor: ActorState, cause: str, *, lost: bool) -> None:
        """Forget an actor that is gone; what it held is issued again."""
        del self.live[actor.session]
        num_leases = self._on_leave(actor)
        self.last_actor_at = self.clock()
        self.counters.actors_lost += lost
        log.info("actor %d left: %s; %d leases issued again", actor.number, cause, num_leases)
        self.changed()

    def send(self, session: str, header: Header, payloads: tuple[Buffer, ...] = ()) -> None:
        """Put a message for one actor, or for a peer that thinks it is one, into the outbox."""
        self.outbox.put(Outgoing(session, header, payloads))

    def record_phase(self, actor: ActorState, phase: str, seconds: float) -> None:
        """Count a duration that an actor reports: not longer than it has been here."""
        self._phases.actor(phase, min(seconds, self.clock() - actor.first_heard))

    def fail(self, error: AsyncGdpoError) -> None:
        """Note that the run cannot continue; the first such error is the one that is raised."""
        self.failure = self.failure or error
        self._on_failure()

    def raise_if_failed(self, wait_for_actors_s: float) -> None:
        """Raise what made it impossible to continue, or that no actor was there for too long."""
        if self.failure is not None:
            raise self.failure
        waited = self.clock() - self.last_actor_at
        if not self.live and waited > wait_for_actors_s:
            raise TrainingError(
                f"no actor for {waited:.0f} s; start one with: gdpo actor --learner ADDRESS"
            )

    def forget_silent(self, now: float, actor_timeout_s: float, join_timeout_s: float) -> None:
        """Forget the actors that are silent, and those that have not got weights in time."""
        for actor in list(self.live.values()):
            silence, age = now - actor.last_heard, now - actor.joined_at
            if actor.ready and silence > actor_timeout_s:
                self.forget(actor, f"silent for {silence:.1f} s", lost=True)
            elif not actor.ready and age > join_timeout_s:
                self.forget(actor, f"without weights {age:.0f} s after it joined", lost=True)

    # --- who has which weights ------------------------------------------------------------------

    def ready_actors(self, version: int) -> list[ActorState]:
        """Return the actors that may get work and sample from ``version`` or later.

        One that is being checked keeps the version that it is checked with.
        """
        return [a for a in self.live.values() if a.version >= version and a.is_checked]

    def behind(self, actors: Mapping[str, int], version: int) -> dict[str, int]:
        """Return those of the actors, numbers by session, that live without ``version`` yet."""
        return {
            session: number
            for session, number in actors.items()
            if self._lives(session, number) and self.live[session].version < version
        }

    def gone(self, actors: Mapping[str, int]) -> tuple[str, ...]:
        """Return those of the actors, numbers by session, that do not live any more.

        Nor does one that said hello again, under the same session: it has let go of everything.
        """
        return tuple(s for s, number in actors.items() if not self._lives(s, number))

    def quiet_s(self, actors: Mapping[str, int]) -> float:
        """Return how long the quietest of the actors has given no sign that it takes weights."""
        now = self.clock()
        quiet = (
            now - self.live[session].weights_active_at
            for session, number in actors.items()
            if self._lives(session, number)
        )
        return max(quiet, default=0.0)

    def _lives(self, session: str, number: int) -> bool:
        actor = self.live.get(session)
        return actor is not None and actor.number == number
