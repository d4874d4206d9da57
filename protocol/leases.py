"""The lease book: who rolls out which prompt, and that the books balance. No sockets, no clock.

A lease is one prompt row to be rolled out G times. It has exactly one end:

    issue ──► outstanding ──► received   a valid group arrived from its holder
                         └──► failed     the actor said so, was lost, or overran the deadline

    invariant, per purpose:   leased = received + failed + outstanding

A failed lease is never received later: when its row is issued again it gets a new number, so a
group that arrives after its lease was given up is refused and cannot be trained twice.
"""

from collections import Counter, OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

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
    attempts: int = 0
    """Leases of this row that failed so far."""


@dataclass(frozen=True, slots=True)
class Held:
    """An outstanding lease."""

    lease: int
    work: Work
    holder: str
    expires_at: float


@dataclass(slots=True)
class Books:
    """Counts of leases of one purpose since the start of the run."""

    leased: int = 0
    received: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    """By cause."""
    outstanding: int = 0

    @property
    def balanced(self) -> bool:
        return self.leased == self.received + self.failed.total() + self.outstanding


class LeaseBook:
    """Issues leases and settles each of them once."""

    def __init__(self, *, timeout_s: float, first_lease: int = 1) -> None:
        if timeout_s <= 0:
            raise ValueError(f"lease timeout must be positive, not {timeout_s}")
        self._timeout_s = timeout_s
        self._next = first_lease
        self._outstanding: dict[int, Held] = {}
        self._failed: OrderedDict[int, str] = OrderedDict()
        self.books: dict[Purpose, Books] = {
            "check": Books(),
            "train": Books(),
            "eval": Books(),
        }

    def issue(self, work: Work, holder: str, now: float) -> Lease:
        """Lease ``work`` to ``holder`` until ``now`` plus the timeout."""
        held = Held(self._next, work, holder, now + self._timeout_s)
        self._next += 1
        self._outstanding[held.lease] = held
        self._books(held).leased += 1
        self._books(held).outstanding += 1
        return Lease(
            lease=held.lease,
            row=work.row,
            prompt_id=work.prompt_id,
            seed=work.seed,
            num_rollouts=work.num_rollouts,
            temperature=work.temperature,
            max_tokens=work.max_tokens,
            purpose=work.purpose,
            deadline_s=self._timeout_s,
        )

    def held_by(self, holder: str) -> list[Held]:
        """Outstanding leases of one actor."""
        return [held for held in self._outstanding.values() if held.holder == holder]

    def find(self, lease: int, holder: str) -> Held | None:
        """The outstanding lease, if ``holder`` is the one who holds it."""
        held = self._outstanding.get(lease)
        return held if held is not None and held.holder == holder else None

    def why_not(self, lease: int) -> tuple[Verdict, str]:
        """Why a group for ``lease`` is not accepted now."""
        if lease in self._failed:
            return "rejected", f"lease {lease} was given up before: {self._failed[lease]}"
        if lease in self._outstanding:
            return "rejected", f"lease {lease} is held by another actor"
        if 0 < lease < self._next:
            return "duplicate", f"lease {lease} is settled"
        return "rejected", f"lease {lease} was never issued"

    def receive(self, held: Held) -> None:
        """A valid group for an outstanding lease arrived."""
        self._close(held)
        self._books(held).received += 1

    def fail(self, held: Held, cause: str) -> None:
        """An outstanding lease will not be fulfilled."""
        self._close(held)
        self._books(held).failed[cause] += 1
        self._failed[held.lease] = cause
        if len(self._failed) > _REMEMBERED_FAILURES:
            self._failed.popitem(last=False)

    def overdue(self, now: float) -> Iterable[Held]:
        """Outstanding leases whose deadline has passed."""
        return [held for held in self._outstanding.values() if held.expires_at <= now]

    def outstanding(self, purpose: Purpose) -> int:
        return self.books[purpose].outstanding

    def _books(self, held: Held) -> Books:
        return self.books[held.work.purpose]

    def _close(self, held: Held) -> None:
        del self._outstanding[held.lease]
        self._books(held).outstanding -= 1
