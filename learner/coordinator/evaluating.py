"""Which actors evaluate, while they and all others train on.

    an evaluation is due ─► an actor has a version to evaluate ─► it keeps that version ─► done ─┐
                                                                  └──── follows again ◄──────────┘

Every rollout of an evaluation is of one version: the first that an actor has from the step on at
which it was due. An actor with that version may be made an evaluator: it is offered no other
weights until the evaluation has nothing more for it. Then it catches up, as one that was slow.

While training goes on, neither starves the other:

- At most half of the actors evaluate, but one in any case; the others follow and train.
- Evaluators do nothing else: what they generated for training meanwhile would be stale, and they
  would keep their version for longer.
- If there is no other actor, half of its room is training's first, as long as its version is not
  too old for that.

The weights of the version are nowhere but with its evaluators. If all of them are lost, the
evaluation begins anew, with a version that is there.
"""

import logging

from learner.prompts.evaluation import Evaluation
from learner.prompts.work_queue import WorkQueue
from learner.registry import ActorState, Registry
from learner.weights.offers import Offers
from protocol.groups import Group
from protocol.leases import Work

log = logging.getLogger("learner")


class Evaluating:
    """Chooses evaluators, gives them their work, and lets them go.

    The coordinator holds its lock when it calls any method.
    """

    def __init__(
        self, registry: Registry, offers: Offers, work: WorkQueue, *, timeout_s: float
    ) -> None:
        """What an evaluation misses ``timeout_s`` after it began is left out."""
        self._registry = registry
        self._offers = offers
        self._work = work
        self._timeout_s = timeout_s

    def start(self, evaluation: Evaluation) -> None:
        """Have ``evaluation`` made, in the place of the one at hand."""
        self.end()
        self._work.evaluation = evaluation
        self.look(self._registry.clock())

    def end(self) -> None:
        """Hand out no more of the evaluation at hand; what still comes back is not used."""
        self._work.evaluation = None
        for actor in self._evaluators:
            self._release(actor)

    def consider(self, actor: ActorState) -> None:
        """Make an actor an evaluator, if it is needed and nothing changes its version."""
        evaluation = self._work.evaluation
        if evaluation is None or not evaluation.waiting or actor.evaluates:
            return
        fits = actor.version == evaluation.version
        if evaluation.version is None:
            fits = actor.version >= evaluation.due
        if not fits or not actor.is_checked or not self._offers.is_settled(actor):
            return
        if self._work.training and len(self._evaluators) >= self._limit:
            return
        actor.evaluates = True
        if evaluation.version is None:
            evaluation.begin(actor.version, self._registry.clock())

    def next_work(self, actor: ActorState, *, first: bool) -> Work | None:
        """Return a held-out prompt for an evaluator, if there is any.

        With ``first`` only if the evaluation comes before training on this actor now.
        """
        evaluation = self._work.evaluation
        if evaluation is None or not actor.evaluates or not evaluation.waiting:
            return None
        has_half = 2 * actor.num_evaluating >= actor.capacity
        if first and has_half and self._work.training and self.trains(actor):
            return None
        return evaluation.waiting.popleft()

    def trains(self, actor: ActorState) -> bool:
        """Whether training may have room of an actor: an evaluator's only if all of them are."""
        if not actor.evaluates:
            return True
        return all(other.evaluates for other in self._registry.ready_actors(0))

    def why_unfit(self, work: Work, group: Group) -> str:
        """Say why a group must not count; empty if it may."""
        evaluation = self._work.evaluation
        if evaluation is None or not evaluation.wants(work):
            return ""
        if group.versions == {evaluation.version}:
            return ""
        versions = ", ".join(map(str, sorted(group.versions)))
        return f"sampled from version {versions}, where {evaluation.version} is evaluated"

    def look(self, now: float) -> None:
        """Let evaluators go that are not needed any more, and find others where none is left."""
        evaluation = self._work.evaluation
        if evaluation is None:
            return
        late = evaluation.version is not None and now - evaluation.began_at >= self._timeout_s
        if evaluation.num_missing == 0 or late:
            evaluation.finish(now)
            self.end()
            return
        if evaluation.version is not None:
            self._review(evaluation)
        if evaluation.waiting and (not self._work.training or len(self._evaluators) < self._limit):
            for actor in self._registry.ready_actors(0):
                self.consider(actor)

    def _review(self, evaluation: Evaluation) -> None:
        """Let go of single evaluators; where that was the last one, begin anew."""
        for actor in self._evaluators:
            # One that was told nothing may still say that it has other weights.
            moved = actor.version != evaluation.version
            if moved or not (evaluation.waiting or actor.num_evaluating):
                self._release(actor)
        if not self._evaluators:
            log.warning(
                "the evaluation of version %d begins anew: nobody who has that version is left",
                evaluation.version,
            )
            evaluation.start_over()

    @property
    def _evaluators(self) -> list[ActorState]:
        return [actor for actor in self._registry.live.values() if actor.evaluates]

    @property
    def _limit(self) -> int:
        """Actors that may evaluate while training goes on."""
        return max(1, len(self._registry.ready_actors(0)) // 2)

    def _release(self, actor: ActorState) -> None:
        actor.evaluates = False
        if not self._registry.draining:
            self._offers.catch_up(actor)
