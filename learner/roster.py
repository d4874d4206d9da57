"""The actors that are there, and what else all parts of the coordinator share.

One lock covers it all: whoever uses a roster, or a part that shares it, holds `Roster.lock`, unless
a method says otherwise.
"""

import logging
from collections import deque
from collections.abc import Callable
from threading import Condition, RLock

from learner.membership import ActorState, Outgoing, WireCounters
from learner.work import WorkQueue
from protocol.errors import AsyncGdpoError
from protocol.framing import Buffer
from protocol.leases import LeaseBook
from protocol.messages import Error, Header, Hello

log = logging.getLogger("learner")


class Roster:
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

    def took(self, actor: ActorState, phase: str, seconds: float) -> None:
        """Note a duration that an actor reports: not longer than it has been here."""
        self.timings.append((phase, min(seconds, self.clock() - actor.first_heard)))

    def fail(self, error: AsyncGdpoError) -> None:
        """Going on is impossible, because of the first such error. Takes the lock itself."""
        with self.lock:
            self.failure = self.failure or error
        self._on_failure()
