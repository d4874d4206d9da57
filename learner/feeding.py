"""Weights for the actors: what they are offered, and what they say they have.

joined ──► announce_latest ──► pulls ──► weights_ready ──► announce, at every push
                  ▲              │           │    ▲                  │
                  │              ▼           ▼    └──────────────────┘
                  └──── version gone, wrong weights, behind
"""

import logging
from collections.abc import Callable, Iterable
from dataclasses import replace

from learner.chunks import Answer
from learner.membership import ActorState
from learner.roster import Roster
from learner.snapshots import Snapshot, SnapshotStore
from protocol.errors import one_line
from protocol.messages import Weights, WeightsReady

log = logging.getLogger("learner")

MAX_WRONG_DIGESTS = 3


class Feeding:
    """Which weights the actors have, and what they are told of newer ones."""

    def __init__(self, roster: Roster, snapshots: SnapshotStore) -> None:
        self._roster = roster
        self._snapshots = snapshots

    # --- called by the publisher's thread; these take the lock ----------------------------------

    def ready_actors(self, version: int = 0) -> list[ActorState]:
        """Actors that may get work and sample from ``version`` or later (copies).

        One that is being checked keeps the version that it is checked with.
        """
        with self._roster.lock:
            actors = self._roster.live.values()
            return [replace(a) for a in actors if a.version >= version and a.is_checked]

    def announce(self, session: str, weights: Weights, snapshot: Snapshot) -> None:
        """Offer a snapshot to an actor that lives."""
        with self._roster.lock:
            if session in self._roster.live:
                self._roster.send(session, weights, (snapshot.digests,))

    def behind(self, sessions: Iterable[str], version: int) -> dict[str, int]:
        """Which of these actors live, but have not confirmed ``version``; with their numbers."""
        with self._roster.lock:
            actors = (self._roster.live.get(session) for session in sessions)
            return {a.session: a.number for a in actors if a is not None and a.version < version}

    def gone(self, sessions: Iterable[str]) -> tuple[str, ...]:
        """Which of these actors do not live any more."""
        with self._roster.lock:
            return tuple(session for session in sessions if session not in self._roster.live)

    @property
    def draining(self) -> bool:
        """Whether the run is over, so that nobody needs weights any more."""
        return self._roster.draining

    def wait_until(self, condition: Callable[[], bool], timeout_s: float) -> bool:
        """Wait for what depends on actors, or on who calls `notify`; whether it came in time."""
        with self._roster.changed:
            return self._roster.changed.wait_for(condition, max(0.0, timeout_s))

    def notify(self) -> None:
        """Something that somebody waits for has changed."""
        with self._roster.changed:
            self._roster.changed.notify_all()

    # --- called by the weights stream's thread; this takes the lock too -------------------------

    def answer_pull(self, session: str, answer: Answer) -> None:
        """Send a chunk; whose version is gone is told of the newest."""
        with self._roster.lock:
            actor = self._roster.live.get(session)
            if actor is None:
                return
            self._roster.send(session, answer.header, answer.payloads)
            if not answer.payloads:
                self.announce_latest(actor)

    # --- called by the coordinator, which holds the lock ----------------------------------------

    def announce_latest(self, actor: ActorState) -> None:
        """Have an actor pull the newest version; a new one is going to be checked with it."""
        latest = self._snapshots.latest
        if not actor.is_checked:
            actor.check_snapshot = latest
        self._roster.send(actor.session, latest.announcement("stream"), (latest.digests,))

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
        self._roster.took(actor, "weights_receive", ready.receive_seconds)
        self._roster.took(actor, "weights_load", ready.load_seconds)
        if ready.route == "stream" and actor.is_checked:
            self.catch_up(actor)
        self._roster.changed.notify_all()

    def _wrong_weights(self, actor: ActorState, version: int, digests: bytes) -> None:
        """An actor whose weights are wrong time and again leaves."""
        self._roster.counters.digest_mismatches += 1
        wrong = _names(self._snapshots.wrong_tensors(version, digests))
        log.error("actor %d holds other weights than version %d: %s", actor.number, version, wrong)
        actor.version, actor.joined_at = -1, self._roster.clock()
        actor.wrong_digests += 1
        if actor.wrong_digests < MAX_WRONG_DIGESTS:
            self.announce_latest(actor)
        else:
            times = f"{actor.wrong_digests} times in a row"
            self._roster.refuse(actor, f"{times} its weights had a wrong digest")


def _names(tensors: list[str]) -> str:
    if not tensors:
        return "it does not say which tensors"
    more = f" and {len(tensors) - 3} more" if len(tensors) > 3 else ""
    return one_line(", ".join(tensors[:3]) + more)
