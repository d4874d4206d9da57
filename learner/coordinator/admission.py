"""From an actor's hello to its first real work: who may join, and the check of those who do.

A new actor's first lease is a check, which `learner.coordinator.self_check` compares with what
the learner computes. Until it has passed, the actor gets no other work and keeps the version of the
weights that it is checked with; then it catches up.
"""

import logging
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from typing import Literal

from learner.config.actors import AdmissionConfig
from learner.coordinator.self_check import CheckResult, SelfCheck
from learner.coordinator.spot_checks import Locked, SpotChecks
from learner.registry import ActorState, Registry
from learner.weights.offers import Offers
from protocol.errors import TrainingError
from protocol.groups import Group
from protocol.leases import Work
from protocol.messages import PROTOCOL_VERSION, Error, Hello, Welcome

log = logging.getLogger("learner")

MAX_CHECKS_GOING_ON = 16
"""Each keeps a snapshot of the weights, whatever becomes of its actor."""


@dataclass(frozen=True, slots=True)
class Greeting:
    """What an actor that may join is told, and the model's files that go with it."""

    welcome: Welcome
    files: tuple[bytes, ...]
    """One for each name in ``welcome.files``."""


class Admission:
    """Lets actors in, and has each of them checked.

    The coordinator holds its lock when it calls any method.
    """

    def __init__(
        self,
        registry: Registry,
        offers: Offers,
        *,
        greeting: Greeting,
        settings: AdmissionConfig,
        self_check: SelfCheck | None,
        locked: Locked,
    ) -> None:
        """Without a ``self_check`` nobody is checked.

        ``locked`` takes the lock for verdicts, which come on the thread of the check.
        """
        self._registry = registry
        self._offers = offers
        self._greeting = greeting
        self._max_actors = settings.max_actors
        self._self_check = self_check
        self._checks = cycle(self_check.works if self_check is not None else ())
        self._spot_checks = None
        if self_check is not None:
            self._spot_checks = SpotChecks(
                registry, offers, self_check, share=settings.spot_check_share, locked=locked
            )
        self._locked = locked
        self._num_scored = 0

    # --- who may join ---------------------------------------------------------------------------

    def hello(self, session: str, hello: Hello, now: float, key: str) -> None:
        """Welcome an actor that wants to join and tell it of the weights, or refuse it."""
        refusal = self._why_refused(session, hello)
        if refusal:
            log.warning("refused an actor on %s: %s", hello.host, refusal)
            self._registry.send(session, Error(code="refused", message=refusal))
            return
        actor = self._registry.join(session, hello, now, key)
        actor.check = "off" if self._self_check is None else "due"
        self._registry.send(session, self._greeting.welcome, self._greeting.files)
        self._offers.announce_latest(actor)

    def _why_refused(self, session: str, hello: Hello) -> str:
        if hello.session != session:
            return f"the session {hello.session!r} is not the connection's {session!r}"
        if self._registry.draining:
            return "the run is over"
        full = len(self._registry.live) >= self._max_actors
        if full and session not in self._registry.live:
            return f"admission.max_actors = {self._max_actors} actors are connected"
        ours = self._greeting.welcome
        pairs = (
            ("protocol version", hello.protocol, PROTOCOL_VERSION),
            ("run", hello.run_id or ours.run_id, ours.run_id),
            ("model", hello.model_digest or ours.model_digest, ours.model_digest),
        )
        return "; ".join(
            f"{what}: the actor has {theirs}, the learner {own}"
            for what, theirs, own in pairs
            if theirs != own
        )

    # --- the check ------------------------------------------------------------------------------

    def work_for(self, actor: ActorState) -> Work | None:
        """Return the actor's check, once it has weights that the learner still has, too."""
        if actor.check != "due" or self._num_going_on >= MAX_CHECKS_GOING_ON:
            return None
        if self._offers.hold_for_check(actor) is None:
            return None
        actor.check = "out"
        return next(self._checks)

    @property
    def _num_going_on(self) -> int:
        out = sum(actor.check == "out" for actor in self._registry.live.values())
        return out + self._num_scored

    def lease_failed(self, actor: ActorState) -> None:
        """Check an actor again: without a group there is nothing to judge."""
        self._end(actor, "due")

    def submit(self, actor: ActorState, group: Group) -> None:
        """Have the group of a check compared with what the learner computes."""
        snapshot = self._offers.held_for(actor)
        assert self._self_check is not None and snapshot is not None
        actor.check = "scoring"
        self._num_scored += 1
        self._self_check.submit(group, snapshot, partial(self._report, actor))

    def works(self, actor: ActorState, group: Group) -> None:
        """Have a look at what an actor at work sends, now and then."""
        if self._spot_checks is not None:
            self._spot_checks.arrived(actor, group)

    def _report(self, actor: ActorState, result: CheckResult) -> None:
        """Take a verdict, on the thread of the check."""
        self._locked(partial(self._judged, actor, result))

    def _judged(self, actor: ActorState, result: CheckResult) -> None:
        """Let an actor that has passed its check work, and refuse one that has not."""
        self._num_scored -= 1
        if self._registry.live.get(actor.session) is not actor:
            return
        if result.num_tokens == 0:
            log.warning(
                "actor %d was checked with no token of its version; it is checked again",
                actor.number,
            )
            self._end(actor, "due")
            return
        actor.check_difference = result.largest_difference
        actor.note_difference(result.mean_difference, result.largest_difference)
        if result.likely_cause:
            self._not_passed(actor, result)
            return
        self._end(actor, "passed")
        log.info("actor %d passed its check: %s", actor.number, result)
        self._offers.catch_up(actor)
        self._registry.changed()

    def _end(self, actor: ActorState, check: Literal["due", "passed"]) -> None:
        """End a check, or begin it anew; its snapshot is not needed any more."""
        actor.check = check
        self._offers.release(actor)

    def _not_passed(self, actor: ActorState, result: CheckResult) -> None:
        """Refuse the actor; if it was the only one, the run cannot continue either."""
        problem = f"{result}. The likely cause: {result.likely_cause}"
        self._registry.refuse(actor, problem)
        if not self._registry.live:
            on = f"actor {actor.number} on {actor.hello.host}"
            self._registry.fail(TrainingError(f"{on}: {problem}"))
