"""Links that are cut, half-open or slow: nothing is trained twice, everybody comes back."""

import signal
import time
from collections.abc import Callable
from typing import Any

import pytest

from actors.link import HELLO_RETRY_S
from tests.chaos.system import LEASE_TIMEOUT_S, Chaos, spread
from tests.integration.processes import wait_for

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(240)]

RECONNECT_MAX_S = 5.0
"""Longest pause between two attempts (protocol/sockets.py)."""
HEARTBEAT_S = 12.0
"""ZeroMQ notices a dead link: interval and timeout of its heartbeat."""
REJOIN_S = HELLO_RETRY_S + 2.0
"""A hello that was lost, weights and the first group."""
FLEET = 64


def back_after_s(chaos: Chaos, since: float) -> list[float]:
    """When each toy had a group accepted again; `LEASE_TIMEOUT_S` frees what the link lost."""
    bound_s = RECONNECT_MAX_S + HEARTBEAT_S + REJOIN_S + LEASE_TIMEOUT_S

    def seconds() -> list[float | None]:
        mine = {e["session"]: e["actor_pid"] for e in chaos.events("joined")}
        first: dict[int, float] = {}
        for event in chaos.events("received", since=since):
            first.setdefault(mine[event["session"]], event["at"] - since)
        return [first.get(toy.pid) for toy in chaos.toys]

    wait_for(lambda: None not in seconds(), "every actor's groups", bound_s + 10)
    found = [value for value in seconds() if value is not None]
    assert max(found) <= bound_s
    return found


@pytest.mark.parametrize("cut_s", [1, 30])
def test_links_that_are_cut(chaos: Chaos, figures: Callable[..., None], cut_s: int):
    chaos.start_learner()
    proxy = chaos.through_a_proxy()
    chaos.start_toys(3)
    # A delay, so that groups and acknowledgements are on their way when the cut comes.
    proxy.delay_s = 0.05
    proxy.cut()
    time.sleep(cut_s)
    proxy.restore()
    since = time.monotonic()
    back = back_after_s(chaos, since)
    counted = chaos.audit()
    figures(cut_s=cut_s, back_again=spread(back), trained_twice=0, **counted)


@pytest.mark.parametrize("directions", [("up", "down"), ("up",), ("down",)])
def test_links_that_are_half_open(
    chaos: Chaos, figures: Callable[..., None], directions: tuple[Any, ...]
):
    """Sockets stay open, nothing comes through; then everything arrives late at once."""
    chaos.start_learner()
    proxy = chaos.through_a_proxy()
    chaos.start_toys(3)
    proxy.freeze(*directions)
    time.sleep(15)
    proxy.restore()
    since = time.monotonic()
    back = back_after_s(chaos, since)
    counted = chaos.audit()
    figures(directions="+".join(directions), back_again=spread(back), trained_twice=0, **counted)


@pytest.mark.parametrize("refuse", ["by kernel", "after accepting"])
def test_no_storm_when_a_fleet_comes_back(chaos: Chaos, figures: Callable[..., None], refuse: Any):
    """64 actors lose their links for 30 s: attempts are spread, and everybody is back."""
    chaos.start_learner("learner.batch_groups=64", "weights.timeout_s=5", "learner.max_staleness=4")
    proxy = chaos.through_a_proxy()
    fleet = chaos.python("fleet", "-m", "tests.chaos.many", proxy.url, str(FLEET), "2")
    wait_for(lambda: working(chaos, 0.0) == FLEET, "the fleet", 90)
    version = chaos.status()["step"]
    chaos.wait_for_step(version + 1)

    proxy.cut(refuse=refuse)
    cut_at = time.monotonic()
    time.sleep(30)
    proxy.restore()
    since = time.monotonic()
    wait_for(lambda: working(chaos, since) == FLEET, "the whole fleet", 60)
    back_s = time.monotonic() - since
    during = proxy.attempts_per_second(cut_at)
    after = proxy.attempts_per_second(since)
    attempts = [at - since for at in proxy.attempts if at >= since]
    tenths = [int(10 * at) for at in attempts]
    chaos.wait_for_step(chaos.status()["step"] + 1)
    counted = chaos.audit()
    wait_for(lambda: fleet.popen.poll() is not None, "the fleet's end", 15)
    figures(
        refuse=refuse,
        actors=FLEET,
        all_back_s=back_s,
        attempts_a_second_during=max(during[second] for second in range(30)),
        attempts_a_second_after=max(after.values()),
        attempts_a_tenth_after=max(map(tenths.count, tenths)),
        attempts_for_each=len(attempts) / FLEET,
        **counted,
    )
    assert len(attempts) <= 2 * FLEET
    assert fleet.wait(1) == 0, fleet.output[-2000:]


def working(chaos: Chaos, since: float) -> int:
    """Actors from which a group came since then."""
    return len({e["session"] for e in chaos.events("received", since=since)})


def test_slow_links_only_slow_things_down(chaos: Chaos, figures: Callable[..., None]):
    chaos.start_learner()
    proxy = chaos.through_a_proxy()
    chaos.start_toys(2)
    proxy.delay_s = 0.5
    step = chaos.status()["step"]
    chaos.wait_for_step(step + 10)
    assert chaos.events("left") == []
    figures(delay_s=proxy.delay_s, **chaos.audit())
    for toy in chaos.toys:
        toy.signal(signal.SIGTERM)
