"""An actor that joins a run in full swing: soon of use, and no trouble to anybody."""

import os
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import pytest

from tests.chaos.audit import of
from tests.chaos.flight import newest_before, training_waits
from tests.chaos.record import Event
from tests.chaos.system import Chaos
from tests.integration.processes import RECIPE, Process, wait_for

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(240)]

WINDOW_S = 10.0
AT_WORK_S = 30.0
"""From the start of the process; most of it goes into importing torch."""
TIMEOUT_S = 5.0
LONG = (
    "endpoints.bind=tcp://127.0.0.1:0",
    "endpoints.metrics_port=0",
    "training.steps=100000",
    f"weights.timeout_s={TIMEOUT_S}",
)


def test_a_late_joiner(chaos: Chaos, figures: Callable[..., None]):
    """The demo's recipe and engine."""
    chaos.learner = chaos.entry("learner", "learner", str(RECIPE), *LONG)
    chaos.wait_until_it_listens(chaos.learner)
    chaos.start_actor("first")
    chaos.wait_for_step(5, 60)
    cores = [Cores(chaos)]
    time.sleep(WINDOW_S)

    started = time.monotonic()
    cores.append(Cores(chaos))
    joiner = chaos.start_actor("joiner")
    wait_for(lambda: groups_of(chaos, joiner), "its first group", 60)
    at_work = groups_of(chaos, joiner)[0]["at"]
    cores.append(Cores(chaos))
    wait_for(lambda: time.monotonic() > at_work + WINDOW_S, "a while", WINDOW_S + 5)
    cores.append(Cores(chaos))
    counted = chaos.audit()

    events = chaos.events("leased", "published", "step", "stepped", "left", "joined", "confirmed")
    groups = groups_of(chaos, joiner)
    leased = {e["lease"]: newest_before(events, e["at"]) for e in of(events, "leased")}
    lags = [leased[group["lease"]] - max(group["versions"]) for group in groups]
    current = next(group for group, lag in zip(groups, lags, strict=True) if lag <= 0)
    [joined] = [e["at"] for e in of(events, "joined") if e["actor_pid"] == joiner.pid]
    confirmed = [e for e in of(events, "confirmed") if e["pid"] == joiner.pid]
    waits = training_waits([e for e in events if started <= e["at"] <= at_work])
    figures(
        joined_s=joined - started,
        weights_s=confirmed[0]["at"] - started,
        first_group_s=at_work - started,
        current_version_s=current["at"] - started,
        first_lag=lags[0],
        tokens_a_second_before=tokens_trained_a_second(events, started - WINDOW_S, started),
        tokens_a_second_during=tokens_trained_a_second(events, started, at_work),
        tokens_a_second_after=tokens_trained_a_second(events, at_work, at_work + WINDOW_S),
        cores_of_others=[round(b.used_by_others_since(a), 2) for a, b in pairwise(cores)],
        longest_wait_of_training_s=max(waits),
        **counted,
    )
    assert at_work - started <= AT_WORK_S
    assert current["at"] - started <= AT_WORK_S
    assert max(waits) <= TIMEOUT_S
    # The one that was there stayed, and nobody else joined.
    assert [e["actor_pid"] for e in of(events, "joined")][1:] == [joiner.pid]
    assert not [e for e in of(events, "left") if e["at"] <= at_work + WINDOW_S]


class Cores:
    """Use of the processor until now: throughput says little while others use it, too."""

    def __init__(self, chaos: Chaos) -> None:
        ticks = os.sysconf("SC_CLK_TCK")
        user, nice, system = Path("/proc/stat").read_text().split()[1:4]
        everybody = int(user) + int(nice) + int(system)
        ours = 0
        for pid in chaos.processes_left():
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            ours += int(fields[11]) + int(fields[12])
        self._others_s = (everybody - ours) / ticks
        self._at = time.monotonic()

    def used_by_others_since(self, before: "Cores") -> float:
        """Cores, on average."""
        return (self._others_s - before._others_s) / (self._at - before._at)


def groups_of(chaos: Chaos, actor: Process) -> list[Event]:
    """To train on, that were accepted from an actor."""
    sessions = chaos.sessions(actor.pid)
    mine = {e["lease"] for e in chaos.events("leased") if e["session"] in sessions}
    return [e for e in chaos.events("added") if e["lease"] in mine]


def tokens_trained_a_second(events: Sequence[Event], begin: float, end: float) -> float:
    steps = [e for e in of(events, "stepped") if begin < e["at"] <= end]
    return sum(step["tokens"] for step in steps) / (end - begin)
