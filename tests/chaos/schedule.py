"""What goes wrong when, in a random run: a function of its seed."""

import random
from dataclasses import dataclass
from typing import Literal

KILLS_EVERY_S, STOPS_EVERY_S, CUTS_EVERY_S = 20.0, 45.0, 45.0
"""On average; the times between are exponential, as those of independent faults are."""


FaultKind = Literal["kill", "stop", "cut"]
EVERY_S: dict[FaultKind, float] = {
    "kill": KILLS_EVERY_S,
    "stop": STOPS_EVERY_S,
    "cut": CUTS_EVERY_S,
}


@dataclass(frozen=True, slots=True, order=True)
class Fault:
    """One thing that goes wrong."""

    at_s: float
    kind: FaultKind
    victim: int
    """Which of the actors."""
    lasts_s: float

    def __str__(self) -> str:
        match self.kind:
            case "kill":
                what = f"kill -9 actor {self.victim}"
            case "stop":
                what = f"SIGSTOP actor {self.victim} for {self.lasts_s:.1f} s"
            case "cut":
                what = f"cut all links for {self.lasts_s:.1f} s"
        return f"{self.at_s:6.1f} s  {what}"


def schedule(seed: int, seconds: float, actors: int) -> list[Fault]:
    """Faults in order of time."""
    draw = random.Random(seed)
    faults = []
    for kind, every_s in EVERY_S.items():
        at_s = draw.expovariate(1 / every_s)
        while at_s < seconds:
            faults.append(Fault(at_s, kind, draw.randrange(actors), draw.uniform(0.5, 5.0)))
            at_s += draw.expovariate(1 / every_s)
    return sorted(faults)


Moment = Literal["", "push", "push.joined", "push.bucket", "push.received", "push.loaded"]
"""Of `tests.chaos.points`; empty for none in particular."""
MOMENTS: dict[Moment, int] = {
    "push.bucket": 5,
    "push": 2,
    "push.joined": 2,
    "push.received": 1,
    "push.loaded": 1,
    "": 2,
}
"""How likely each is."""
SHORT_STOP_S, LONG_STOP_S = (0.2, 1.5), (2.5, 5.0)
"""Shorter than what a push waits for, and longer."""


@dataclass(frozen=True, slots=True)
class Life:
    """One of the actors that follow each other in a place, and its fate."""

    after: int
    """Pushes without anybody, before it is started."""
    end: Literal["leave", "kill", "stop"]
    """A stopped one is continued, and leaves some time later."""
    moment: Moment
    passage: int
    """Of the moment, at which it happens; without one, pushes that it has taken part in."""
    lasts_s: float
    """Of a stop."""
    stays: int
    """Pushes that it takes part in after a stop, until it leaves."""

    def __str__(self) -> str:
        where = f"{self.moment} {self.passage}" if self.moment else f"push {self.passage}, anywhere"
        match self.end:
            case "leave":
                what = f"SIGTERM at {where}"
            case "kill":
                what = f"kill -9 at {where}"
            case "stop":
                what = f"SIGSTOP at {where} for {self.lasts_s:.1f} s, {self.stays} pushes more"
        return f"after {self.after}: {what}"


def lives(seed: int, place: int, count: int, buckets: int) -> list[Life]:
    """Of one place among several; a broadcast consists of so many ``buckets``."""
    draw = random.Random(f"{seed} {place}")
    moments, weights = list(MOMENTS), list(MOMENTS.values())
    found = []
    for _ in range(count):
        end: Literal["leave", "kill", "stop"] = draw.choice(
            ("leave", "kill", "kill", "stop", "stop")
        )
        moment: Moment = "" if end == "leave" else draw.choices(moments, weights)[0]
        pushes = draw.randint(1, 8)
        # An epoch is joined once, and lasts some pushes.
        passage = 1 + pushes // 5 if moment == "push.joined" else pushes
        if moment == "push.bucket":
            passage = (pushes - 1) * buckets + draw.randint(1, buckets)
        lasts_s = draw.uniform(*draw.choice((SHORT_STOP_S, LONG_STOP_S)))
        found.append(Life(draw.randint(0, 3), end, moment, passage, lasts_s, draw.randint(2, 6)))
    return found
