"""What the learner knows of its actors, and what it counts of their messages."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

from learner.snapshots import Snapshot
from protocol.framing import Buffer
from protocol.messages import Header, Hello, Status


@dataclass(slots=True, eq=False)
class ActorState:
    """What the learner knows of one actor."""

    session: str
    hello: Hello
    first_heard: float
    joined_at: float
    """Also set back when its weights were wrong: the time that it has for them begins anew."""
    last_heard: float
    number: int
    version: int = -1
    route: str = ""
    status: Status | None = None
    failures: int = 0
    """Groups that failed in a row."""
    wrong_digests: int = 0
    """In a row."""
    held: int = 0
    """Outstanding leases."""
    overrun: set[int] = field(default_factory=set)
    """Leases whose deadline passed, but that it may still be working on."""
    groups: int = 0
    check: Literal["due", "out", "scoring", "passed"] = "due"
    """See `learner.selfcheck`."""
    check_snapshot: Snapshot | None = None
    """Of the version that it is going to be checked with."""
    check_difference: float | None = None
    """Of log-probabilities, largest; None before the check."""

    @property
    def ready(self) -> bool:
        return self.version >= 0

    @property
    def room(self) -> int:
        """Leases that it can take on top."""
        if self.status is None or not self.ready:
            return 0
        return self.status.capacity - self.held - len(self.overrun)


@dataclass(slots=True)
class WireCounters:
    """What arrived that was of no use."""

    bad_messages: int = 0
    unknown_session: int = 0
    verdicts: Counter[str] = field(default_factory=Counter)
    actors_lost: int = 0
    digest_mismatches: int = 0


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A message for one actor."""

    session: str
    header: Header
    payloads: tuple[Buffer, ...] = ()
