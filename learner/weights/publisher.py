"""The sending end of weights: one push at a time on a side thread, while training goes on.

    publish(v) ─► newest wins ─► routes ─┬─► broadcast to the epoch ─┐
                                         ├─► offer of shared memory ─┼─► confirmations ─► report
                                         └─► offer to pull ──────────┘
                                               ▲     │ a member gone, an error, a deadline
                                               └─────┘ ends the epoch: its members pull the rest

The members of an epoch are fixed (see `learner.weights.epochs`); who joined since the last push,
or has caught up, is in the next one. A push never waits longer than its deadlines, and training
never waits for a push: actors whose weights are too old just get no leases.
"""

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from threading import Condition, Thread

from learner.config.weights import WeightsConfig
from learner.registry import ActorState
from learner.weights.epochs import EpochRecord, Epochs
from learner.weights.offers import Offers
from learner.weights.routes import Probation, Topology, plan_routes
from learner.weights.snapshots import Snapshot, SnapshotStore
from learner.weights.stream import WeightsStream
from protocol.errors import AsyncGdpoError, TrainingError
from protocol.messages import Route
from transfer.backends import create_backend

log = logging.getLogger("learner")

CLOSE_TIMEOUT_S = 1.0
PUSHES_REMEMBERED = 20
_UNKNOWN = "an actor late or unreachable"


@dataclass(slots=True)
class PushReport:
    """How one push went."""

    version: int
    epoch: int
    """That it was broadcast in; 0 if it was not."""
    routes: dict[str, int]
    """Actors by the route that they were offered."""
    phases: dict[str, float]
    """Seconds to pack, join, broadcast and confirm."""
    seconds: float = 0.0
    """From the announcement to the last confirmation, or the deadline."""
    evicted: dict[int, str] = field(default_factory=dict)
    """Why the epoch ended, by the actor's number: ``gone``, ``absent`` (it did not come to the
    epoch) or ``late``."""
    behind: list[int] = field(default_factory=list)
    """Actors that had not confirmed the version at the deadline."""


class Publisher:
    """Pushes the newest snapshot to every ready actor.

    By broadcast on ``address``; None: nothing listens there.
    """

    def __init__(
        self,
        offers: Offers,
        snapshots: SnapshotStore,
        stream: WeightsStream,
        config: WeightsConfig,
        topology: Topology,
        address: str | None,
        wake_intake: Callable[[], None],
        fail: Callable[[AsyncGdpoError], None],
    ) -> None:
        self._offers = offers
        self._snapshots = snapshots
        self._stream = stream
        self._config = config
        self._topology = topology
        self._wake_intake = wake_intake
        self._fail = fail
        self._epochs: Epochs | None = None
        if topology.backend == "gloo" or topology.backend == "nccl":
            assert address is not None
            self._epochs = Epochs(
                create_backend(topology.backend, own_address=address, device=topology.device),
                address,
                timeout_s=config.timeout_s,
                bucket_bytes=config.bucket_bytes,
            )
        self._probation = Probation()
        self._changed = Condition()
        self._pending: tuple[Snapshot, float] | None = None
        self._pushed = snapshots.latest.version
        """Version of the last push."""
        self._base: Snapshot | None = None
        """The last one pushed, while somebody pulls every version."""
        self._closing = False
        self._reports: list[PushReport] = []
        self.history: deque[PushReport] = deque(maxlen=PUSHES_REMEMBERED)
        """The newest last."""
        self.pushes = 0
        """Versions offered, those included that nobody was there to take, or that were replaced."""
        self.evictions: Counter[str] = Counter()
        """From epochs, by cause."""
        self._thread = Thread(target=self._run, name="publisher", daemon=True)
        self._thread.start()

    @property
    def backend(self) -> str:
        return self._topology.backend

    @property
    def epochs(self) -> tuple[EpochRecord, ...]:
        """The last ones, the newest last."""
        return tuple(self._epochs.records) if self._epochs else ()

    def publish(self, snapshot: Snapshot, pack_seconds: float) -> None:
        """Push ``snapshot``; one that still waits for an earlier push is replaced by it."""
        self._snapshots.publish(snapshot)
        with self._changed:
            self.pushes += 1
            self._pending = (snapshot, pack_seconds)
            self._changed.notify_all()

    def take_reports(self) -> list[PushReport]:
        """Of the pushes since this was last called."""
        with self._changed:
            reports, self._reports = self._reports, []
            return reports

    def close(self) -> None:
        """End after the push at hand, or without it when it takes long."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(CLOSE_TIMEOUT_S)

    def _run(self) -> None:
        try:
            self._serve()
            if self._epochs is not None:
                # NCCL's communicators should not be left to the end of the process.
                self._epochs.end("the run is over")
        except Exception as error:
            log.exception("publisher died")
            self._fail(TrainingError(f"publisher died: {error}"))

    def _serve(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._pending is not None or self._closing)
                pending, self._pending = self._pending, None
            if pending is None or self._closing:
                return
            snapshot, pack_seconds = pending
            # Only those that kept up: an actor that is behind pulls until it has caught up, so a
            # slow or broken one costs one push its deadlines, not every push.
            actors = self._offers.begin_push(snapshot.version, self._pushed)
            if actors:
                self._note(self._push(snapshot, actors, pack_seconds))
            self._offers.end_push()
            self._pushed = snapshot.version

    def _note(self, report: PushReport) -> None:
        self.evictions.update(report.evicted.values())
        self.history.append(report)
        with self._changed:
            self._reports.append(report)

    # --- one push -------------------------------------------------------------------------------

    def _push(
        self, snapshot: Snapshot, actors: list[ActorState], pack_seconds: float
    ) -> PushReport:
        started = time.monotonic()
        deadline = started + self._config.push_timeout_s
        routes = self._routes(actors)
        report = PushReport(
            snapshot.version, 0, dict(Counter(routes.values())), {"pack": pack_seconds}
        )
        self._prepare_stream(snapshot, routes)
        for session, route in routes.items():
            if route != "collective":
                self._offers.announce(session, snapshot.announcement(route), snapshot)
        self._wake_intake()
        everybody = {actor.session: actor.number for actor in actors}
        members = {s: number for s, number in everybody.items() if routes[s] == "collective"}
        newcomers: tuple[str, ...] = ()
        if self._epochs is not None:
            newcomers = self._broadcast(self._epochs, snapshot, members, deadline, report)
        sent = time.monotonic()
        self._confirmations(snapshot, everybody, members, deadline, report)
        if self._epochs is not None:
            self._judge(self._epochs, members, newcomers, report)
        report.phases["confirm"] = time.monotonic() - sent
        report.seconds = time.monotonic() - started
        return report

    def _routes(self, actors: list[ActorState]) -> dict[str, Route]:
        # Not only these: who is behind may be so because the broadcast did not reach it.
        self._probation.next_push(self._offers.sessions)
        routes = plan_routes(actors, self._topology)
        for session in routes:
            if not self._probation.admits(session):
                routes[session] = "stream"
        return routes

    def _prepare_stream(self, snapshot: Snapshot, routes: dict[str, Route]) -> None:
        """Who pulls gets differences: every version, or to the next one if it takes that long."""
        wanted = "stream" in routes.values() or self._snapshots.is_pulled
        base = self._base or self._snapshots.kept(self._pushed)
        if wanted and base is not None:
            self._stream.keep_differences(base, snapshot)
        self._base = snapshot if wanted else None

    def _broadcast(
        self,
        epochs: Epochs,
        snapshot: Snapshot,
        members: dict[str, int],
        deadline: float,
        report: PushReport,
    ) -> tuple[str, ...]:
        """Returns when it is done, or has failed and its members were told to pull.

        Who of them is new to the epoch.
        """
        newcomers = epochs.enter(members, snapshot.version)
        if not members:
            return ()
        report.epoch = epochs.number
        for session, offer in epochs.offers(snapshot).items():
            self._offers.announce(session, offer, snapshot)
        self._wake_intake()
        began = time.monotonic()
        broadcast = epochs.broadcast(snapshot, self._offers.notify)
        self._offers.wait_until(
            lambda: broadcast.done or self._should_leave(members), deadline - time.monotonic()
        )
        seconds = time.monotonic() - began
        # Without a meeting all of the time went into it.
        join_seconds = broadcast.join_seconds or seconds
        report.phases |= {"join": join_seconds, "broadcast": seconds - join_seconds}
        if self._offers.gone(members):
            self._leave_those_who_are_gone(epochs, snapshot, members, report)
        elif (broadcast.error or not broadcast.done) and not self._offers.draining:
            log.debug("%s", broadcast.error)
            missing = [members[session] for session in broadcast.missing]
            report.evicted |= dict.fromkeys(missing, "absent")
            cause = _reasons(report.evicted) or _UNKNOWN
            self._end_epoch(epochs, snapshot, members, cause)
        return newcomers

    def _should_leave(self, members: dict[str, int]) -> bool:
        return self._offers.draining or bool(self._offers.gone(members))

    def _leave_those_who_are_gone(
        self, epochs: Epochs, snapshot: Snapshot, members: dict[str, int], report: PushReport
    ) -> None:
        """The others may wait for them until the deadline of the collective."""
        gone = [members[session] for session in self._offers.gone(members)]
        report.evicted |= dict.fromkeys(gone, "gone")
        self._end_epoch(epochs, snapshot, members, _reasons(report.evicted))

    def _end_epoch(
        self, epochs: Epochs, snapshot: Snapshot, members: dict[str, int], cause: str
    ) -> None:
        log.warning("epoch %d ended with version %d: %s", epochs.number, snapshot.version, cause)
        epochs.end(cause)
        self._have_pulled(snapshot, self._offers.behind(members, snapshot.version))

    def _confirmations(
        self,
        snapshot: Snapshot,
        actors: dict[str, int],
        members: dict[str, int],
        deadline: float,
        report: PushReport,
    ) -> None:
        """Wait for all, as long as there is progress.

        Without progress the epoch ends, because one member holds up those that get the bytes from
        it: they pull. Who is behind after that is late.
        """
        offers, epochs, version = self._offers, self._epochs, snapshot.version
        while (behind := offers.behind(actors, version)) and not offers.draining:

            def progress(before: dict[str, int] = behind) -> bool:
                return offers.draining or offers.behind(actors, version) != before

            patience_s = min(self._config.timeout_s, deadline - time.monotonic())
            goes_on = offers.wait_until(progress, patience_s)
            if epochs is not None and epochs.lasts and behind.keys() & members:
                if offers.gone(members):
                    self._leave_those_who_are_gone(epochs, snapshot, members, report)
                    goes_on = True
                elif not goes_on:
                    self._end_epoch(epochs, snapshot, members, _UNKNOWN)
                    goes_on = True
            if not goes_on:
                self._leave_behind(snapshot, behind, members, report)
                return

    def _leave_behind(
        self,
        snapshot: Snapshot,
        behind: dict[str, int],
        members: dict[str, int],
        report: PushReport,
    ) -> None:
        """They have been told to pull, and are back in an epoch when they have caught up."""
        report.behind = list(behind.values())
        late = dict.fromkeys(report.behind, "late")
        log.warning("version %d: %s", snapshot.version, _reasons(late))
        for session in behind.keys() & members:
            report.evicted.setdefault(members[session], "late")

    def _judge(
        self,
        epochs: Epochs,
        members: dict[str, int],
        newcomers: tuple[str, ...],
        report: PushReport,
    ) -> None:
        """Find out who broke the epoch, and keep it out of broadcasts for a while.

        A killed member breaks it before anybody knows that it is gone: then nobody else is to
        blame. Otherwise it is who did not come, or is late; if everybody could pull, most likely
        who is new.
        """
        if epochs.lasts or self._offers.draining:
            for session in members:
                self._probation.passed(session)
            return
        gone = self._offers.gone(members)
        for session in gone:
            report.evicted.setdefault(members[session], "gone")
        if report.evicted:
            epochs.ended(_reasons(report.evicted))
        if not gone:
            known = tuple(s for s, number in members.items() if number in report.evicted)
            for session in known or newcomers or members:
                self._probation.failed(session)

    def _have_pulled(self, snapshot: Snapshot, sessions: Iterable[str]) -> None:
        for session in sessions:
            self._offers.announce(session, snapshot.announcement("stream"), snapshot)
        self._wake_intake()


def _reasons(evicted: dict[int, str]) -> str:
    """``actor 3 did not come, actor 4 gone``."""
    return ", ".join(
        f"actor {number} {'did not come' if cause == 'absent' else cause}"
        for number, cause in evicted.items()
    )
