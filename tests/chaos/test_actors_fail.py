"""One actor dies, freezes or gets stuck in a reward: noticed in time, its work done by others."""

import signal
import time
from collections.abc import Callable
from typing import Any

import pytest

from tests.chaos.system import ACTOR_TIMEOUT_S, MARGIN_S, At, Chaos
from tests.integration.processes import ancestors, wait_for

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(180)]

NOTICED_S = ACTOR_TIMEOUT_S + MARGIN_S
PUSH_TIMEOUT_S = 2.0
REWARD_TIMEOUT_S = 3.0
WINDOW_S = 6.0
MOMENTS = [
    ("rollout", 40),
    ("upload", 40),
    ("push", 5),
    # It joins the group of an epoch once.
    ("push.joined", 1),
    ("push.loaded", 5),
]


@pytest.mark.parametrize("deed", ["kill", "stop"])
def test_an_actor_that_dies_or_freezes(chaos: Chaos, figures: Callable[..., None], deed: Any):
    chaos.start_learner()
    chaos.start_toys(2)
    for number, (point, call) in enumerate(MOMENTS):
        victim = chaos.start_toy(f"victim-{number}", crash=At(point, call, deed))
        incident = chaos.expect_crash(victim)
        noticed = incident.is_noticed_within(NOTICED_S)
        again = incident.work_is_leased_again_within(NOTICED_S)
        pace, gap = incident.others_pace(WINDOW_S)
        figures(
            point=point,
            noticed_s=noticed,
            bound_s=NOTICED_S,
            leased_again_s=again,
            others_gap_s=gap,
            others_pace=pace,
        )
        # A push that it holds up costs the others two deadlines of the push; nothing else does.
        assert gap <= (2 * PUSH_TIMEOUT_S if "push" in point else 0.0) + MARGIN_S
        assert pace > (0.4 if "push" in point else 0.7)
        if deed == "stop":
            victim.signal(signal.SIGCONT)
            chaos.wait_for_groups(victim)
            chaos.strike(victim, signal.SIGKILL).is_noticed_within(NOTICED_S)
    chaos.audit()


@pytest.mark.parametrize("prison", ["hang", "hold"])
def test_a_reward_that_never_returns(chaos: Chaos, figures: Callable[..., None], prison: str):
    """``hang`` sleeps for ever, ``hold`` does so with the lock of the interpreter held."""
    chaos.start_learner(
        f"actor.reward_timeout_s={REWARD_TIMEOUT_S}", "deadlines.lease_timeout_s=60"
    )
    chaos.start_toys(3)
    (chaos.folder / prison).touch()
    prisons = lambda: list(chaos.folder.glob(f"{prison}.*"))  # noqa: E731
    wait_for(prisons, "a reward to be taken prisoner")
    _, prisoner, seconds, fraction = prisons()[0].name.split(".")
    at = float(f"{seconds}.{fraction}")
    [victim] = [toy for toy in chaos.toys if toy.pid in ancestors(int(prisoner))]

    failures = lambda: [  # noqa: E731
        e for e in chaos.events("failed", since=at) if e["cause"] == "actor_failed"
    ]
    bound_s = REWARD_TIMEOUT_S + MARGIN_S
    wait_for(failures, "the lease to fail", bound_s + 10)
    reported = failures()[0]["at"] - at
    version = chaos.status()["step"]
    # Its other leases, its heartbeat and its weights go on as if nothing had happened.
    chaos.wait_for_groups(victim, more=4)
    assert chaos.events("left", since=at) == []
    wait_for(lambda: (chaos.actor(victim.pid) or {})["version"] >= version, "its weights")
    meanwhile = [e for e in chaos.events("received") if at < e["at"] < at + reported]
    sessions = chaos.sessions(victim.pid)
    own_groups = sum(e["session"] in sessions for e in meanwhile)

    [lost] = [e for e in chaos.events("leased") if e["lease"] == failures()[0]["lease"]]
    again = [
        e["at"] - at for e in chaos.events("leased", since=at) if e["prompt"] == lost["prompt"]
    ]
    figures(
        reported_s=reported,
        bound_s=bound_s,
        leased_again_s=again[0],
        own_groups_meanwhile=own_groups,
        groups_meanwhile=len(meanwhile),
    )
    assert reported <= bound_s
    assert own_groups > 0
    chaos.audit()
    wait_for(lambda: victim.popen.poll() is not None, "the actor's end", 10)
    assert time.monotonic() - at > REWARD_TIMEOUT_S
