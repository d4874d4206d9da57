"""A random schedule of failures, repeatable by its seed; the books balance at its end."""

import secrets
import signal
import time
from collections.abc import Callable
from threading import Timer

import pytest

from tests.chaos.incidents import Incident, spread
from tests.chaos.schedule import schedule
from tests.chaos.system import ACTOR_TIMEOUT_S, MARGIN_S, Chaos
from tests.integration.processes import Process, wait_for

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(900)]

ACTORS = 3
QUIET_S = 30.0
NOTICED_S = ACTOR_TIMEOUT_S + MARGIN_S


class Fleet:
    """Actors of which a dead one is started again at once."""

    def __init__(self, chaos: Chaos) -> None:
        self._chaos = chaos
        self._started = 0
        self.members: list[Process] = [self._start() for _ in range(ACTORS)]

    def _start(self) -> Process:
        self._started += 1
        return self._chaos.start_toy(f"actor-{self._started}")

    def kill(self, index: int) -> tuple[Incident, Process]:
        """What happened, and who takes the place."""
        incident = self._chaos.strike(self.members[index], signal.SIGKILL)
        self.members[index] = self._start()
        return incident, self.members[index]

    def stop(self, index: int, seconds: float) -> Incident:
        victim = self.members[index]
        incident = self._chaos.strike(victim, signal.SIGSTOP)
        Timer(seconds, victim.signal, [signal.SIGCONT]).start()
        return incident

    def replace_the_dead(self) -> None:
        for index, member in enumerate(self.members):
            if member.popen.poll() is not None:
                self.members[index] = self._start()


def test_random_failures(
    chaos: Chaos, figures: Callable[..., None], request: pytest.FixtureRequest
):
    option = request.config.getoption
    seed = option("--chaos-seed")
    seed = secrets.randbelow(10**6) if seed is None else seed
    seconds = option("--chaos-random-s")
    faults = schedule(seed, seconds, ACTORS)
    print(f"\n    seed {seed}: repeat with --chaos-seed {seed} --chaos-random-s {seconds:g}")
    print("\n".join(f"    {fault}" for fault in faults))

    chaos.start_learner()
    proxy = chaos.through_a_proxy()
    fleet = Fleet(chaos)
    for member in fleet.members:
        chaos.wait_for_groups(member)
    quiet_from = time.monotonic()
    wait_for(lambda: time.monotonic() > quiet_from + QUIET_S, "the quiet phase", QUIET_S + 5)
    chaos_from = time.monotonic()

    kills: list[tuple[Incident, Process]] = []
    for fault in faults:
        while time.monotonic() < chaos_from + fault.at_s:
            time.sleep(0.05)
            fleet.replace_the_dead()
        match fault.kind:
            case "kill":
                kills.append(fleet.kill(fault.victim))
            case "stop":
                fleet.stop(fault.victim, fault.lasts_s)
            case "cut":
                proxy.cut_for(fault.lasts_s)
    wait_for(lambda: time.monotonic() > chaos_from + seconds, "the end", seconds)
    until = time.monotonic()
    # Everybody is to be well again: what is measured above must not hide a permanent loss.
    for member in fleet.members:
        chaos.wait_for_groups(member, timeout_s=60)

    # One that had not joined yet, or was lost with its link, is not noticed a second time.
    connected = [kill for kill, _ in kills if kill.was_connected]
    noticed = [kill.noticed_after_s for kill in connected]
    again = [kill.leased_again_after_s for kill in connected]
    replaced = [chaos.first_group_after_s(successor, kill.at) for kill, successor in kills]
    quiet = len(chaos.groups_received(quiet_from, chaos_from)) / (chaos_from - quiet_from)
    troubled = len(chaos.groups_received(chaos_from, until)) / (until - chaos_from)
    counted = chaos.audit()
    figures(
        seed=seed,
        seconds=seconds,
        faults=len(faults),
        kills=len(kills),
        groups_a_second_quiet=quiet,
        groups_a_second_chaos=troubled,
        throughput_kept=troubled / quiet,
        noticed_within_s=NOTICED_S,
        noticed=spread(noticed),
        leased_again=spread(again),
        successor_at_work=spread(replaced),
        **counted,
    )
    assert all(after_s is not None and after_s <= NOTICED_S for after_s in noticed)
    assert None not in again
