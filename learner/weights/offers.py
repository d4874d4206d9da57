"""Weights for the actors: what they are offered, and what they say they have.

joined ──► announce_latest ──► pulls ──► weights_ready ──► announce, at every push
                  ▲              │           │    ▲                  │
                  │              ▼           ▼    └──────────────────┘
                  └──── version gone, wrong weights, behind
"""

import logging
from collections.abc import Callable

from learner.registry import ActorState, Registry
from learner.weights.chunks import Answer
from learner.weights.snapshots import Snapshot, SnapshotStore
from protocol.errors import one_line
from protocol.messages import Weights, WeightsReady

log = logging.getLogger("learner")

MAX_WRONG_DIGESTS = 3
MAX_SNAPSHOTS_HELD = 8
"""Versions kept for new actors that load them; each is as large as the model."""
OFFER_AGAIN_S = 10.0
"""Time without a sign that an actor which is behind takes what it was offered."""


class Offers:
    """Which weights the actors have, and what they are told of newer ones.

    The coordinator holds its lock when it calls any method.
    """

    def __init__(
        self,
        registry: Registry,
        snapshots: SnapshotStore,
        *,
        all_pull: bool,
        on_settled: Callable[[ActorState], None],
    ) -> None:
        """``all_pull`` says that there are no broadcasts, and no shared memory.

        ``on_settled`` is told of a checked actor that is going to be offered newer weights: it may
        make it an evaluator, which keeps those that it has.
        """
        self._on_settled = on_settled
        self._registry = registry
        self._all_pull = all_pull
        self._snapshots = snapshots
        self.pushed = snapshots.latest.version
        """Version of the last push that began."""
        self._pushed_to: dict[str, int] = {}
        """Actors of the push at hand, their numbers by session."""
        self._held: dict[str, Snapshot] = {}
        """What actors are going to be checked with, by session."""

    # --- pushes ---------------------------------------------------------------------------------

    def begin_push(self, version: int) -> list[ActorState]:
        """Return the actors that ``version`` is pushed to: those that kept up with the push before.

        Until `end_push` the push takes care of them; any other actor that confirms an older version
        from now on is told of the newest at once, as no push will come to it.
        """
        kept_up = self._registry.ready_actors(self.pushed)
        # One that joined just now may have pulled it already.
        actors = [actor for actor in kept_up if actor.version < version and not actor.evaluates]
        self.pushed = version
        self._pushed_to = {actor.session: actor.number for actor in actors}
        return actors

    def catching_up(self) -> set[str]:
        """Return the checked actors, by session, that load weights and have missed the last push.

        One that gave no sign of it for a while does not count.
        """
        now = self._registry.clock()
        return {
            actor.session
            for actor in self._registry.ready_actors(0)
            if actor.version < self.pushed and now - actor.weights_active_at < OFFER_AGAIN_S
            if not actor.evaluates
        }

    def end_push(self) -> None:
        """Leave actors that have not confirmed the version to pull from now on."""
        self._pushed_to = {}

    def count_as_pushed(self) -> None:
        """Take the newest snapshot as pushed: it was made before anybody could be there."""
        self.pushed = self._snapshots.latest.version

    def announce(self, session: str, weights: Weights, snapshot: Snapshot) -> None:
        """Offer a snapshot to an actor, if it still lives."""
        actor = self._registry.live.get(session)
        # It may have found out itself that it has to pull, and have been told of a newer one.
        if actor and (weights.epoch is not None or actor.offered <= weights.version):
            self._offer(actor, weights, snapshot)

    # --- pulls ----------------------------------------------------------------------------------

    def answer_pull(self, session: str, answer: Answer) -> None:
        """Send a chunk; an actor that asked for a version which is gone hears of the newest."""
        actor = self._registry.live.get(session)
        if actor is None:
            return
        self._registry.send(session, answer.header, answer.payloads)
        if not answer.payloads and actor.offered < self._snapshots.latest.version:
            # Once: it asks for many chunks at a time.
            self.announce_latest(actor)

    def announce_latest(self, actor: ActorState) -> None:
        """Tell an actor to pull the newest version."""
        latest = self._snapshots.latest
        self._offer(actor, latest.announcement("stream"), latest)

    def _offer(self, actor: ActorState, weights: Weights, snapshot: Snapshot) -> None:
        actor.weights_active_at, actor.offered = self._registry.clock(), weights.version
        self._registry.send(actor.session, weights, (snapshot.digests,))

    def pulls(self, actor: ActorState, version: int) -> None:
        """Note that an actor asks for a chunk.

        A new one is going to be checked with what it pulls, however long it takes to load it.
        """
        actor.weights_active_at = self._registry.clock()
        held = self._held.get(actor.session)
        if actor.check == "due" and (held is None or held.version != version):
            others = {s.version for session, s in self._held.items() if session != actor.session}
            enough = len(others | {version}) <= MAX_SNAPSHOTS_HELD
            self._hold(actor, self._snapshots.kept(version) if enough else None)

    def loads(self, actor: ActorState, version: int) -> None:
        """Note that an actor is at work on what arrived; -1: on nothing."""
        if version > actor.version:
            actor.weights_active_at = self._registry.clock()

    def hold_for_check(self, actor: ActorState) -> Snapshot | None:
        """Keep and return the weights that an actor has, until `release`.

        None if the learner does not have them any more; then the actor gets others.
        """
        held = self._held.get(actor.session)
        if held is not None and held.version == actor.version:
            return held
        snapshot = self._snapshots.kept(actor.version)
        self._hold(actor, snapshot)
        if snapshot is None and actor.offered <= actor.version:
            self.announce_latest(actor)
        return snapshot

    def kept(self, version: int) -> Snapshot | None:
        """Return the weights of a version, if the learner still has them."""
        return self._snapshots.kept(version)

    def held_for(self, actor: ActorState) -> Snapshot | None:
        """Return what is kept for an actor's check."""
        return self._held.get(actor.session)

    def release(self, actor: ActorState) -> None:
        """Keep nothing for an actor's check any more."""
        self._held.pop(actor.session, None)

    def _hold(self, actor: ActorState, snapshot: Snapshot | None) -> None:
        if snapshot is None:
            self.release(actor)
        else:
            self._held[actor.session] = snapshot

    # --- what actors have -----------------------------------------------------------------------

    def tick(self, now: float) -> None:
        """Offer again what may have been lost with a connection, or the answer to it."""
        for actor in self._registry.live.values():
            owed = max(actor.offered, self.pushed if actor.is_checked else -1)
            silent = now - actor.weights_active_at > OFFER_AGAIN_S
            if actor.version < owed and silent and self._is_on_its_own(actor):
                log.info("actor %d is behind, and has asked for nothing", actor.number)
                self.announce_latest(actor)

    def catch_up(self, actor: ActorState) -> None:
        """Offer the newest version, where no push will bring it.

        Pushes go to those that have the version before, and an actor that loads another one by
        itself then would keep the other members of a broadcast waiting.
        """
        self._on_settled(actor)
        if self._is_on_its_own(actor) and actor.version < self._snapshots.latest.version:
            self.announce_latest(actor)

    def is_settled(self, actor: ActorState) -> bool:
        """Whether an actor has what it was offered last, and nothing else is on its way to it."""
        is_pushed_to = self._pushed_to.get(actor.session) == actor.number
        return actor.offered <= actor.version and not (is_pushed_to and actor.version < self.pushed)

    def weights_ready(
        self, actor: ActorState, ready: WeightsReady, payloads: list[memoryview]
    ) -> None:
        """Note that an actor samples from a version now, or that what it has is wrong."""
        if ready.digest != self._snapshots.digest(ready.version):
            self._wrong_weights(actor, ready.version, bytes(payloads[0]) if payloads else b"")
            return
        actor.wrong_digests = 0
        actor.version, actor.route = ready.version, ready.route
        actor.weights_active_at = self._registry.clock()
        self._registry.record_phase(actor, "weights_receive", ready.receive_seconds)
        self._registry.record_phase(actor, "weights_load", ready.load_seconds)
        if actor.is_checked:
            self.catch_up(actor)
        self._registry.changed()

    def _is_on_its_own(self, actor: ActorState) -> bool:
        """Whether only pulling brings it to the newest version, and may do so now."""
        if actor.evaluates:
            return False
        if actor.version >= self.pushed:
            # The next push will, but where all pull nobody need wait for it.
            return self._all_pull or not actor.is_checked
        return self._pushed_to.get(actor.session) != actor.number

    def _wrong_weights(self, actor: ActorState, version: int, digests: bytes) -> None:
        """Offer the weights again; an actor whose weights are wrong again and again is refused."""
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
