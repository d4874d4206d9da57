"""The lease book: who rolls out which prompt, in counts that balance. No sockets, no clock.

A lease is one prompt row to be rolled out G times. It has exactly one end:

    issue ──► held ──► arrived ──► received   a valid group came from its holder, and is stored
               └─────► failed                 the actor said so, was lost, or took too long

    invariant, per purpose:   leased = received + failed + outstanding (held or arrived)

A failed lease is never received later: when its row is issued again it gets a new number, so a
group that arrives after its lease was given up is refused and cannot be trained twice.
"""

from collections import Counter, OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from protocol.messages import Lease, Purpose, Verdict

_REMEMBERED_FAILURES = 100_000


@dataclass(frozen=True, slots=True)
class Work:
    """A prompt row waiting to be leased."""

    prompt_id: str
    row: dict[str, Any]
    seed: int
    num_rollouts: int
    temperature: float
    max_tokens: int
    purpose: Purpose = "train"
    prompt_index: int = -1
    """Position in the endless stream of training prompts; the same however often it is leased."""
    attempts: int = 0
    """Leases of this row that failed so far."""
    failed_on: str = ""
    """Holder of the last one that failed; empty if none did."""


@dataclass(frozen=True, slots=True)
class OutstandingLease:
    """A lease that has no end yet."""

    number: int
    work: Work
    holder: str
    issued_at: float
    expires_at: float
    """When it is given up, whatever its holder does."""


@dataclass(slots=True)
class LeaseCounts:
    """Counts of leases of one purpose, since the start of the run and across resumes."""

    leased: int = 0
    received: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    """Failures by cause."""
    outstanding: int = 0

    @classmethod
    def after_loss(cls, received: int, failed: Mapping[str, int], gone: int) -> Self:
        """Counts for a learner that took over from a lost one, with ``gone`` leases out."""
        causes = Counter(failed)
        if gone:
            causes["learner_lost"] += gone
        return cls(received + causes.total(), received, causes)

    @property
    def balanced(self) -> bool:
        """Whether every lease has an end or is outstanding."""
        return self.leased == self.received + self.failed.total() + self.outstanding


class LeaseBook:
    """Issues leases and settles each of them once."""

    def __init__(self) -> None:
        self.next_lease = 1
        """Number of the lease that is issued next."""
        self._held: dict[int, OutstandingLease] = {}
        self._arrived: dict[int, OutstandingLease] = {}
        self._failed: OrderedDict[int, str] = OrderedDict()
        self.counts: dict[Purpose, LeaseCounts] = {
            "check": LeaseCounts(),
            "train": LeaseCounts(),
            "eval": LeaseCounts(),
        }

    def issue(self, work: Work, holder: str, now: float, *, limit_s: float) -> Lease:
        """Lease ``work`` to ``holder`` until ``now`` plus the limit, at the longest."""
        lease = OutstandingLease(self.next_lease, work, holder, now, now + limit_s)
        self.next_lease += 1
        self._held[lease.number] = lease
        self._counts(lease).leased += 1
        self._counts(lease).outstanding += 1
        return Lease(
            lease=lease.number,
            row=work.row,
            prompt_id=work.prompt_id,
            seed=work.seed,
            num_rollouts=work.num_rollouts,
            temperature=work.temperature,
            max_tokens=work.max_tokens,
            purpose=work.purpose,
            deadline_s=limit_s,
        )

    @property
    def held(self) -> list[OutstandingLease]:
        """Leases that are to be fulfilled, the oldest first."""
        return list(self._held.values())

    def held_by(self, holder: str) -> list[OutstandingLease]:
        """Leases that one actor has yet to fulfil."""
        return [lease for lease in self._held.values() if lease.holder == holder]

    def find(self, number: int, holder: str) -> OutstandingLease | None:
        """The lease, if ``holder`` has yet to fulfil it."""
        lease = self._held.get(number)
        return lease if lease is not None and lease.holder == holder else None

    def why_not(self, number: int) -> tuple[Verdict, str] | None:
        """Why a group for lease ``number`` is not accepted now.

        None while the lease's group has arrived but is not stored yet: the answer is still to come.
        """
        if number in self._arrived:
            return None
        if number in self._failed:
            return "rejected", f"lease {number} was given up before: {self._failed[number]}"
        if number in self._held:
            return "rejected", f"lease {number} is held by another actor"
        if 0 < number < self.next_lease:
            return "duplicate", f"lease {number} is settled"
        return "rejected", f"lease {number} was never issued"

    def arrive(self, lease: OutstandingLease) -> None:
        """Note that a valid group came from the holder, and is to be stored."""
        del self._held[lease.number]
        self._arrived[lease.number] = lease

    def receive(self, lease: OutstandingLease) -> None:
        """Note that the group that arrived is stored."""
        del self._arrived[lease.number]
        self._counts(lease).outstanding -= 1
        self._counts(lease).received += 1

    def fail(self, lease: OutstandingLease, cause: str) -> None:
        """Note that the holder will not fulfil the lease."""
        del self._held[lease.number]
        self._counts(lease).outstanding -= 1
        self._counts(lease).failed[cause] += 1
        self._failed[lease.number] = cause
        if len(self._failed) > _REMEMBERED_FAILURES:
            self._failed.popitem(last=False)

    def open_works(self, purpose: Purpose) -> list[Work]:
        """Work of all outstanding leases of a purpose."""
        everything = (*self._held.values(), *self._arrived.values())
        return [lease.work for lease in everything if lease.work.purpose == purpose]

    def outstanding(self, purpose: Purpose) -> int:
        """Number of leases that have no end yet."""
        return self.counts[purpose].outstanding

    def _counts(self, lease: OutstandingLease) -> LeaseCounts:
        return self.counts[lease.work.purpose]
