"""One push of a version to the actors: offered by their routes, until all have confirmed it.

begin ─┬─► broadcast to the epoch ─┐
       ├─► offer of shared memory ─┼─► confirmations ─► report
       └─► offer to pull ──────────┘
             ▲     │ a member gone, an error, a deadline
             └─────┘ ends the epoch: its members pull the rest
"""

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from learner.config.weights import WeightsConfig
from learner.registry import ActorState
from learner.weights.epochs import Epochs
from learner.weights.routes import Probation
from learner.weights.snapshots import Snapshot
from protocol.messages import Route, Weights

log = logging.getLogger("learner")

_UNKNOWN = "an actor late or unreachable"


class Audience(Protocol):
    """The actors as a push sees them; the coordinator is one. Any thread may call any method."""

    @property
    def pushed(self) -> int:
        """Version of the last push that began."""

    def catching_up(self) -> set[str]:
        """Return the actors, by session, that load weights and have missed the last push."""

    def begin_push(self, version: int) -> list[ActorState]:
        """Return the actors to push ``version`` to; until `end_push` nothing else offers it."""

    def end_push(self) -> None:
        """Leave actors that have not confirmed the version to pull from now on."""

    def announce(self, session: str, weights: Weights, snapshot: Snapshot) -> None:
        """Offer a snapshot to an actor, if it still lives."""

    def behind(self, actors: Mapping[str, int], version: int) -> dict[str, int]:
        """Return those of the actors, numbers by session, that live without ``version`` yet."""

    def quiet_s(self, actors: Mapping[str, int]) -> float:
        """Return how long the quietest of the actors has given no sign that it takes weights."""

    def gone(self, actors: Mapping[str, int]) -> tuple[str, ...]:
        """Return those of the actors, numbers by session, that do not live any more."""

    @property
    def sessions(self) -> set[str]:
        """The sessions of all actors that live."""

    @property
    def draining(self) -> bool:
        """Whether the run is over, so that nobody needs weights any more."""

    def wait_until(self, condition: Callable[[], bool], timeout_s: float) -> bool:
        """Wait for what depends on actors, or on a call of `notify`; returns whether it came."""

    def notify(self) -> None:
        """Have every `wait_until` look again."""


@dataclass(slots=True)
class PushReport:
    """How one push went."""

    version: int
    epoch: int
    """The one that it was broadcast in; 0 if it was not."""
    routes: dict[str, int]
    """Actors by the route that they were offered."""
    phases: dict[str, float]
    """Seconds to pack, join, broadcast and confirm."""
    seconds: float = 0.0
    """Seconds from the announcement to the last confirmation, or the deadline."""
    evicted: dict[int, str] = field(default_factory=dict)
    """Why the epoch ended, by the actor's number: ``gone``, ``absent`` (it did not come to the
    epoch) or ``late``."""
    behind: list[int] = field(default_factory=list)
    """Actors that had not confirmed the version at the deadline."""


class Push:
    """One version on its way to actors that are fixed when it begins."""

    def __init__(
        self,
        snapshot: Snapshot,
        routes: Mapping[str, Route],
        actors: Iterable[ActorState],
        *,
        audience: Audience,
        epochs: Epochs | None,
        config: WeightsConfig,
        pack_seconds: float,
    ) -> None:
        """``routes`` has the route of each of the ``actors`` by its session.

        The deadline of ``config`` runs from here on.
        """
        self._snapshot = snapshot
        self._routes = routes
        self._audience = audience
        self._epochs = epochs
        self._timeout_s = config.timeout_s
        self._started = time.monotonic()
        self._deadline = self._started + config.push_timeout_s
        self._actors = {actor.session: actor.number for actor in actors}
        """Their numbers by session, here and below."""
        self._members = {s: n for s, n in self._actors.items() if routes[s] == "collective"}
        """The actors that it is broadcast to."""
        self._new_members: tuple[str, ...] = ()
        """Members that were not in the epoch of the push before."""
        self.report = PushReport(
            snapshot.version, 0, dict(Counter(routes.values())), {"pack": pack_seconds}
        )

    def run(self, probation: Probation) -> PushReport:
        """Push, and return how it went.

        ``probation`` is told of the members because of which the broadcast failed.
        """
        for session, route in self._routes.items():
            if route != "collective":
                self._announce(session, route)
        if self._epochs is not None:
            self._broadcast(self._epochs)
        sent = time.monotonic()
        self._await_confirmations()
        if self._epochs is not None:
            self._judge(self._epochs, probation)
        self.report.phases["confirm"] = time.monotonic() - sent
        self.report.seconds = time.monotonic() - self._started
        return self.report

    def _announce(self, session: str, route: Route) -> None:
        self._audience.announce(session, self._snapshot.announcement(route), self._snapshot)

    def _broadcast(self, epochs: Epochs) -> None:
        """Broadcast; returns when it is done, or has failed and its members were told to pull."""
        self._new_members = epochs.enter(self._members, self._snapshot.version)
        if not self._members:
            return
        self.report.epoch = epochs.number
        began = time.monotonic()
        # Before the others know: its thread starts while the offers are on their way.
        broadcast = epochs.broadcast(self._snapshot, self._audience.notify)
        for session, offer in epochs.offers(self._snapshot).items():
            self._audience.announce(session, offer, self._snapshot)
        self._audience.wait_until(
            lambda: broadcast.done or self._should_leave(), self._deadline - time.monotonic()
        )
        seconds = time.monotonic() - began
        # Without a meeting all of the time went into it.
        join_seconds = broadcast.join_seconds or seconds
        self.report.phases |= {"join": join_seconds, "broadcast": seconds - join_seconds}
        if self._audience.gone(self._members):
            self._leave_those_who_are_gone(epochs)
        elif (broadcast.error or not broadcast.done) and not self._audience.draining:
            log.debug("%s", broadcast.error)
            missing = [self._members[session] for session in broadcast.missing]
            self.report.evicted |= dict.fromkeys(missing, "absent")
            self._end_epoch(epochs, _reasons(self.report.evicted) or _UNKNOWN)

    def _should_leave(self) -> bool:
        return self._audience.draining or bool(self._audience.gone(self._members))

    def _leave_those_who_are_gone(self, epochs: Epochs) -> None:
        """End the epoch: the others may wait for them until the deadline of the collective."""
        gone = [self._members[session] for session in self._audience.gone(self._members)]
        self.report.evicted |= dict.fromkeys(gone, "gone")
        self._end_epoch(epochs, _reasons(self.report.evicted))

    def _end_epoch(self, epochs: Epochs, cause: str) -> None:
        version = self._snapshot.version
        log.warning("epoch %d ended with version %d: %s", epochs.number, version, cause)
        epochs.end(cause)
        for session in self._audience.behind(self._members, version):
            self._announce(session, "stream")

    def _await_confirmations(self) -> None:
        """Wait for all, as long as there is progress.

        Without progress the epoch ends, because one member holds up those that get the bytes from
        it: they pull. An actor that is behind after that is late.
        """
        audience, epochs = self._audience, self._epochs
        while (behind := self._behind()) and not audience.draining:
            goes_on = self._progresses(behind)
            if epochs is not None and epochs.lasts and behind.keys() & self._members:
                if audience.gone(self._members):
                    self._leave_those_who_are_gone(epochs)
                    goes_on = True
                elif not goes_on:
                    self._end_epoch(epochs, _UNKNOWN)
                    goes_on = True
            if not goes_on:
                self._leave_behind(behind)
                return

    def _progresses(self, behind: dict[str, int]) -> bool:
        """Wait until fewer are behind; returns False when that is not to be expected any more.

        A large model takes long to load. An actor that does says so, again and again: only when
        another one has been quiet meanwhile does something hang.
        """
        began = time.monotonic()
        while True:
            now = time.monotonic()
            quiet_s = min(now - began, self._audience.quiet_s(behind))
            patience_s = min(self._timeout_s - quiet_s, self._deadline - now)
            if patience_s <= 0:
                return False
            if self._audience.wait_until(
                lambda: self._audience.draining or self._behind() != behind, patience_s
            ):
                return True

    def _behind(self) -> dict[str, int]:
        return self._audience.behind(self._actors, self._snapshot.version)

    def _leave_behind(self, behind: dict[str, int]) -> None:
        """Wait no longer: they were told to pull, and join an epoch when they have caught up."""
        self.report.behind = list(behind.values())
        late = dict.fromkeys(self.report.behind, "late")
        log.warning("version %d: %s", self._snapshot.version, _reasons(late))
        for session in behind.keys() & self._members:
            self.report.evicted.setdefault(self._members[session], "late")

    def _judge(self, epochs: Epochs, probation: Probation) -> None:
        """Find the actors that broke the epoch, and keep them out of broadcasts for a while.

        A killed member breaks it before anybody knows that it is gone: then nobody else is to
        blame. Otherwise it is those that did not come, or are late; if everybody could pull, most
        likely the new ones.
        """
        if epochs.lasts or self._audience.draining:
            for session in self._members:
                probation.passed(session)
            return
        evicted, gone = self.report.evicted, self._audience.gone(self._members)
        for session in gone:
            evicted.setdefault(self._members[session], "gone")
        if evicted:
            epochs.ended(_reasons(evicted))
        if not gone:
            known = tuple(s for s, number in self._members.items() if number in evicted)
            for session in known or self._new_members or self._members:
                probation.failed(session)


def _reasons(evicted: dict[int, str]) -> str:
    """``actor 3 did not come, actor 4 gone``."""
    return ", ".join(
        f"actor {number} {'did not come' if cause == 'absent' else cause}"
        for number, cause in evicted.items()
    )
