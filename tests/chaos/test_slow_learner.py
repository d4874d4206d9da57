"""A learner ten times slower than its actors: they wait, nothing grows, nothing is dropped."""

import time
from collections.abc import Callable

import numpy as np
import pytest

from tests.chaos.system import Chaos
from tests.integration.processes import resident_bytes, wait_for

pytestmark = pytest.mark.chaos

GROUP_S, LEASES, ACTORS = 0.1, 4, 2
PAUSE_S = 1.0
MAX_STALENESS, BATCH = 2, 8
WARM_UP_STEPS = 20
"""Allocators reach their working size in the first of them."""
MB_A_MINUTE = 1.0


@pytest.mark.timeout(600)
def test_memory_is_flat_and_nothing_is_dropped(
    chaos: Chaos, figures: Callable[..., None], request: pytest.FixtureRequest
):
    minutes = request.config.getoption("--chaos-minutes")
    chaos.start_learner(
        f"training.pause_per_step_s={PAUSE_S}", f"training.max_staleness={MAX_STALENESS}"
    )
    chaos.start_toys(ACTORS, group_s=GROUP_S)
    chaos.wait_for_step(WARM_UP_STEPS)

    pids = {"learner": chaos.learner.pid, "actor": chaos.toys[0].pid}
    samples: dict[str, list[float]] = {name: [] for name in ("minutes", "buffered", *pids)}
    since = time.monotonic()
    step = chaos.status()["step"]
    while (elapsed := (time.monotonic() - since) / 60) < minutes:
        step += 1
        wait_for(lambda target=step: chaos.status()["step"] >= target, f"step {step}", 20)
        samples["minutes"].append(elapsed)
        samples["buffered"].append(chaos.status()["buffer_groups"])
        for name, pid in pids.items():
            samples[name].append(resident_bytes(pid) / 1e6)
    status = chaos.status()
    counted = chaos.audit()

    slopes = {name: float(np.polyfit(samples["minutes"], samples[name], 1)[0]) for name in pids}
    could = ACTORS * LEASES / GROUP_S
    did = counted["groups_trained"] / (counted["steps"] * PAUSE_S)
    figures(
        minutes=minutes,
        times_slower=could / did,
        learner_mb=samples["learner"][-1],
        learner_mb_a_minute=slopes["learner"],
        actor_mb=samples["actor"][-1],
        actor_mb_a_minute=slopes["actor"],
        most_buffered=max(samples["buffered"]),
        actors_idle=status["actor_idle_share"],
        **counted,
    )
    assert could / did > 9
    assert max(samples["buffered"]) <= (MAX_STALENESS + 1) * BATCH
    assert counted["groups_evicted"] == counted["leases_failed"] == 0
    assert status["bottleneck"] == "learner"
    assert status["actor_idle_share"] > 0.7
    if minutes >= 1:
        assert max(slopes.values()) < MB_A_MINUTE
