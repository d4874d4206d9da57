"""What the learner knows of its actors, and what it counts of their messages."""

from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Literal

from learner.snapshots import Snapshot
from protocol.framing import Buffer
from protocol.messages import Header, Hello, Status

PONGS_REMEMBERED = 100


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
    key: str = ""
    """Public key that it joined with; empty without keys."""
    version: int = -1
    route: str = ""
    offered: int = -1
    """Version that it was last told of."""
    fed_at: float = 0.0
    """When it was last offered weights, asked for a chunk, or confirmed a version."""
    status: Status | None = None
    failures: int = 0
    """Rows in a row that failed when they were tried first."""
    wrong_digests: int = 0
    """In a row."""
    held: int = 0
    """Outstanding leases."""
    overrun: set[int] = field(default_factory=set)
    """Leases whose deadline passed, but that it may still be working on."""
    pongs: deque[tuple[int, int]] = field(default_factory=lambda: deque(maxlen=PONGS_REMEMBERED))
    """(sequence, number of the first lease issued after it) of the last answers to its status."""
    groups: int = 0
    check: Literal["off", "due", "out", "scoring", "passed"] = "off"
    """See `learner.selfcheck`; off where nobody is checked."""
    check_snapshot: Snapshot | None = None
    """Of the version that it is going to be checked with."""
    check_difference: float | None = None
    """Of log-probabilities, largest; None before the check."""

    @property
    def ready(self) -> bool:
        return self.version >= 0

    @property
    def is_checked(self) -> bool:
        """Whether it may get real work, as far as the check goes."""
        return self.check in ("off", "passed")

    @property
    def room(self) -> int:
        """Leases that it can take on top."""
        if self.status is None or not self.ready:
            return 0
        return self.status.capacity - self.held - len(self.overrun)


@dataclass(slots=True)
class WireCounters:
    """What arrived that was of no use, or told of a failure."""

    bad_messages: int = 0
    unknown_session: int = 0
    verdicts: Counter[str] = field(default_factory=Counter)
    actors_lost: int = 0
    digest_mismatches: int = 0
    reward_failures: Counter[str] = field(default_factory=Counter)
    """Groups that a reward function failed on, by reward."""

    def totals(self) -> dict[str, int]:
        """Those that are numbers, for a checkpoint."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, int)}

    def restore(self, totals: Mapping[str, int]) -> None:
        for name, value in totals.items():
            if name in self.totals():
                setattr(self, name, value)


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A message for one actor."""

    session: str
    header: Header
    payloads: tuple[Buffer, ...] = ()
