"""What goes wrong when, in a random run: a function of its seed."""

import random
from dataclasses import dataclass
from typing import Literal

KILLS_EVERY_S, STOPS_EVERY_S, CUTS_EVERY_S = 20.0, 45.0, 45.0
"""On average; the times between are exponential, as those of independent faults are."""


@dataclass(frozen=True, slots=True, order=True)
class Fault:
    """One thing that goes wrong."""

    at_s: float
    kind: Literal["kill", "stop", "cut"]
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
    for kind, every_s in (("kill", KILLS_EVERY_S), ("stop", STOPS_EVERY_S), ("cut", CUTS_EVERY_S)):
        at_s = draw.expovariate(1 / every_s)
        while at_s < seconds:
            faults.append(Fault(at_s, kind, draw.randrange(actors), draw.uniform(0.5, 5.0)))
            at_s += draw.expovariate(1 / every_s)
    return sorted(faults)
