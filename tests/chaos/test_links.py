"""Links that are cut, half-open or slow: nothing is trained twice, everybody comes back."""

import signal
import time
from collections.abc import Callable
from typing import Any

import pytest

from actors.link import HELLO_RETRY_S
from tests.chaos.incidents import spread
from tests.chaos.proxy import Direction
from tests.chaos.system import LEASE_TIMEOUT_S, Chaos
from tests.integration.processes import wait_for

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(240)]

RECONNECT_MAX_S = 5.0
"""Longest pause between two attempts (protocol/sockets.py)."""
HEARTBEAT_S = 12.0
"""ZeroMQ notices a dead link: interval and timeout of its heartbeat."""
REJOIN_S = HELLO_RETRY_S + 2.0
"""A hello that was lost, weights and the first group."""
HALF_OPEN: tuple[tuple[Direction, ...], ...] = (("up", "down"), ("up",), ("down",))
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


def test_links_that_are_cut(chaos: Chaos, figures: Callable[..., None]):
    chaos.start_learner()
    proxy = chaos.through_a_proxy()
    chaos.start_toys(3)
    # A delay, so that groups and acknowledgements are on their way when the cut comes.
    proxy.delay_s = 0.05
    for cut_s in (1, 30):
        proxy.cut()
        time.sleep(cut_s)
        proxy.restore()
        figures(cut_s=cut_s, back_again=spread(back_after_s(chaos, time.monotonic())))
    figures(trained_twice=0, **chaos.audit())


def test_links_that_are_half_open(chaos: Chaos, figures: Callable[..., None]):
    """Sockets stay open, nothing comes through; then everything arrives late at once."""
    chaos.start_learner()
    proxy = chaos.through_a_proxy()
    chaos.start_toys(3)
    for directions in HALF_OPEN:
        proxy.freeze(*directions)
        time.sleep(15)
        proxy.restore()
        back = spread(back_after_s(chaos, time.monotonic()))
        figures(directions="+".join(directions), back_again=back)
    figures(trained_twice=0, **chaos.audit())


@pytest.mark.parametrize("refuse", ["by kernel", "after accepting"])
def test_no_storm_when_a_fleet_comes_back(chaos: Chaos, figures: Callable[..., None], refuse: Any):
    """64 actors lose their links for 30 s: attempts are spread, and everybody is back."""
    chaos.start_learner(
        "training.batch_groups=64", "weights.timeout_s=5", "training.max_staleness=4"
    )
    proxy = chaos.through_a_proxy()
    chaos.python("fleet", "-m", "tests.chaos.many", proxy.url, str(FLEET), "2")
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
    # Spread over a second, not all at once; and no more often than that.
    assert max(map(tenths.count, tenths)) <= FLEET / 2
    assert max(during[second] for second in range(1, 30)) <= 1.5 * FLEET


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
