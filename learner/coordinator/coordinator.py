"""The learner's side of the protocol as a state machine: messages and time in, messages out.

No sockets and no clock of its own, so every rule is tested without either.
`learner.coordinator.intake` feeds it from the network, and all other threads of the learner ask it.

The rule of the lock: there is one, and it is taken in this file only. Every public method of
`Coordinator` takes it, and no part below does: their methods are called with the lock held. So a
thread sees the state between two whole calls, never in the middle of one; only properties that are
one value, and the counts, are read without it. A message that is put into the outbox wakes intake,
which sends it, whatever thread it came from. Room for leases wakes it too: it issues them, so that
the trainer does not look through all actors itself.

An actor's life:   hello ──► joining ──► has weights ──► checked, gets leases ──► gone
                                                                   │              ▲
                                                                   └── silence, goodbye
A silent actor is forgotten and its leases are issued again; if it turns up later it is told that
its session is unknown, says hello again and is offered the current weights.

Who does what; each part knows of those below it only:

    Coordinator     takes messages and ticks; begins and ends
    ├─ Leasing      work for actors, and the groups that come back
    ├─ Evaluating   who keeps a version of the weights to evaluate it
    ├─ Admission    who may join, and the checks: of their first lease, and of some later ones
    ├─ Offers       weights: pushes, pulls, and what actors say they have
    └─ Registry     who is there, what goes out, what is wrong
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from threading import Condition, RLock

from learner.config.run import RunConfig
from learner.coordinator.admission import Admission, Greeting
from learner.coordinator.leasing import Leasing
from learner.coordinator.pace import Pace
from learner.coordinator.self_check import SelfCheck
from learner.pacing import Pacing
from learner.phases import Phases
from learner.prompts.evaluation import Evaluation
from learner.prompts.work_queue import WorkQueue
from learner.registry import ActorState, Outbox, Registry, WireCounters
from learner.replay.buffer import ReplayBuffer
from learner.replay.journal import Journal, ReceivedGroup
from learner.state import LeaseState, OpenPrompts
from learner.weights.chunks import Answer
from learner.weights.offers import Offers
from learner.weights.snapshots import Snapshot, SnapshotStore
from protocol.errors import AsyncGdpoError, BadMessage, one_line
from protocol.leases import LeaseBook, Work
from protocol.messages import (
    Drain,
    Error,
    Failed,
    Goodbye,
    GroupHeader,
    Hello,
    Purpose,
    Status,
    ToLearner,
    Weights,
    WeightsPull,
    WeightsReady,
)

log = logging.getLogger("learner")

BAD_MESSAGES_LOGGED_S = 1.0
"""A peer that sends nothing else must not fill the disk with log lines."""


class Coordinator:
    """Actors, leases, evaluation and weights requests of one run.

    Every public method takes the lock; see the rule above.
    """

    def __init__(
        self,
        config: RunConfig,
        *,
        greeting: Greeting,
        work: WorkQueue,
        buffer: ReplayBuffer,
        pacing: Pacing,
        snapshots: SnapshotStore,
        vocab_size: int,
        phases: Phases,
        clock: Callable[[], float],
        journal: Journal | None = None,
        on_pull: Callable[[str, WeightsPull], None],
        self_check: SelfCheck | None = None,
    ) -> None:
        """Assemble the parts.

        Groups to train on are accepted when ``journal`` has stored them; without one, at once.
        Without a ``self_check`` new actors are not checked. `answer_pull` answers ``on_pull``.
        """
        self._deadlines = config.deadlines
        self._work, self._buffer = work, buffer
        self._clock, self._on_pull = clock, on_pull
        self._bad_message_logged_at, self._has_room = float("-inf"), False
        self.leases = LeaseBook()
        self._lock = RLock()
        self._changed = Condition(self._lock)
        self._registry = Registry(
            clock,
            phases,
            on_leave=self._leaves,
            on_change=self._changed.notify_all,
            on_failure=buffer.wake,
        )
        self._offers = Offers(
            self._registry, snapshots, all_pull=config.all_pull, on_settled=self._settled
        )
        self._admission = Admission(
            self._registry,
            self._offers,
            greeting=greeting,
            settings=config.admission,
            self_check=self_check,
            locked=self._with_lock,
        )
        self._pace = Pace(config.training.batch_groups, config.buffer.max_uses)
        self._leasing = Leasing(
            config,
            self._registry,
            self._admission,
            self._offers,
            leases=self.leases,
            work=work,
            buffer=buffer,
            pacing=pacing,
            pace=self._pace,
            journal=journal,
            vocab_size=vocab_size,
        )

    # --- called by intake -----------------------------------------------------------------------

    def handle(
        self, session: str, message: ToLearner, payloads: list[memoryview], key: str = ""
    ) -> None:
        """Take one message from the network, sent with this ``key``; answers go to `outbox`."""
        with self._lock:
            now = self._clock()
            if isinstance(message, Hello):
                self._admission.hello(session, message, now, key)
                return
            actor = self._registry.live.get(session)
            if actor is None:
                self.counters.unknown_session += 1
                self._registry.send(
                    session, Error(code="unknown_session", message="say hello first")
                )
                return
            actor.last_heard = self._registry.last_actor_at = now
            match message:
                case GroupHeader():
                    self._leasing.group(actor, message, payloads)
                case Failed():
                    self._leasing.failed(actor, message)
                case Status():
                    self._leasing.status(actor, message)
                    self._offers.loads(actor, message.loading)
                case WeightsPull():
                    self._offers.pulls(actor, message.version)
                    self._on_pull(session, message)
                case WeightsReady():
                    self._offers.weights_ready(actor, message, payloads)
                case Goodbye():
                    cause = f"goodbye ({one_line(message.cause)})"
                    self._registry.forget(actor, cause, lost=False)
            self._leasing.issue(now)

    def stored(self, groups: Sequence[ReceivedGroup]) -> None:
        """Use and acknowledge groups that are in the journal now."""
        with self._lock:
            for received in groups:
                self._leasing.accept(received)
            self._leasing.issue(self._clock())

    def bad_message(self, session: str, error: BadMessage) -> None:
        """Count, log and answer frames that were no message."""
        with self._lock:
            self.counters.bad_messages += 1
            now = self._clock()
            if now - self._bad_message_logged_at >= BAD_MESSAGES_LOGGED_S:
                self._bad_message_logged_at = now
                number = self.counters.bad_messages
                log.warning(
                    "bad message from %s: %s (number %d)", one_line(session[:8]), error, number
                )
            self._registry.send(session, Error(code="bad_message", message=str(error)))

    def key_of(self, session: str) -> str | None:
        """The key that the session's actor joined with; None if there is no such actor."""
        with self._lock:
            actor = self._registry.live.get(session)
            return None if actor is None else actor.key

    def let_go(self, is_allowed: Callable[[str], bool]) -> None:
        """Refuse the actors whose key is not allowed any more."""
        with self._lock:
            for actor in list(self._registry.live.values()):
                if not is_allowed(actor.key):
                    self._registry.refuse(actor, "its key has been withdrawn")

    def unreachable(self, session: str) -> None:
        """Forget an actor the connection to which is gone, or has a full queue."""
        with self._lock:
            if actor := self._registry.live.get(session):
                self._registry.forget(actor, "unreachable", lost=True)

    def tick(self) -> None:
        """Do what time brings: forget silent actors, end overdue leases, issue leases."""
        with self._lock:
            now = self._clock()
            self._registry.forget_silent(
                now, self._deadlines.actor_timeout_s, self._deadlines.join_timeout_s
            )
            self._leasing.end_overdue(now)
            self._offers.tick(now)
            self._leasing.issue(now)

    @property
    def has_room(self) -> bool:
        """Whether there may be leases for `issue`."""
        return self._has_room

    def issue(self) -> None:
        """Issue the leases for which somebody has made room; costs nothing if nobody has."""
        if self._has_room:
            # Before the look at it: what is made from here on is for the next time.
            self._has_room = False
            with self._lock:
                self._leasing.issue(self._clock())

    # --- called by any thread -------------------------------------------------------------------

    def fail(self, error: AsyncGdpoError) -> None:
        """End the run, which cannot continue: the trainer's thread raises the first ``error``."""
        with self._lock:
            self._registry.fail(error)

    # --- called by the publisher and the weights stream -----------------------------------------

    @property
    def pushed(self) -> int:
        """Version of the last push that began."""
        return self._offers.pushed

    def catching_up(self) -> set[str]:
        """See `learner.weights.offers.Offers.catching_up`."""
        with self._lock:
            return self._offers.catching_up()

    def begin_push(self, version: int) -> list[ActorState]:
        """See `learner.weights.offers.Offers.begin_push`; returns copies."""
        with self._lock:
            return [replace(actor) for actor in self._offers.begin_push(version)]

    def end_push(self) -> None:
        """Leave actors that have not confirmed the version to pull from now on."""
        with self._lock:
            self._offers.end_push()

    def announce(self, session: str, weights: Weights, snapshot: Snapshot) -> None:
        """Offer a snapshot to an actor, if it still lives."""
        with self._lock:
            self._offers.announce(session, weights, snapshot)

    def answer_pull(self, session: str, answer: Answer) -> None:
        """Send a chunk; an actor that asked for a version which is gone hears of the newest."""
        with self._lock:
            self._offers.answer_pull(session, answer)

    def behind(self, actors: Mapping[str, int], version: int) -> dict[str, int]:
        """Return those of the actors, numbers by session, that live without ``version`` yet."""
        with self._lock:
            return self._registry.behind(actors, version)

    def gone(self, actors: Mapping[str, int]) -> tuple[str, ...]:
        """Return those of the actors, numbers by session, that do not live any more."""
        with self._lock:
            return self._registry.gone(actors)

    def quiet_s(self, actors: Mapping[str, int]) -> float:
        """Return how long the quietest of the actors has given no sign that it takes weights."""
        with self._lock:
            return self._registry.quiet_s(actors)

    @property
    def sessions(self) -> set[str]:
        """The sessions of all actors that live."""
        with self._lock:
            return set(self._registry.live)

    @property
    def draining(self) -> bool:
        """Whether the run is over, so that nobody needs weights any more."""
        return self._registry.draining

    def wait_until(self, condition: Callable[[], bool], timeout_s: float) -> bool:
        """Wait for what depends on actors, or on a call of `notify`; returns whether it came."""
        with self._lock:
            return self._changed.wait_for(condition, max(0.0, timeout_s))

    def notify(self) -> None:
        """Have every `wait_until` look again."""
        with self._lock:
            self._changed.notify_all()

    # --- called by the trainer's thread ---------------------------------------------------------

    def open_training(self) -> None:
        """Issue training leases from now on."""
        with self._lock:
            self._work.training = True
            self.make_room()

    def advance(self, trainer_version: int) -> None:
        """Note that the trainer finished a step, which may make room for leases."""
        with self._lock:
            self._leasing.trainer_version = trainer_version
            self._buffer.step_done()
            self.make_room()

    def batch_wanted(self) -> None:
        """Note that the trainer asks for a batch: how long its steps take paces the leases."""
        with self._lock:
            self._pace.batch_wanted(self._clock())

    def batch_taken(self, num_refilled: int) -> None:
        """Note that the trainer has the batch that it asked for."""
        with self._lock:
            self._pace.batch_taken(self._clock(), num_refilled)

    def make_room(self) -> None:
        """Have intake issue leases, as the trainer took groups from the buffer, say."""
        self._has_room = True
        self.outbox.wake()

    def count_as_pushed(self) -> None:
        """Take the newest snapshot as pushed: it was made before anybody could be there."""
        with self._lock:
            self._offers.count_as_pushed()

    def close_training(self) -> None:
        """Issue no more training leases."""
        with self._lock:
            self._work.training = False

    def start_evaluation(self, works: Mapping[str, Sequence[Work]], due: int) -> Evaluation:
        """Have the ``works`` of each set rolled out by actors with one version, ``due`` or later.

        Training may go on meanwhile; see `learner.coordinator.evaluating`.
        """
        with self._lock:
            evaluation = Evaluation(works, due)
            self._leasing.evaluating.start(evaluation)
            self.make_room()
            return evaluation

    def drain(self, cause: str) -> None:
        """Tell every actor that the run is over; nothing is leased any more."""
        with self._lock:
            self._registry.draining = True
            self._work.training = False
            self._leasing.evaluating.end()
            for session in self._registry.live:
                self._registry.send(session, Drain(cause=cause))
            self._changed.notify_all()

    def wait_until_empty(self, timeout_s: float) -> bool:
        """Wait for all actors to say goodbye; returns whether they did in time."""
        return self.wait_until(lambda: not self._registry.live, timeout_s)

    def raise_if_failed(self) -> None:
        """Raise what made it impossible to continue, if anything did."""
        with self._lock:
            self._registry.raise_if_failed(self._deadlines.wait_for_actors_s)

    # --- views ----------------------------------------------------------------------------------

    def state(self) -> tuple[OpenPrompts, dict[Purpose, LeaseState]]:
        """How far the stream of prompts is used, what of it is still to come in, and the counts."""
        with self._lock:
            prompts = OpenPrompts(
                next_prompt_index=self._work.next_prompt_index,
                leased=tuple(work.prompt_index for work in self.leases.open_works("train")),
                waiting=tuple(work.prompt_index for work in self._work.retries),
                buffered=self._buffer.unused_prompt_indices,
            )
            counts = {
                purpose: LeaseState(c.received, dict(c.failed), c.outstanding)
                for purpose, c in self.leases.counts.items()
            }
            return prompts, counts

    def ready_actors(self, version: int = 0) -> list[ActorState]:
        """The actors that may get work and sample from ``version`` or later (copies)."""
        with self._lock:
            return [replace(actor) for actor in self._registry.ready_actors(version)]

    def actors(self) -> list[ActorState]:
        """The live actors in the order in which they joined (copies)."""
        with self._lock:
            return [replace(actor) for actor in self._registry.live.values()]

    @property
    def lead_s(self) -> float | None:
        """How long before it is needed a batch is leased; None while that is not known."""
        with self._lock:
            return self._pace.lead_s(self._clock())

    @property
    def lease_limit_s(self) -> float:
        """How long a lease that is issued now may last, whatever its actor says."""
        with self._lock:
            return self._leasing.limit.limit_s

    @property
    def progressed_at(self) -> float:
        """When an actor was last heard to have generated a token, by the clock; 0 if none is."""
        with self._lock:
            return max((a.progressed_at for a in self._registry.live.values()), default=0.0)

    @property
    def num_live(self) -> int:
        """The number of live actors."""
        with self._lock:
            return len(self._registry.live)

    @property
    def outbox(self) -> Outbox:
        """The messages for actors."""
        return self._registry.outbox

    @property
    def counters(self) -> WireCounters:
        """Counts of messages and of failures."""
        return self._registry.counters

    @property
    def failure(self) -> AsyncGdpoError | None:
        """What made it impossible to continue, if anything did."""
        return self._registry.failure

    # --- details --------------------------------------------------------------------------------

    def _leaves(self, actor: ActorState) -> int:
        """Take back what an actor that is forgotten holds: leases, and a snapshot."""
        self._offers.release(actor)
        return self._leasing.give_back(actor)

    def _settled(self, actor: ActorState) -> None:
        """Let an actor evaluate the version that it has, before it is offered another."""
        self._leasing.evaluating.consider(actor)

    def _with_lock(self, take: Callable[[], None]) -> None:
        """Have a part ``take`` what a thread of its own found out."""
        with self._lock:
            take()
            self._leasing.issue(self._clock())
