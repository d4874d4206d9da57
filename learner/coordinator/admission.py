"""From an actor's hello to its first real work: who may join, and the check of those who do.

A new actor's first lease is a check, which `learner.coordinator.self_check` compares with what
the learner computes. Until it has passed, the actor gets no other work and keeps the version of the
weights that it is checked with; then it catches up.
"""

import logging
from collections.abc import Sequence
from functools import partial
from itertools import cycle

from learner.coordinator.self_check import CheckResult, SelfCheck
from learner.registry import ActorState, Registry
from learner.weights.offers import Offers
from protocol.errors import TrainingError
from protocol.groups import Group
from protocol.leases import Work
from protocol.messages import PROTOCOL_VERSION, Error, Hello, Welcome

log = logging.getLogger("learner")

MAX_CHECKS_GOING_ON = 16
"""Each keeps a snapshot of the weights, whatever becomes of its actor."""


class Admission:
    """Lets actors in, and has each of them checked.

    All methods are called with the registry's lock held.
    """

    def __init__(
        self,
        registry: Registry,
        offers: Offers,
        *,
        welcome: Welcome,
        files: tuple[bytes, ...],
        max_actors: int,
        self_check: SelfCheck | None,
        checks: Sequence[Work],
    ) -> None:
        """``checks`` are the works by which ``self_check`` judges; None: nobody is checked."""
        self._registry = registry
        self._offers = offers
        self._welcome = welcome
        self._files = files
        self._max_actors = max_actors
        self._self_check = self_check
        self._checks = cycle(checks)
        self._num_scored = 0

    # --- who may join ---------------------------------------------------------------------------

    def hello(self, session: str, hello: Hello, now: float, key: str) -> None:
        """An actor wants to join: it is welcomed and told of the weights, or refused."""
        refusal = self._why_refused(session, hello)
        if refusal:
            log.warning("refused an actor on %s: %s", hello.host, refusal)
            self._registry.send(session, Error(code="refused", message=refusal))
            return
        actor = self._registry.join(session, hello, now, key)
        actor.check = "off" if self._self_check is None else "due"
        self._registry.send(session, self._welcome, self._files)
        self._offers.announce_latest(actor)

    def _why_refused(self, session: str, hello: Hello) -> str:
        if hello.session != session:
            return f"the session {hello.session!r} is not the connection's {session!r}"
        if self._registry.draining:
            return "the run is over"
        full = len(self._registry.live) >= self._max_actors
        if full and session not in self._registry.live:
            return f"admission.max_actors = {self._max_actors} actors are connected"
        pairs = (
            ("protocol version", hello.protocol, PROTOCOL_VERSION),
            ("run", hello.run_id or self._welcome.run_id, self._welcome.run_id),
            ("model", hello.model_digest or self._welcome.model_digest, self._welcome.model_digest),
        )
        return "; ".join(
            f"{what}: the actor has {theirs}, the learner {ours}"
            for what, theirs, ours in pairs
            if theirs != ours
        )

    # --- the check ------------------------------------------------------------------------------

    def work_for(self, actor: ActorState) -> Work | None:
        """Its check, once it has weights that the learner still has, too."""
        if actor.check != "due" or self._num_going_on >= MAX_CHECKS_GOING_ON:
            return None
        actor.check_snapshot = self._offers.snapshot_of(actor)
        if actor.check_snapshot is None:
            return None
        actor.check = "out"
        return next(self._checks)

    @property
    def _num_going_on(self) -> int:
        out = sum(actor.check == "out" for actor in self._registry.live.values())
        return out + self._num_scored

    def lease_failed(self, actor: ActorState) -> None:
        """Without a group there is nothing to judge: again."""
        actor.check, actor.check_snapshot = "due", None

    def submit(self, actor: ActorState, group: Group) -> None:
        """Have the group of a check compared with what the learner computes."""
        assert self._self_check is not None and actor.check_snapshot is not None
        actor.check = "scoring"
        self._num_scored += 1
        self._self_check.submit(
            group, actor.check_snapshot, partial(self._judged, actor), self._registry.fail
        )

    def _judged(self, actor: ActorState, result: CheckResult) -> None:
        """The verdict, on the thread of the check: takes the lock itself."""
        with self._registry.lock:
            self._num_scored -= 1
            if self._registry.live.get(actor.session) is not actor:
                return
            if result.num_tokens == 0:
                log.warning("actor %d checks nothing of its version; again", actor.number)
                actor.check, actor.check_snapshot = "due", None
                return
            actor.check_difference = result.largest_difference
            if result.likely_cause:
                self._not_passed(actor, result)
                return
            actor.check, actor.check_snapshot = "passed", None
            log.info("actor %d passed its check: %s", actor.number, result)
            self._offers.catch_up(actor)
            self._registry.changed.notify_all()

    def _not_passed(self, actor: ActorState, result: CheckResult) -> None:
        """It leaves; nor does the run go on if it was the only one."""
        problem = f"{result}. The likely cause: {result.likely_cause}"
        self._registry.refuse(actor, problem)
        if not self._registry.live:
            on = f"actor {actor.number} on {actor.hello.host}"
            self._registry.fail(TrainingError(f"{on}: {problem}"))
