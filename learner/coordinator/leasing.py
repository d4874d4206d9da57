"""Leases: who gets which work, what comes back, and what is given up.

                     ┌────────────────────────── tried again, or left out ◄──┐
                     ▼                                                       │
    work queue ──► issue ──► lease ─┬─► group ──► journal ──► accept ──► ack │
                     ▲              ├─► failed, invalid, too slow ───────────┘
                     └──────────────┴─► lost on the way, or with its actor

The coordinator holds its lock when it calls any method.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace

from learner.config.run import RunConfig
from learner.coordinator.admission import Admission
from learner.coordinator.deadlines import LeaseLimit
from learner.coordinator.evaluating import Evaluating
from learner.coordinator.pace import Pace
from learner.pacing import Pacing
from learner.prompts.work_queue import MAX_ATTEMPTS, WorkQueue, group_limits
from learner.registry import ActorState, Registry
from learner.replay.buffer import ReplayBuffer
from learner.replay.journal import Journal, ReceivedGroup
from learner.weights.offers import Offers
from protocol.errors import BadMessage, TrainingError, one_line
from protocol.groups import GroupLimits, unpack_group
from protocol.leases import LeaseBook, OutstandingLease, Work
from protocol.messages import Ack, Failed, GroupHeader, Pong, Status, Verdict

log = logging.getLogger("learner")


class Leasing:
    """Gives work to actors, and takes it back done or undone."""

    def __init__(
        self,
        config: RunConfig,
        registry: Registry,
        admission: Admission,
        offers: Offers,
        *,
        leases: LeaseBook,
        work: WorkQueue,
        buffer: ReplayBuffer,
        pacing: Pacing,
        pace: Pace,
        journal: Journal | None,
        vocab_size: int,
    ) -> None:
        """Groups to train on are accepted when ``journal`` has stored them; or at once, if None."""
        self._config = config
        self._registry = registry
        self._admission = admission
        self.evaluating = Evaluating(registry, offers, work, timeout_s=config.eval.timeout_s)
        self._leases = leases
        self._work = work
        self._buffer = buffer
        self._pacing = pacing
        self._pace = pace
        self._journal = journal
        self._any_group = group_limits(config, vocab_size)
        self.limit = LeaseLimit(config.deadlines.lease_timeout_s)
        self.trainer_version = 0

    # --- giving ---------------------------------------------------------------------------------

    def issue(self, now: float) -> None:
        """Give work to the actors, the emptiest first, as far as it is allowed."""
        self.evaluating.look(now)
        with_room = [actor for actor in self._registry.live.values() if actor.room > 0]
        while with_room:
            actor = self._emptiest(with_room)
            work = self._work_for(actor, now)
            if work is not None:
                lease = self._leases.issue(work, actor.session, now, limit_s=self.limit.limit_s)
                if work.purpose == "train":
                    self._pace.leased(work.prompt_index, now)
                actor.num_leases += 1
                actor.num_evaluating += work.purpose == "eval"
                self._registry.send(actor.session, lease)
            if work is None or actor.room == 0:
                with_room.remove(actor)

    def _emptiest(self, with_room: Sequence[ActorState]) -> ActorState:
        """Choose who gets the next row: not the one on which it failed, if there is another."""
        others = [actor for actor in with_room if actor.session != self._work.failed_on]
        return min(
            others or with_room,
            key=lambda actor: actor.num_leases / (actor.num_leases + actor.room),
        )

    def give_back(self, actor: ActorState) -> int:
        """Have all that an actor holds issued again, because it leaves; returns how much it was."""
        unfinished = self._leases.held_by(actor.session)
        for lease in unfinished:
            self._leases.fail(lease, "actor_lost")
            self._work.again(lease.work)
        return len(unfinished)

    def _work_for(self, actor: ActorState, now: float) -> Work | None:
        if self._registry.draining:
            return None
        if not actor.is_checked:
            return self._admission.work_for(actor)
        if work := self.evaluating.next_work(actor, first=True):
            return work
        if self.evaluating.trains(actor) and self._may_train(actor, now):
            alone = len(self._registry.live) == 1
            return self._work.next_training(actor.session, alone=alone)
        if actor.evaluates:
            # It keeps an old version: others may get what it may not, at once.
            return self.evaluating.next_work(actor, first=False)
        self._pace.burst_over()
        return None

    def _may_train(self, actor: ActorState, now: float) -> bool:
        return (
            self._work.training
            and self._pacing.allowed(
                trainer_version=self.trainer_version,
                actor_version=actor.version,
                outstanding=self._leases.outstanding("train"),
                buffered=len(self._buffer),
                in_training=self._buffer.in_training,
                buffered_bytes=self._buffer.size_bytes,
                wanted=self._pace.groups_wanted(now),
            )
            > 0
        )

    # --- what comes back ------------------------------------------------------------------------

    def group(self, actor: ActorState, header: GroupHeader, payloads: list[memoryview]) -> None:
        """Take a group for a lease: it is stored, accepted, or refused."""
        actor.overrun.discard(header.lease)
        lease = self._leases.find(header.lease, actor.session)
        if lease is None:
            if answer := self._leases.why_not(header.lease):
                self._ack(actor.session, header.lease, *answer)
            return
        try:
            group = unpack_group(header, payloads, self._limits(lease.work))
            if unfit := self.evaluating.why_unfit(lease.work, group):
                raise BadMessage(f"group: {unfit}")
        except BadMessage as error:
            self._invalid(actor, lease, str(error))
            return
        for name, cause in group.missing.items():
            self._reward_failed(actor, lease.work, name, cause)
        actor.failures = 0
        self._has_ended(actor, lease)
        actor.groups += 1
        if lease.work.purpose != "check":
            self._registry.record_phase(actor, "generate", group.generation_seconds)
            self._registry.record_phase(actor, "score", group.reward_seconds)
        self._leases.arrive(lease)
        if lease.work.purpose == "train":
            self.limit.arrived(self._registry.clock() - lease.issued_at)
            self._admission.works(actor, group)
        received = ReceivedGroup(lease, group)
        if lease.work.purpose == "train" and self._journal is not None:
            self._journal.append(received, header, payloads)
            return
        if lease.work.purpose == "check":
            self._admission.submit(actor, group)
        self.accept(received)

    def accept(self, received: ReceivedGroup) -> None:
        """Use a group that is where it has to be, and acknowledge it."""
        lease, group = received.lease, received.group
        self._leases.receive(lease)
        self._work.done(lease.work, group)
        if lease.work.purpose == "train":
            self._buffer.add(group, lease.work.prompt_index)
            self._pace.stored(lease.work.prompt_index, self._registry.clock())
        self._ack(lease.holder, lease.number, "accepted", "")

    def _limits(self, work: Work) -> GroupLimits:
        return replace(
            self._any_group,
            num_rollouts=work.num_rollouts,
            max_tokens=work.max_tokens,
            newest_version=self.trainer_version,
        )

    def _invalid(self, actor: ActorState, lease: OutstandingLease, cause: str) -> None:
        self._registry.counters.bad_messages += 1
        self._end(actor, lease, "invalid_group")
        self._ack(actor.session, lease.number, "rejected", cause)
        self._try_again(lease)
        self._count_failure(actor, lease.work, cause)

    def _ack(self, session: str, lease: int, verdict: Verdict, cause: str) -> None:
        self._registry.counters.verdicts[verdict] += 1
        if verdict != "accepted":
            log.info("group for lease %d %s: %s", lease, verdict, cause)
        self._registry.send(session, Ack(lease=lease, verdict=verdict, cause=cause))

    # --- what does not --------------------------------------------------------------------------

    def failed(self, actor: ActorState, message: Failed) -> None:
        """End a lease that its actor gives up."""
        actor.overrun.discard(message.lease)
        lease = self._leases.find(message.lease, actor.session)
        if lease is None:
            return
        cause = one_line(message.cause)
        log.warning("lease %d failed on actor %d: %s", lease.number, actor.number, cause)
        if message.kind == "reward":
            self._reward_failed(actor, lease.work, message.reward, cause)
        self._end(actor, lease, "actor_failed")
        self._try_again(lease)
        self._count_failure(actor, lease.work, cause)

    def status(self, actor: ActorState, status: Status) -> None:
        """Note what an actor works on and has room for; a lease that it cannot know of was lost."""
        if actor.status is not None and status.tokens_generated > actor.status.tokens_generated:
            actor.progressed_at = self._registry.clock()
        actor.status = status
        # What it overran and does not list is not being worked on any more.
        actor.overrun.intersection_update(status.leases)
        first_unheard = next((first for seq, first in actor.pongs if seq == status.heard), 0)
        working_on = set(status.leases)
        for lease in self._leases.held_by(actor.session):
            if lease.number < first_unheard and lease.number not in working_on:
                log.warning(
                    "lease %d was lost on the way to or from actor %d", lease.number, actor.number
                )
                self._end(actor, lease, "lost")
                self._work.again(lease.work)
        actor.pongs.append((status.sequence, self._leases.next_lease))
        pong = Pong(sequence=status.sequence, version=self.trainer_version)
        self._registry.send(actor.session, pong)

    def end_overdue(self, now: float) -> None:
        """Give up the leases that lead nowhere; see `learner.coordinator.deadlines`."""
        for lease in self._leases.held:
            holder = self._registry.live[lease.holder]
            if now >= lease.expires_at:
                cause, what = "deadline", "is not done after"
                seconds = lease.expires_at - lease.issued_at
            elif now - max(lease.issued_at, holder.progressed_at) >= self.limit.timeout_s:
                cause, what = "no_progress", "got nowhere: no token for"
                seconds = self.limit.timeout_s
            else:
                continue
            log.warning(
                "lease %d (%s) %s %g s on actor %d; issued again",
                lease.number,
                lease.work.prompt_id,
                what,
                seconds,
                holder.number,
            )
            self._end(holder, lease, cause)
            holder.overrun.add(lease.number)
            self._try_again(lease)

    def _try_again(self, lease: OutstandingLease) -> None:
        """Lease work again that failed, unless it did so too often."""
        if not self._work.failed(lease.work, lease.holder):
            self._pace.gave_up(lease.work.prompt_index)

    def _end(self, holder: ActorState, lease: OutstandingLease, cause: str) -> None:
        """Close a lease as failed."""
        self._leases.fail(lease, cause)
        self._has_ended(holder, lease)
        if lease.work.purpose == "check":
            self._admission.lease_failed(holder)

    def _has_ended(self, holder: ActorState, lease: OutstandingLease) -> None:
        holder.num_leases -= 1
        holder.num_evaluating -= lease.work.purpose == "eval"

    def _reward_failed(self, actor: ActorState, work: Work, name: str, cause: str) -> None:
        """Count the failure of a reward function; one that the run must not survive ends it."""
        reward = next((r for r in self._config.rewards if r.name == name), None)
        if reward is None:
            return
        self._registry.counters.reward_failures[name] += 1
        problem = f"reward function {reward.function} failed on {work.prompt_id}: {cause}"
        log.warning("actor %d: %s", actor.number, problem)
        if reward.on_failure == "error":
            self._registry.fail(TrainingError(problem))

    def _count_failure(self, actor: ActorState, work: Work, cause: str) -> None:
        """Refuse an actor from which only failures come; where all are like that, end the run."""
        if work.attempts:
            # The row is known to be difficult. Such rows come before new ones, many in a row.
            return
        actor.failures += 1
        if actor.failures < max(MAX_ATTEMPTS, self._config.training.batch_groups):
            return
        problem = (
            f"{actor.failures} groups failed in a row, the last one ({work.prompt_id}) because: "
            f"{cause}"
        )
        if not any(other.failures == 0 for other in self._registry.live.values()):
            self._registry.fail(TrainingError(problem))
            return
        self._registry.refuse(actor, problem)
