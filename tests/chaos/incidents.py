"""What happened to an actor, and what must be seen of it."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import TYPE_CHECKING

from tests.integration.processes import Process, wait_for

if TYPE_CHECKING:
    from tests.chaos.system import Chaos


@dataclass(slots=True)
class Incident:
    """Something happened to an actor at ``at`` (monotonic clock)."""

    chaos: "Chaos"
    process: Process
    at: float

    def is_noticed_within(self, bound_s: float) -> float:
        """Seconds until the learner gave the actor up."""
        wait_for(lambda: self.noticed_after_s is not None, "its loss to be noticed", bound_s + 10)
        seconds = self.noticed_after_s
        assert seconds is not None
        assert seconds <= bound_s, f"noticed after {seconds:.2f} s, the bound is {bound_s:.2f} s"
        return seconds

    def work_is_leased_again_within(self, bound_s: float) -> float:
        """Seconds until the last of the prompts that it held was leased to somebody else."""
        wait_for(lambda: self.leased_again_after_s is not None, "its prompts", bound_s + 10)
        seconds = self.leased_again_after_s
        assert seconds is not None
        assert seconds <= bound_s, f"leased again after {seconds:.2f} s, not {bound_s:.2f} s"
        return seconds

    @property
    def was_connected(self) -> bool:
        """Whether the learner counted on it when it happened."""
        history = [
            e["event"]
            for e in self.chaos.events("joined", "left")
            if e["actor_pid"] == self.process.pid and e["at"] < self.at
        ]
        return history[-1:] == ["joined"]

    @property
    def noticed_after_s(self) -> float | None:
        left = self.chaos.events("left", since=self.at)
        return next((e["at"] - self.at for e in left if e["actor_pid"] == self.process.pid), None)

    @property
    def leased_again_after_s(self) -> float | None:
        """0 if it held nothing; None while something of it waits."""
        noticed = self.noticed_after_s
        if noticed is None:
            return None
        sessions = self.chaos.sessions(self.process.pid)
        leased = {e["lease"]: e for e in self.chaos.events("leased")}
        lost = [
            leased[e["lease"]]
            for e in self.chaos.events("failed", since=self.at)
            if e["cause"] == "actor_lost" and leased[e["lease"]]["session"] in sessions
        ]
        again: dict[str, float] = {}
        for event in self.chaos.events("leased", since=self.at + noticed):
            again.setdefault(event["prompt"], event["at"])
        waits = [again.get(lease["prompt"]) for lease in lost]
        if None in waits:
            return None
        return max((at - self.at for at in waits if at is not None), default=0.0)

    def others_pace(self, window_s: float) -> tuple[float, float]:
        """What the others delivered in the window after it, as a share of what they did in the one
        before it, and the longest time without a group of theirs."""
        until = self.at + window_s
        wait_for(lambda: time.monotonic() >= until, "the window", window_s + 5)
        pid = self.process.pid
        before = self.chaos.groups_received(self.at - window_s, self.at, without=pid)
        after = self.chaos.groups_received(self.at, until, without=pid)
        edges = [self.at, *after, until]
        gap_s = max(later - earlier for earlier, later in pairwise(edges))
        return len(after) / max(len(before), 1), gap_s


def spread(values: Sequence[float | None]) -> str:
    """Median and maximum of those that are known, for people."""
    known = [value for value in values if value is not None]
    if not known:
        return "none"
    return f"p50 {median(known):.2f} s, max {max(known):.2f} s ({len(known)})"
