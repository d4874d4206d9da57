"""The learner's side of the protocol as a state machine: messages and time in, messages out.

No sockets and no clock of its own, so every rule is tested without either. `learner.intake` feeds
it from the network; the trainer's thread calls the few methods marked so. One lock covers all.

An actor's life:   hello ──► joining ──► has weights ──► checked, gets leases ──► gone
                                                                   │              ▲
                                                                   └── silence, goodbye
A silent actor is forgotten and its leases are issued again; if it turns up later it is told that
its session is unknown, says hello again and is fed the current weights.
"""

import logging
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from itertools import cycle
from threading import Condition, RLock

from learner.buffer import ReplayBuffer
from learner.config import RunConfig
from learner.evaluation import Evaluation
from learner.journal import Arrival, Journal
from learner.membership import ActorState, Outgoing, WireCounters
from learner.pacing import Pacing
from learner.selfcheck import CheckResult, SelfCheck
from learner.snapshots import SnapshotStore
from learner.state import LeaseState, OpenTickets
from learner.work import MAX_ATTEMPTS, WorkQueue, group_limits
from protocol.errors import AsyncGdpoError, BadMessage, TrainingError, one_line
from protocol.framing import Buffer
from protocol.groups import Group, GroupLimits, unpack_group
from protocol.leases import Held, LeaseBook, Work
from protocol.messages import (
    PROTOCOL_VERSION,
    Ack,
    Drain,
    Error,
    Failed,
    Goodbye,
    GroupHeader,
    Header,
    Hello,
    Pong,
    Purpose,
    Status,
    ToLearner,
    Verdict,
    Weights,
    WeightsChunk,
    WeightsPull,
    WeightsReady,
    Welcome,
)
from protocol.weights import CHUNK_BYTES

log = logging.getLogger("learner")

MAX_WRONG_DIGESTS = 3
MAX_CHECKS_WAITING = 16
"""Each keeps a snapshot of the weights, whatever becomes of its actor."""
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
        self_check: SelfCheck | None = None,
        checks: Sequence[Work] = (),
    ) -> None:
        """Groups to train on are accepted when ``journal`` has stored them; without one, at once.
        ``checks`` are the works by which ``self_check`` judges new actors; None for no check.
        """
        self._config = config
        self._welcome = welcome
        self._files = files
        self._work = work
        self._buffer = buffer
        self._pacing = pacing
        self._snapshots = snapshots
        self._any_group = group_limits(config, vocab_size)
        self._clock = clock
        self._self_check = self_check
        self._checks = cycle(checks)
        self._checks_waiting = 0
        self._bad_message_logged_at = float("-inf")
        self._lock = RLock()
        self._changed = Condition(self._lock)
        self._actors: dict[str, ActorState] = {}
        self._num_joined = 0
        self._training = False
        self._draining = False
        self._trainer_version = 0
        self._journal = journal
        self._last_actor_at = clock()
        self.leases = LeaseBook(timeout_s=config.learner.lease_timeout_s)
        self.counters = WireCounters()
        self.outbox: deque[Outgoing] = deque()
        self.timings: deque[tuple[str, float]] = deque(maxlen=10_000)
        """(phase, seconds) as actors reported them; whoever exports them takes them out."""
        self.failure: AsyncGdpoError | None = None

    # --- called by intake -----------------------------------------------------------------------

    def handle(
        self, session: str, message: ToLearner, payloads: list[memoryview], key: str = ""
    ) -> None:
        """Take one message from the network, sent with this key; answers go to `outbox`."""
        with self._lock:
            now = self._clock()
            if isinstance(message, Hello):
                self._hello(session, message, now, key)
                return
            actor = self._actors.get(session)
            if actor is None:
                self.counters.unknown_session += 1
                self._send(session, Error(code="unknown_session", message="say hello first"))
                return
            actor.last_heard = self._last_actor_at = now
            match message:
                case GroupHeader():
                    self._group(actor, message, payloads)
                case Failed():
                    self._failed(actor, message)
                case Status():
                    self._status(actor, message)
                case WeightsPull():
                    self._weights_pull(actor, message)
                case WeightsReady():
                    self._weights_ready(actor, message)
                case Goodbye():
                    self._forget(actor, f"goodbye ({one_line(message.cause)})", lost=False)
            self._issue(now)

    def stored(self, arrivals: Sequence[Arrival]) -> None:
        """Groups are in the journal: now they may be trained on, and are acknowledged."""
        with self._lock:
            for arrival in arrivals:
                self._accept(arrival)
            self._issue(self._clock())

    def bad_message(self, session: str, error: BadMessage) -> None:
        """Frames that were no message: counted, logged, answered."""
        with self._lock:
            self.counters.bad_messages += 1
            now = self._clock()
            if now - self._bad_message_logged_at >= BAD_MESSAGES_LOGGED_S:
                self._bad_message_logged_at = now
                number = self.counters.bad_messages
                log.warning(
                    "bad message from %s: %s (number %d)", one_line(session[:8]), error, number
                )
            self._send(session, Error(code="bad_message", message=str(error)))

    def key_of(self, session: str) -> str | None:
        """The key that the session's actor joined with; None if there is no such actor."""
        with self._lock:
            actor = self._actors.get(session)
            return None if actor is None else actor.key

    def let_go(self, is_allowed: Callable[[str], bool]) -> None:
        """Refuse the actors whose key is not allowed any more."""
        with self._lock:
            for actor in list(self._actors.values()):
                if not is_allowed(actor.key):
                    self._refuse(actor, "its key has been withdrawn")

    def unreachable(self, session: str) -> None:
        """The connection to an actor is gone, or its queue is full."""
        with self._lock:
            if actor := self._actors.get(session):
                self._forget(actor, "unreachable", lost=True)

    def fail(self, error: AsyncGdpoError) -> None:
        """Going on is impossible; the trainer's thread raises ``error``."""
        with self._lock:
            self.failure = self.failure or error
        self._buffer.wake()

    def tick(self) -> None:
        """What time brings: silent actors, overdue leases, leases to issue."""
        with self._lock:
            now = self._clock()
            for actor in list(self._actors.values()):
                limit = self._config.learner
                silence, age = now - actor.last_heard, now - actor.joined_at
                if actor.ready and silence > limit.actor_timeout_s:
                    self._forget(actor, f"silent for {silence:.1f} s", lost=True)
                elif not actor.ready and age > limit.join_timeout_s:
                    cause = f"without weights {age:.0f} s after it joined"
                    self._forget(actor, cause, lost=True)
            for held in self.leases.overdue(now):
                log.warning("lease %d overran its deadline; issued again", held.lease)
                self._end(held, "deadline")
                if holder := self._actors.get(held.holder):
                    holder.overrun.add(held.lease)
                self._work.failed(held.work)
            self._issue(now)

    # --- called by the trainer's thread ---------------------------------------------------------

    def open_training(self) -> None:
        """From now on training leases are issued."""
        with self._lock:
            self._training = True

    def advance(self, trainer_version: int) -> None:
        """The trainer finished a step."""
        with self._lock:
            self._trainer_version = trainer_version
            self._buffer.step_done()

    def close_training(self) -> None:
        with self._lock:
            self._training = False

    def start_evaluation(self, works: list[Work], version: int) -> Evaluation:
        """Have ``works`` rolled out by actors that sample from ``version`` or later."""
        with self._lock:
            return self._work.start_evaluation(works, version)

    def end_evaluation(self) -> None:
        """Lease no more of its prompts; what still comes back is not used."""
        with self._lock:
            self._work.end_evaluation()

    def drain(self, cause: str) -> None:
        """The run is over: tell every actor; nothing is leased any more."""
        with self._lock:
            self._training, self._draining = False, True
            self._work.end_evaluation()
            for session in self._actors:
                self._send(session, Drain(cause=cause))
            self._changed.notify_all()

    def wait_until_empty(self, timeout_s: float) -> bool:
        """Whether all actors said goodbye in time."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._actors, timeout_s)

    def raise_if_failed(self) -> None:
        """Raise what made going on impossible, if anything did."""
        with self._lock:
            if self.failure is not None:
                raise self.failure
            waited = self._clock() - self._last_actor_at
            if not self._actors and waited > self._config.learner.wait_for_actors_s:
                raise TrainingError(
                    f"no actor for {waited:.0f} s; start one with: gdpo actor --learner ADDRESS"
                )

    # --- called by the publisher's thread -------------------------------------------------------

    def ready_sessions(self, version: int = 0) -> tuple[str, ...]:
        """Actors that may get work and sample from ``version`` or later.

        One that is being checked keeps the version that it is checked with.
        """
        with self._lock:
            return tuple(
                session
                for session, actor in self._actors.items()
                if actor.version >= version and self._is_checked(actor)
            )

    def announce(self, session: str, weights: Weights) -> None:
        with self._lock:
            if session in self._actors:
                self._send(session, weights)

    def wait_for_version(
        self, sessions: Iterable[str], version: int, timeout_s: float
    ) -> tuple[str, ...]:
        """Sessions among those given that live, but have not confirmed ``version`` in time.

        Nobody needs weights any more once the run is over.
        """

        def behind() -> tuple[str, ...]:
            actors = (self._actors.get(session) for session in sessions)
            return tuple(a.session for a in actors if a is not None and a.version < version)

        with self._changed:
            self._changed.wait_for(lambda: self._draining or not behind(), timeout_s)
            return () if self._draining else behind()

    # --- views ----------------------------------------------------------------------------------

    def state(self) -> tuple[OpenTickets, dict[Purpose, LeaseState]]:
        """How far the stream of prompts is used, what of it is still to come in, and the books."""
        with self._lock:
            tickets = OpenTickets(
                next_ticket=self._work.next_ticket,
                leased=tuple(work.ticket for work in self.leases.open_works("train")),
                waiting=tuple(work.ticket for work in self._work.retries),
                buffered=self._buffer.unused_tickets,
            )
            books = {
                purpose: LeaseState(b.received, dict(b.failed), b.outstanding)
                for purpose, b in self.leases.books.items()
            }
            return tickets, books

    def actors(self) -> list[ActorState]:
        """The live actors in the order in which they joined (copies)."""
        with self._lock:
            return [replace(actor) for actor in self._actors.values()]

    @property
    def num_live(self) -> int:
        with self._lock:
            return len(self._actors)

    # --- messages -------------------------------------------------------------------------------

    def _hello(self, session: str, hello: Hello, now: float, key: str) -> None:
        refusal = self._why_refused(session, hello)
        if refusal:
            log.warning("refused an actor on %s: %s", hello.host, refusal)
            self._send(session, Error(code="refused", message=refusal))
            return
        if old := self._actors.get(session):
            self._forget(old, "said hello again", lost=False)
        self._num_joined += 1
        self._last_actor_at = now
        actor = ActorState(session, hello, now, now, now, self._num_joined, key)
        self._actors[session] = actor
        log.info("actor %d joined: %s, pid %d", self._num_joined, hello.host, hello.pid)
        self._send(session, self._welcome, self._files)
        self._announce_latest(actor)
        self._changed.notify_all()

    def _why_refused(self, session: str, hello: Hello) -> str:
        if hello.session != session:
            return f"the session {hello.session!r} is not the connection's {session!r}"
        if self._draining:
            return "the run is over"
        full = len(self._actors) >= self._config.learner.max_actors
        if full and session not in self._actors:
            return f"learner.max_actors = {self._config.learner.max_actors} actors are connected"
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

    def _group(self, actor: ActorState, header: GroupHeader, payloads: list[memoryview]) -> None:
        actor.overrun.discard(header.lease)
        held = self.leases.find(header.lease, actor.session)
        if held is None:
            if answer := self.leases.why_not(header.lease):
                self._ack(actor.session, header.lease, *answer)
            return
        try:
            group = unpack_group(header, payloads, self._limits(held.work))
        except BadMessage as error:
            self.counters.bad_messages += 1
            self._end(held, "invalid_group")
            self._ack(actor.session, header.lease, "rejected", str(error))
            self._work.failed(held.work)
            self._count_failure(actor, held.work, str(error))
            return
        for name, cause in group.missing.items():
            self._reward_failed(actor, held.work, name, cause)
        actor.failures = 0
        actor.held -= 1
        actor.groups += 1
        if held.work.purpose != "check":
            self._took(actor, "generate", group.generation_seconds)
            self._took(actor, "score", group.reward_seconds)
        self.leases.arrive(held)
        if held.work.purpose == "train" and self._journal is not None:
            self._journal.append(Arrival(held, group), header, payloads)
            return
        if held.work.purpose == "check":
            self._submit_check(actor, group)
        self._accept(Arrival(held, group))

    def _accept(self, arrival: Arrival) -> None:
        """A group is where it has to be."""
        held, group = arrival.held, arrival.group
        self.leases.receive(held)
        self._work.done(held.work, group)
        if held.work.purpose == "train":
            self._buffer.add(group, held.work.ticket)
        self._ack(held.holder, held.lease, "accepted", "")

    def _limits(self, work: Work) -> GroupLimits:
        return replace(
            self._any_group,
            num_rollouts=work.num_rollouts,
            max_tokens=work.max_tokens,
            newest_version=self._trainer_version,
        )

    def _ack(self, session: str, lease: int, verdict: Verdict, cause: str) -> None:
        self.counters.verdicts[verdict] += 1
        if verdict != "accepted":
            log.info("group for lease %d %s: %s", lease, verdict, cause)
        self._send(session, Ack(lease=lease, verdict=verdict, cause=cause))

    def _status(self, actor: ActorState, status: Status) -> None:
        actor.status = status
        # What it overran and does not list is not being worked on any more.
        actor.overrun.intersection_update(status.leases)
        first_unheard = next((first for seq, first in actor.pongs if seq == status.heard), 0)
        working_on = set(status.leases)
        for held in self.leases.held_by(actor.session):
            if held.lease < first_unheard and held.lease not in working_on:
                log.warning(
                    "lease %d was lost on the way to or from actor %d", held.lease, actor.number
                )
                self._end(held, "lost")
                self._work.again(held.work)
        actor.pongs.append((status.sequence, self.leases.next_lease))
        self._send(actor.session, Pong(sequence=status.sequence, version=self._trainer_version))

    def _reward_failed(self, actor: ActorState, work: Work, name: str, cause: str) -> None:
        """Count a reward function's failure; one that the run must not survive ends it."""
        reward = next((r for r in self._config.rewards if r.name == name), None)
        if reward is None:
            return
        self.counters.reward_failures[name] += 1
        problem = f"reward function {reward.function} failed on {work.prompt_id}: {cause}"
        log.warning("actor %d: %s", actor.number, problem)
        if reward.on_failure == "error":
            self.fail(TrainingError(problem))

    def _failed(self, actor: ActorState, message: Failed) -> None:
        actor.overrun.discard(message.lease)
        held = self.leases.find(message.lease, actor.session)
        if held is None:
            return
        cause = one_line(message.cause)
        log.warning("lease %d failed on actor %d: %s", held.lease, actor.number, cause)
        if message.kind == "reward":
            self._reward_failed(actor, held.work, message.reward, cause)
        self._end(held, "actor_failed")
        self._work.failed(held.work)
        self._count_failure(actor, held.work, cause)

    def _weights_pull(self, actor: ActorState, pull: WeightsPull) -> None:
        chunk = self._snapshots.read(pull.version, pull.offset, min(pull.num_bytes, CHUNK_BYTES))
        reply = WeightsChunk(version=pull.version, offset=pull.offset)
        self._send(actor.session, reply, (chunk,) if chunk is not None else ())
        if chunk is None:
            self._announce_latest(actor)

    def _announce_latest(self, actor: ActorState) -> None:
        """Have an actor pull the newest version; a new one is going to be checked with it."""
        latest = self._snapshots.latest
        if not self._is_checked(actor):
            actor.check_snapshot = latest
        self._send(actor.session, latest.announcement())

    def _weights_ready(self, actor: ActorState, ready: WeightsReady) -> None:
        if ready.digest != self._snapshots.digest(ready.version):
            self.counters.digest_mismatches += 1
            log.error("actor %d holds other weights than version %d", actor.number, ready.version)
            actor.version, actor.joined_at = -1, self._clock()
            actor.wrong_digests += 1
            if actor.wrong_digests < MAX_WRONG_DIGESTS:
                self._announce_latest(actor)
            else:
                times = f"{actor.wrong_digests} times in a row"
                self._refuse(actor, f"{times} its weights had a wrong digest")
            return
        actor.wrong_digests = 0
        actor.version, actor.route = ready.version, ready.route
        self._took(actor, "weights_receive", ready.receive_seconds)
        self._took(actor, "weights_load", ready.load_seconds)
        if ready.route == "stream" and self._is_checked(actor):
            self._catch_up(actor)
        self._changed.notify_all()

    def _catch_up(self, actor: ActorState) -> None:
        """Pushes go only to those that have the version before."""
        if actor.version < self._snapshots.latest.version:
            self._announce_latest(actor)

    # --- the check of new actors ----------------------------------------------------------------

    def _is_checked(self, actor: ActorState) -> bool:
        return self._self_check is None or actor.check == "passed"

    def _check_for(self, actor: ActorState) -> Work | None:
        snapshot = actor.check_snapshot
        if actor.check != "due" or snapshot is None or snapshot.version != actor.version:
            return None
        if self._checks_waiting >= MAX_CHECKS_WAITING:
            return None
        actor.check = "out"
        return next(self._checks)

    def _submit_check(self, actor: ActorState, group: Group) -> None:
        assert self._self_check is not None and actor.check_snapshot is not None
        actor.check = "scoring"
        self._checks_waiting += 1
        self._self_check.submit(
            group, actor.check_snapshot, partial(self._checked, actor), self.fail
        )

    def _checked(self, actor: ActorState, result: CheckResult) -> None:
        """The verdict, on the thread of the check."""
        with self._lock:
            self._checks_waiting -= 1
            if self._actors.get(actor.session) is not actor:
                return
            if result.num_tokens == 0:
                log.warning("actor %d checks nothing of its version; again", actor.number)
                actor.check = "due"
                return
            actor.check_difference = result.largest_difference
            if not result.likely_cause:
                actor.check, actor.check_snapshot = "passed", None
                log.info("actor %d passed its check: %s", actor.number, result)
                self._catch_up(actor)
                self._changed.notify_all()
                return
            problem = f"{result}. The likely cause: {result.likely_cause}"
            self._refuse(actor, problem)
            if not self._actors:
                self.fail(TrainingError(f"actor {actor.number} on {actor.hello.host}: {problem}"))

    # --- leases ---------------------------------------------------------------------------------

    def _issue(self, now: float) -> None:
        """Give work to the actors, the emptiest first, as far as it is allowed."""
        with_room = [actor for actor in self._actors.values() if actor.room > 0]
        while with_room:
            actor = min(with_room, key=lambda a: a.held / (a.held + a.room))
            work = self._work_for(actor)
            if work is not None:
                lease = self.leases.issue(work, actor.session, now)
                actor.held += 1
                self._send(actor.session, lease)
            if work is None or actor.room == 0:
                with_room.remove(actor)

    def _work_for(self, actor: ActorState) -> Work | None:
        if self._draining:
            return None
        if not self._is_checked(actor):
            return self._check_for(actor)
        work = self._work.next_evaluation(actor.version)
        if work is None and self._may_train(actor):
            work = self._work.next_training()
        return work

    def _may_train(self, actor: ActorState) -> bool:
        return (
            self._training
            and self._pacing.allowed(
                trainer_version=self._trainer_version,
                actor_version=actor.version,
                outstanding=self.leases.outstanding("train"),
                buffered=len(self._buffer),
                in_training=self._buffer.in_training,
                buffered_bytes=self._buffer.size_bytes,
            )
            > 0
        )

    def _end(self, held: Held, cause: str) -> None:
        """Close a lease as failed."""
        self.leases.fail(held, cause)
        if actor := self._actors.get(held.holder):
            actor.held -= 1
            if held.work.purpose == "check":
                actor.check = "due"

    def _count_failure(self, actor: ActorState, work: Work, cause: str) -> None:
        """Let an actor go from which nothing but failures comes; the last such one ends the run."""
        if work.attempts:
            # The row is known to be difficult. Such rows come before new ones, many in a row.
            return
        actor.failures += 1
        if actor.failures < max(MAX_ATTEMPTS, self._config.learner.batch_groups):
            return
        problem = (
            f"{actor.failures} groups failed in a row, the last one ({work.prompt_id}) because: "
            f"{cause}"
        )
        if not any(other.failures == 0 for other in self._actors.values()):
            self.fail(TrainingError(problem))
            return
        self._refuse(actor, problem)

    # --- details --------------------------------------------------------------------------------

    def _took(self, actor: ActorState, phase: str, seconds: float) -> None:
        """Note a duration that an actor reports: not longer than it has been here."""
        self.timings.append((phase, min(seconds, self._clock() - actor.first_heard)))

    def _refuse(self, actor: ActorState, problem: str) -> None:
        """An actor that can be of no use leaves."""
        self._send(actor.session, Error(code="refused", message=problem))
        self._forget(actor, problem, lost=True)

    def _forget(self, actor: ActorState, cause: str, *, lost: bool) -> None:
        """The actor is gone; what it held is issued again."""
        del self._actors[actor.session]
        unfinished = self.leases.held_by(actor.session)
        for held in unfinished:
            self._end(held, "actor_lost")
            self._work.again(held.work)
        self._last_actor_at = self._clock()
        self.counters.actors_lost += lost
        log.info("actor %d left: %s; %d leases issued again", actor.number, cause, len(unfinished))
        self._changed.notify_all()

    def _send(self, session: str, header: Header, payloads: tuple[Buffer, ...] = ()) -> None:
        self.outbox.append(Outgoing(session, header, payloads))
