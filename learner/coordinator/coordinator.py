"""The learner's side of the protocol as a state machine: messages and time in, messages out.

No sockets and no clock of its own, so every rule is tested without either.
`learner.coordinator.intake` feeds it from the network; the trainer's thread calls the few methods
marked so. One lock covers all.

An actor's life:   hello ──► joining ──► has weights ──► checked, gets leases ──► gone
                                                                   │              ▲
                                                                   └── silence, goodbye
A silent actor is forgotten and its leases are issued again; if it turns up later it is told that
its session is unknown, says hello again and is fed the current weights.

Who does what; each part knows of those below it only:

    Coordinator     takes messages and ticks; begins and ends
    ├─ Leasing      work for actors, and the groups that come back
    ├─ Admission    who may join, and the check of those who do: their first lease
    ├─ Offers      weights; the publisher and the weights stream call it too
    └─ Registry       who is there, the lock, what goes out, what is wrong
"""

import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace

from learner.config.run import RunConfig
from learner.coordinator.admission import Admission
from learner.coordinator.leasing import Leasing
from learner.coordinator.self_check import SelfCheck
from learner.pacing import Pacing
from learner.prompts.evaluation import Evaluation
from learner.prompts.work_queue import WorkQueue
from learner.registry import ActorState, Outgoing, Registry, WireCounters
from learner.replay.buffer import ReplayBuffer
from learner.replay.journal import Journal, ReceivedGroup
from learner.state import LeaseState, OpenPrompts
from learner.weights.offers import Offers
from learner.weights.snapshots import SnapshotStore
from protocol.errors import AsyncGdpoError, BadMessage, TrainingError, one_line
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
    WeightsPull,
    WeightsReady,
    Welcome,
)

log = logging.getLogger("learner")

BAD_MESSAGES_LOGGED_S = 1.0
"""A peer that sends nothing else must not fill the disk with log lines."""


class Coordinator:
    """Actors, leases, evaluation and weights requests of one run."""

    def __init__(
        self,
        config: RunConfig,
        *,
        welcome: Welcome,
        files: tuple[bytes, ...],
        work: WorkQueue,
        buffer: ReplayBuffer,
        pacing: Pacing,
        snapshots: SnapshotStore,
        vocab_size: int,
        clock: Callable[[], float],
        journal: Journal | None = None,
        on_pull: Callable[[str, WeightsPull], None],
        self_check: SelfCheck | None = None,
        checks: Sequence[Work] = (),
    ) -> None:
        """Groups to train on are accepted when ``journal`` has stored them; without one, at once.
        ``on_pull`` takes an actor's pull, which is answered through `Offers.answer_pull`.
        ``checks`` are the works by which ``self_check`` judges new actors; None for no check.
        """
        self._deadlines = config.deadlines
        self._work = work
        self._buffer = buffer
        self._clock = clock
        self._on_pull = on_pull
        self._bad_message_logged_at = float("-inf")
        self.leases = LeaseBook(timeout_s=config.deadlines.lease_timeout_s)
        self.registry = Registry(self.leases, work, clock, on_failure=buffer.wake)
        self.offers = Offers(self.registry, snapshots)
        self._admission = Admission(
            self.registry,
            self.offers,
            welcome=welcome,
            files=files,
            max_actors=config.admission.max_actors,
            self_check=self_check,
            checks=checks,
        )
        self._leasing = Leasing(
            config,
            self.registry,
            self._admission,
            leases=self.leases,
            work=work,
            buffer=buffer,
            pacing=pacing,
            journal=journal,
            vocab_size=vocab_size,
        )

    # --- called by intake -----------------------------------------------------------------------

    def handle(
        self, session: str, message: ToLearner, payloads: list[memoryview], key: str = ""
    ) -> None:
        """Take one message from the network, sent with this key; answers go to `outbox`."""
        with self.registry.lock:
            now = self._clock()
            if isinstance(message, Hello):
                self._admission.hello(session, message, now, key)
                return
            actor = self.registry.live.get(session)
            if actor is None:
                self.counters.unknown_session += 1
                self.registry.send(
                    session, Error(code="unknown_session", message="say hello first")
                )
                return
            actor.last_heard = self.registry.last_actor_at = now
            match message:
                case GroupHeader():
                    self._leasing.group(actor, message, payloads)
                case Failed():
                    self._leasing.failed(actor, message)
                case Status():
                    self._leasing.status(actor, message)
                case WeightsPull():
                    self.offers.pulls(actor, message.version)
                    self._on_pull(session, message)
                case WeightsReady():
                    self.offers.weights_ready(actor, message, payloads)
                case Goodbye():
                    cause = f"goodbye ({one_line(message.cause)})"
                    self.registry.forget(actor, cause, lost=False)
            self._leasing.issue(now)

    def stored(self, arrivals: Sequence[ReceivedGroup]) -> None:
        """Groups are in the journal: now they may be trained on, and are acknowledged."""
        with self.registry.lock:
            for arrival in arrivals:
                self._leasing.accept(arrival)
            self._leasing.issue(self._clock())

    def bad_message(self, session: str, error: BadMessage) -> None:
        """Frames that were no message: counted, logged, answered."""
        with self.registry.lock:
            self.counters.bad_messages += 1
            now = self._clock()
            if now - self._bad_message_logged_at >= BAD_MESSAGES_LOGGED_S:
                self._bad_message_logged_at = now
                number = self.counters.bad_messages
                log.warning(
                    "bad message from %s: %s (number %d)", one_line(session[:8]), error, number
                )
            self.registry.send(session, Error(code="bad_message", message=str(error)))

    def key_of(self, session: str) -> str | None:
        """The key that the session's actor joined with; None if there is no such actor."""
        with self.registry.lock:
            actor = self.registry.live.get(session)
            return None if actor is None else actor.key

    def let_go(self, is_allowed: Callable[[str], bool]) -> None:
        """Refuse the actors whose key is not allowed any more."""
        with self.registry.lock:
            for actor in list(self.registry.live.values()):
                if not is_allowed(actor.key):
                    self.registry.refuse(actor, "its key has been withdrawn")

    def unreachable(self, session: str) -> None:
        """The connection to an actor is gone, or its queue is full."""
        with self.registry.lock:
            if actor := self.registry.live.get(session):
                self.registry.forget(actor, "unreachable", lost=True)

    def tick(self) -> None:
        """What time brings: silent actors, overdue leases, leases to issue."""
        with self.registry.lock:
            now = self._clock()
            self._forget_silent(now)
            self._leasing.end_overdue(now)
            self.offers.tick(now)
            self._leasing.issue(now)

    # --- called by any thread -------------------------------------------------------------------

    def fail(self, error: AsyncGdpoError) -> None:
        """Going on is impossible; the trainer's thread raises ``error``."""
        self.registry.fail(error)

    # --- called by the trainer's thread ---------------------------------------------------------

    def open_training(self) -> None:
        """From now on training leases are issued."""
        with self.registry.lock:
            self._leasing.training = True

    def advance(self, trainer_version: int) -> None:
        """The trainer finished a step."""
        with self.registry.lock:
            self._leasing.trainer_version = trainer_version
            self._buffer.step_done()

    def close_training(self) -> None:
        with self.registry.lock:
            self._leasing.training = False

    def start_evaluation(self, works: list[Work], version: int) -> Evaluation:
        """Have ``works`` rolled out by actors that sample from ``version`` or later."""
        with self.registry.lock:
            return self._work.start_evaluation(works, version)

    def end_evaluation(self) -> None:
        """Lease no more of its prompts; what still comes back is not used."""
        with self.registry.lock:
            self._work.end_evaluation()

    def drain(self, cause: str) -> None:
        """The run is over: tell every actor; nothing is leased any more."""
        with self.registry.lock:
            self.registry.draining = True
            self._leasing.training = False
            self._work.end_evaluation()
            for session in self.registry.live:
                self.registry.send(session, Drain(cause=cause))
            self.registry.changed.notify_all()

    def wait_until_empty(self, timeout_s: float) -> bool:
        """Whether all actors said goodbye in time."""
        with self.registry.changed:
            return self.registry.changed.wait_for(lambda: not self.registry.live, timeout_s)

    def raise_if_failed(self) -> None:
        """Raise what made going on impossible, if anything did."""
        with self.registry.lock:
            if self.registry.failure is not None:
                raise self.registry.failure
            waited = self._clock() - self.registry.last_actor_at
            if not self.registry.live and waited > self._deadlines.wait_for_actors_s:
                raise TrainingError(
                    f"no actor for {waited:.0f} s; start one with: gdpo actor --learner ADDRESS"
                )

    # --- views ----------------------------------------------------------------------------------

    def state(self) -> tuple[OpenPrompts, dict[Purpose, LeaseState]]:
        """How far the stream of prompts is used, what of it is still to come in, and the books."""
        with self.registry.lock:
            prompts = OpenPrompts(
                next_prompt_index=self._work.next_prompt_index,
                leased=tuple(work.prompt_index for work in self.leases.open_works("train")),
                waiting=tuple(work.prompt_index for work in self._work.retries),
                buffered=self._buffer.unused_prompt_indices,
            )
            books = {
                purpose: LeaseState(b.received, dict(b.failed), b.outstanding)
                for purpose, b in self.leases.books.items()
            }
            return prompts, books

    def actors(self) -> list[ActorState]:
        """The live actors in the order in which they joined (copies)."""
        with self.registry.lock:
            return [replace(actor) for actor in self.registry.live.values()]

    @property
    def num_live(self) -> int:
        with self.registry.lock:
            return len(self.registry.live)

    @property
    def outbox(self) -> deque[Outgoing]:
        """Messages for actors; whoever sends them takes them out."""
        return self.registry.outbox

    @property
    def counters(self) -> WireCounters:
        return self.registry.counters

    @property
    def timings(self) -> deque[tuple[str, float]]:
        """(phase, seconds) as actors reported them; whoever exports them takes them out."""
        return self.registry.timings

    # --- details --------------------------------------------------------------------------------

    def _forget_silent(self, now: float) -> None:
        """Also those that have not got their weights in time."""
        for actor in list(self.registry.live.values()):
            silence, age = now - actor.last_heard, now - actor.joined_at
            if actor.ready and silence > self._deadlines.actor_timeout_s:
                self.registry.forget(actor, f"silent for {silence:.1f} s", lost=True)
            elif not actor.ready and age > self._deadlines.join_timeout_s:
                cause = f"without weights {age:.0f} s after it joined"
                self.registry.forget(actor, cause, lost=True)
