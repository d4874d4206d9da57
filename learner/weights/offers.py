"""Weights for the actors: what they are offered, and what they say they have.

joined ──► announce_latest ──► pulls ──► weights_ready ──► announce, at every push
                  ▲              │           │    ▲                  │
                  │              ▼           ▼    └──────────────────┘
                  └──── version gone, wrong weights, behind
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace

from learner.registry import ActorState, Registry
from learner.weights.chunks import Answer
from learner.weights.snapshots import Snapshot, SnapshotStore
from protocol.errors import one_line
from protocol.messages import Weights, WeightsReady

log = logging.getLogger("learner")

MAX_WRONG_DIGESTS = 3
MAX_SNAPSHOTS_HELD = 8
"""For new actors that load them; each is as large as the model."""
OFFER_AGAIN_S = 10.0
"""After so long without a sign that an actor that is behind takes what it was offered."""


class Offers:
    """Which weights the actors have, and what they are told of newer ones."""

    def __init__(self, registry: Registry, snapshots: SnapshotStore) -> None:
        self._registry = registry
        self._snapshots = snapshots
        self._pushed = snapshots.latest.version
        """Of the last push that began."""
        self._pushed_to: dict[str, int] = {}
        """Actors of the push at hand, their numbers by session."""

    # --- called by the publisher's thread; these take the lock ----------------------------------

    def ready_actors(self, version: int = 0) -> list[ActorState]:
        """Actors that may get work and sample from ``version`` or later (copies).

        One that is being checked keeps the version that it is checked with.
        """
        with self._registry.lock:
            actors = self._registry.live.values()
            return [replace(a) for a in actors if a.version >= version and a.is_checked]

    def begin_push(self, version: int, since: int) -> list[ActorState]:
        """Who is pushed ``version`` to: actors that sample from ``since`` or later (copies).

        Until `end_push` the push takes care of them; whoever else confirms an older version from
        now on is told of the newest at once, as no push will come to it.
        """
        with self._registry.lock:
            # One that joined just now may have pulled it already.
            actors = [actor for actor in self.ready_actors(since) if actor.version < version]
            self._pushed = version
            self._pushed_to = {actor.session: actor.number for actor in actors}
            return actors

    def end_push(self) -> None:
        """Who has not confirmed it yet pulls from now on."""
        with self._registry.lock:
            self._pushed_to = {}

    @property
    def sessions(self) -> set[str]:
        """Of all actors that live."""
        with self._registry.lock:
            return set(self._registry.live)

    def announce(self, session: str, weights: Weights, snapshot: Snapshot) -> None:
        """Offer a snapshot to an actor that lives."""
        with self._registry.lock:
            actor = self._registry.live.get(session)
            # It may have found out itself that it has to pull, and have been told of a newer one.
            if actor and (weights.epoch is not None or actor.offered <= weights.version):
                self._offer(actor, weights, snapshot)

    def behind(self, actors: Mapping[str, int], version: int) -> dict[str, int]:
        """Which of these actors, numbers by session, live, but have not confirmed ``version``."""
        with self._registry.lock:
            return {
                session: number
                for session, number in actors.items()
                if self._lives(session, number) and self._registry.live[session].version < version
            }

    def gone(self, actors: Mapping[str, int]) -> tuple[str, ...]:
        """Which of these actors, numbers by session, do not live any more.

        Nor does one that said hello again, under the same session: it has let go of everything.
        """
        with self._registry.lock:
            return tuple(s for s, number in actors.items() if not self._lives(s, number))

    def _lives(self, session: str, number: int) -> bool:
        actor = self._registry.live.get(session)
        return actor is not None and actor.number == number

    @property
    def draining(self) -> bool:
        """Whether the run is over, so that nobody needs weights any more."""
        return self._registry.draining

    def wait_until(self, condition: Callable[[], bool], timeout_s: float) -> bool:
        """Wait for what depends on actors, or on who calls `notify`; whether it came in time."""
        with self._registry.changed:
            return self._registry.changed.wait_for(condition, max(0.0, timeout_s))

    def notify(self) -> None:
        """Something that somebody waits for has changed."""
        with self._registry.changed:
            self._registry.changed.notify_all()

    # --- called by the weights stream's thread; this takes the lock too -------------------------

    def answer_pull(self, session: str, answer: Answer) -> None:
        """Send a chunk; whose version is gone is told of the newest."""
        with self._registry.lock:
            actor = self._registry.live.get(session)
            if actor is None:
                return
            self._registry.send(session, answer.header, answer.payloads)
            if not answer.payloads and actor.offered < self._snapshots.latest.version:
                # Once: it asks for many chunks at a time.
                self.announce_latest(actor)

    # --- called by the coordinator, which holds the lock ----------------------------------------

    def announce_latest(self, actor: ActorState) -> None:
        """Have an actor pull the newest version."""
        latest = self._snapshots.latest
        self._offer(actor, latest.announcement("stream"), latest)

    def _offer(self, actor: ActorState, weights: Weights, snapshot: Snapshot) -> None:
        actor.fed_at, actor.offered = self._registry.clock(), weights.version
        self._registry.send(actor.session, weights, (snapshot.digests,))

    def pulls(self, actor: ActorState, version: int) -> None:
        """An actor asks for a chunk. A new one is going to be checked with what it pulls, however
        long it takes to load it."""
        actor.fed_at = self._registry.clock()
        held = actor.check_snapshot
        if actor.check == "due" and (held is None or held.version != version):
            others = [a.check_snapshot for a in self._registry.live.values() if a is not actor]
            versions = {snapshot.version for snapshot in others if snapshot is not None}
            enough = len(versions | {version}) <= MAX_SNAPSHOTS_HELD
            actor.check_snapshot = self._snapshots.kept(version) if enough else None

    def snapshot_of(self, actor: ActorState) -> Snapshot | None:
        """The version that an actor has; if the learner has it no more, the actor gets another."""
        held = actor.check_snapshot
        if held is not None and held.version == actor.version:
            return held
        snapshot = self._snapshots.kept(actor.version)
        if snapshot is None and actor.offered <= actor.version:
            self.announce_latest(actor)
        return snapshot

    def tick(self, now: float) -> None:
        """Offer again what may have been lost with a connection, or the answer to it."""
        for actor in self._registry.live.values():
            owed = max(actor.offered, self._pushed if actor.is_checked else -1)
            silent = now - actor.fed_at > OFFER_AGAIN_S
            if actor.version < owed and silent and self._is_on_its_own(actor):
                log.info("actor %d is behind, and has asked for nothing", actor.number)
                self.announce_latest(actor)

    def catch_up(self, actor: ActorState) -> None:
        """Pushes go only to those that have the version before."""
        if actor.version < self._snapshots.latest.version:
            self.announce_latest(actor)

    def weights_ready(
        self, actor: ActorState, ready: WeightsReady, payloads: list[memoryview]
    ) -> None:
        """An actor samples from a version now, or so it says."""
        if ready.digest != self._snapshots.digest(ready.version):
            self._wrong_weights(actor, ready.version, bytes(payloads[0]) if payloads else b"")
            return
        actor.wrong_digests = 0
        actor.version, actor.route = ready.version, ready.route
        actor.fed_at = self._registry.clock()
        self._registry.record_phase(actor, "weights_receive", ready.receive_seconds)
        self._registry.record_phase(actor, "weights_load", ready.load_seconds)
        if actor.is_checked and self._is_on_its_own(actor):
            self.catch_up(actor)
        self._registry.changed.notify_all()

    def _is_on_its_own(self, actor: ActorState) -> bool:
        """Whether only pulling brings it to the newest version."""
        if actor.version >= self._pushed:
            # The next push will, but one that pulls need not wait for it.
            return actor.route == "stream" or not actor.is_checked
        return self._pushed_to.get(actor.session) != actor.number

    def _wrong_weights(self, actor: ActorState, version: int, digests: bytes) -> None:
        """An actor whose weights are wrong time and again leaves."""
        self._registry.counters.digest_mismatches += 1
        wrong = _names(self._snapshots.wrong_tensors(version, digests))
        log.error("actor %d holds other weights than version %d: %s", actor.number, version, wrong)
        actor.version, actor.joined_at = -1, self._registry.clock()
        actor.wrong_digests += 1
        if actor.wrong_digests < MAX_WRONG_DIGESTS:
            self.announce_latest(actor)
        else:
            times = f"{actor.wrong_digests} times in a row"
            self._registry.refuse(actor, f"{times} its weights had a wrong digest")


def _names(tensors: list[str]) -> str:
    if not tensors:
        return "it does not say which tensors"
    more = f" and {len(tensors) - 3} more" if len(tensors) > 3 else ""
    return one_line(", ".join(tensors[:3]) + more)
