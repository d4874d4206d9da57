"""Spot checks of actors at work: does an engine still compute what the learner does?

The check of a new actor says that of its first sequences. Importance ratios need it all the time,
and where every batch is stale nothing in training shows it: no token there is of the trainer's
version. So now and then some rollouts of a group that arrives are compared like a first one, at the
version that they were sampled from, as long as its weights are still there:

    group arrives ──► time for one? ──► weights kept? ──► scoring, on the thread ──► figures
                                                          of the self-check     └──► a warning

New actors go first. Neither training nor the coordinator waits for any of it, and the time that it
takes is bounded: after one that took t seconds there is none for t * (1 / share - 1).
"""

import logging
from collections.abc import Callable
from functools import partial

from learner.coordinator.self_check import CheckResult, SelfCheck
from learner.registry import ActorState, Registry
from learner.weights.offers import Offers
from protocol.groups import Group

log = logging.getLogger("learner")

EVERY_S = 10.0
"""Shortest time between two, however little they cost."""
TOKENS_TO_JUDGE = 32
"""With fewer of them chance may be taken for a difference."""
Locked = Callable[[Callable[[], None]], None]
"""Does something, from any thread, with the coordinator's lock held."""


class SpotChecks:
    """Decides what is compared, and says what came out.

    The coordinator holds its lock when it calls any method.
    """

    def __init__(
        self,
        registry: Registry,
        offers: Offers,
        self_check: SelfCheck,
        *,
        share: float,
        locked: Locked,
    ) -> None:
        """``share`` of the time may go into them; 0: none."""
        self._registry = registry
        self._offers = offers
        self._self_check = self_check
        self._share = share
        self._locked = locked
        self._goes_on = False
        self._due_at = float("-inf")

    def arrived(self, actor: ActorState, group: Group) -> None:
        """Have some of a group compared, if it is time for it."""
        now = self._registry.clock()
        if not self._share or self._goes_on or now < self._due_at:
            return
        for version in sorted(group.versions, reverse=True):
            if (snapshot := self._offers.kept(version)) is not None:
                self._goes_on = True
                report = partial(self._report, actor, now)
                self._self_check.spot_check(group, snapshot, report)
                return

    def _report(self, actor: ActorState, began_at: float, result: CheckResult | None) -> None:
        """Take the result, on the thread of the self-check; None: it could not be computed."""
        self._locked(partial(self._judged, actor, began_at, result))

    def _judged(self, actor: ActorState, began_at: float, result: CheckResult | None) -> None:
        now = self._registry.clock()
        self._goes_on = False
        self._due_at = now + max(EVERY_S, (now - began_at) * (1 / self._share - 1))
        if result is None:
            log.warning("there are no more spot checks of actors; the cause is above")
            self._share = 0.0
            return
        self._registry.counters.spot_checks += 1
        if self._registry.live.get(actor.session) is not actor:
            return
        before = actor.difference_largest
        actor.note_difference(result.mean_difference, result.largest_difference)
        if actor.difference_largest != before:
            log.info("actor %d at work: %s", actor.number, result)
        if result.likely_cause and result.num_tokens >= TOKENS_TO_JUDGE and not actor.drifted:
            actor.drifted = True
            log.warning(
                "actor %d on %s does not compute the learner's policy any more: %s. The likely "
                "cause: %s. Start it anew, and it is checked again",
                actor.number,
                actor.hello.host,
                result,
                result.likely_cause,
            )
