"""Actors that come and go while pushes go on, each with a fate of its own.

In every place one actor follows the other (`tests.chaos.schedule.lives`). What happens when is
counted in pushes, not in seconds, so that a slow machine sees the same as a fast one.
"""

import json
import math
import signal
import time
from collections import Counter
from dataclasses import dataclass, field

from tests.chaos.record import Event, Tail
from tests.chaos.schedule import Life
from tests.chaos.system import At, Chaos
from tests.integration.processes import Process


@dataclass(slots=True)
class Stop:
    """An actor was frozen from ``at`` until ``until``."""

    pid: int
    at: float
    until: float
    in_a_push: bool
    is_over: bool = False


@dataclass(slots=True)
class Place:
    """Where one actor follows the other."""

    number: int
    plan: list[Life]
    """Of those that are still to come, from the one that is there on."""
    started: int = 0
    empty_since: int = 0
    """Pushes by then."""
    process: Process | None = None
    stop: Stop | None = None
    leaves_at: int | None = None
    """Pushes that the actor is to see after a stop."""


@dataclass(slots=True)
class Fleet:
    """Does what is due at every `turn`, and notes what it did."""

    chaos: Chaos
    places: list[Place]
    pushes: int = 0
    stops: list[Stop] = field(default_factory=list)
    ends: dict[int, float] = field(default_factory=dict)
    """By process id: when it was told to leave, or was killed."""
    counts: Counter[str] = field(default_factory=Counter)
    _seen: Counter[int] = field(default_factory=Counter)
    """Pushes that the actor with a process id was to take part in."""
    _pids: dict[str, int] = field(default_factory=dict)
    _tail: Tail = field(init=False)

    def __post_init__(self) -> None:
        self._tail = Tail(self.chaos.record)

    @property
    def is_calm(self) -> bool:
        """Whether nobody is on the way in or out, or frozen."""
        return all(
            place.process is None
            or (
                self._seen[place.process.pid] > 0
                and place.process.pid not in self.ends
                and (place.stop is None or place.stop.is_over)
            )
            for place in self.places
        )

    @property
    def living(self) -> list[Process]:
        return [
            place.process
            for place in self.places
            if place.process is not None and place.process.pid not in self.ends
        ]

    def was_well(self, pid: int, begin: float, end: float) -> bool:
        """Whether nothing was done to an actor in that time."""
        return self.ends.get(pid, math.inf) > end and not any(
            stop.pid == pid and stop.at < end and stop.until > begin for stop in self.stops
        )

    def turn(self, *, starts: bool = True) -> None:
        """``starts`` is whether new actors come."""
        for event in self._tail.read():
            self._note(event)
        for place in self.places:
            if place.process is None:
                if starts and place.plan and self.pushes >= place.empty_since + place.plan[0].after:
                    self._start(place)
            elif place.process.popen.poll() is None:
                self._live(place, place.process, place.plan[0])
            else:
                self._bury(place, place.process, place.plan[0])

    def _note(self, event: Event) -> None:
        match event["event"]:
            case "joined":
                self._pids[event["session"]] = event["actor_pid"]
            case "push":
                self._seen.update(self._pids[session] for session in event["sessions"])
            case "pushed":
                self.pushes += 1

    def _start(self, place: Place) -> None:
        life = place.plan[0]
        crash = None
        if life.moment:
            assert life.end != "leave"
            crash = At(life.moment, life.passage, life.end)
        place.process = self.chaos.start_toy(f"place-{place.number}-{place.started}", crash=crash)
        place.started += 1
        self.counts["starts"] += 1

    def _live(self, place: Place, process: Process, life: Life) -> None:
        if process.pid in self.ends:
            return
        if place.stop is not None:
            self._after_a_stop(place, process, place.stop, life)
        elif life.moment:
            mark = self.chaos.mark_of(process.log.stem)
            if life.end == "stop" and mark.exists():
                self._stopped(place, process, json.loads(mark.read_text())["at"])
        elif self._seen[process.pid] >= life.passage:
            match life.end:
                case "leave":
                    self._end(process, signal.SIGTERM)
                case "kill":
                    self._end(process, signal.SIGKILL)
                case "stop":
                    process.signal(signal.SIGSTOP)
                    self._stopped(place, process, time.monotonic())

    def _stopped(self, place: Place, process: Process, at: float) -> None:
        life = place.plan[0]
        place.stop = Stop(process.pid, at, math.inf, in_a_push=bool(life.moment))
        self.stops.append(place.stop)

    def _after_a_stop(self, place: Place, process: Process, stop: Stop, life: Life) -> None:
        if not stop.is_over:
            if time.monotonic() >= stop.at + life.lasts_s:
                stop.until, stop.is_over = time.monotonic(), True
                process.signal(signal.SIGCONT)
                place.leaves_at = self._seen[process.pid] + life.stays
        elif place.leaves_at is not None and self._seen[process.pid] >= place.leaves_at:
            self._end(process, signal.SIGTERM)

    def _end(self, process: Process, signum: int) -> None:
        self.ends[process.pid] = time.monotonic()
        process.signal(signum)

    def _bury(self, place: Place, process: Process, life: Life) -> None:
        """Whoever is gone is so by its fate, and not because something went wrong."""
        killed = life.end == "kill"
        code = process.popen.returncode
        assert code == (-signal.SIGKILL if killed else 0), f"exit code {code}\n{process.output}"
        mark = self.chaos.mark_of(process.log.stem)
        if killed and life.moment:
            self.ends[process.pid] = json.loads(mark.read_text())["at"]
        assert process.pid in self.ends, process.output
        self.counts["kills" if killed else "leaves"] += 1
        self.counts["kills in a push"] += killed and bool(life.moment)
        place.plan = place.plan[1:]
        place.process, place.stop, place.leaves_at = None, None, None
        place.empty_since = self.pushes
