"""What the record says of pushes, without asking the product."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from tests.chaos.audit import of
from tests.chaos.record import Event


@dataclass(frozen=True, slots=True)
class Push:
    """One push to ready actors."""

    version: int
    pids: tuple[int, ...]
    begin: float
    end: float

    @property
    def seconds(self) -> float:
        return self.end - self.begin


def pushes_in(events: Sequence[Event]) -> list[Push]:
    """Those that have ended."""
    pids = {e["session"]: e["actor_pid"] for e in of(events, "joined")}
    return [
        Push(
            begun["version"],
            tuple(pids[session] for session in begun["sessions"]),
            begun["at"],
            ended["at"],
        )
        # One thread, one after the other; the last one may not have ended.
        for begun, ended in zip(of(events, "push"), of(events, "pushed"), strict=False)
    ]


class Loads:
    """Which actor held which version from when on."""

    def __init__(self, events: Sequence[Event]) -> None:
        self._by_pid: dict[int, list[tuple[float, int]]] = defaultdict(list)
        for event in of(events, "loaded"):
            self._by_pid[event["pid"]].append((event["at"], event["version"]))

    def after_s(self, pid: int, version: int, since: float) -> float | None:
        """Seconds from ``since`` until the actor held ``version`` or a later one.

        0 if it did already, None if it never did.
        """
        found = [at for at, loaded in self._by_pid[pid] if loaded >= version]
        return max(0.0, min(found) - since) if found else None


def newest_before(events: Sequence[Event], at: float) -> int:
    """The newest version that was published by then."""
    return max((e["version"] for e in of(events, "published") if e["at"] <= at), default=0)


def training_waits(events: Sequence[Event]) -> list[float]:
    """Seconds from the end of each training step to the beginning of the next one."""
    turns = of(events, "step", "stepped")
    return [b["at"] - a["at"] for a, b in pairwise(turns) if b["event"] == "step"]


def held_up(events: Sequence[Event]) -> list[float]:
    """Seconds of each time that the trainer itself was held up to give its weights away."""
    turns = of(events, "packing", "packed")
    return [b["at"] - a["at"] for a, b in pairwise(turns) if b["event"] == "packed"]
