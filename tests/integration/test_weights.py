"""Weights on each of their routes, in real processes, and where people can see it."""

import signal
import time
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.integration.processes import System, assert_books_balance, wait_for
from tests.integration.slow_load import LOAD_S

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

LONG_RUN = ("training.steps=2000", "deadlines.actor_timeout_s=3", "weights.timeout_s=3")
ROUTES = {"gloo": "collective", "shared": "shared", "stream": "stream"}


def pushed(system: System, number: int) -> None:
    wait_for(lambda: len(system.status()["weights"]["last_pushes"]) >= number, f"{number} pushes")


@pytest.mark.parametrize("backend", ROUTES)
def test_every_route_brings_every_version_as_it_is(system: System, backend):
    system.start_learner(*LONG_RUN, f'weights.backend="{backend}"')
    for name in ("one", "two"):
        system.start_actor(name)
    wait_for(lambda: system.status()["actors_live"] == 2, "both actors")
    pushed(system, 8)
    wait_for(
        lambda: system.status()["weights"]["last_pushes"][-1]["routes"] == {ROUTES[backend]: 2},
        "both actors to be checked and fed",
    )
    status = system.status()
    newest = status["weights"]["last_pushes"][-1]
    assert (newest["evicted"], newest["behind"]) == ({}, [])
    assert newest["phases"].keys() >= {"pack", "confirm"}
    # Both at once: a push may end between two looks.
    routes = {actor["route"] for actor in system.status()["actors"]}
    assert routes == {ROUTES[backend]}
    if backend == "gloo":
        epoch = status["weights"]["epochs"][-1]
        assert (epoch["members"], epoch["ended"]) == ([1, 2], "")
    if backend == "stream":
        # float32 weights change every one; the differences are smaller nevertheless.
        sent, plain = status["weights"]["stream_bytes"], status["weights"]["stream_plain_bytes"]
        assert 0 < sent < plain
    summary = system.summary_after_stop()
    assert summary["weights"]["digest_mismatches"] == 0
    assert_books_balance(summary)


def test_a_load_longer_than_the_deadline_keeps_its_epoch_and_a_frozen_actor_ends_it(system: System):
    """Of twelve seconds and of ten by default; here of 2.4 and 2."""
    timeout_s = 2.0
    system.start_learner(
        "training.steps=2000",
        "deadlines.actor_timeout_s=60",
        "weights.backend=gloo",
        f"weights.timeout_s={timeout_s}",
    )
    actors = [
        system.gdpo(name, "actor", "--learner", system.url, module="tests.integration.slow_load")
        for name in ("one", "two")
    ]

    def epoch() -> dict[str, Any]:
        epochs = system.status()["weights"]["epochs"]
        return epochs[-1] if epochs else {"members": [], "pushes": 0}

    def confirmed() -> list[dict[str, Any]]:
        pushes = system.status()["weights"]["last_pushes"]
        return [push for push in pushes if push["routes"] == {"collective": 2}]

    wait_for(lambda: len(confirmed()) >= 3, "three pushes to both")
    assert all((push["evicted"], push["behind"]) == ({}, []) for push in confirmed())
    assert all(push["seconds"] > LOAD_S > timeout_s for push in confirmed())
    kept = epoch()
    assert (kept["members"], kept["ended"]) == ([1, 2], "")

    # Who started first need not have joined first.
    other = (system.actor(actors[0].pid) or {})["number"]
    # Both load now, or are about to.
    actors[1].signal(signal.SIGSTOP)
    began = time.monotonic()
    wait_for(lambda: epoch()["ended"] or epoch()["epoch"] > kept["epoch"], "the end of the epoch")
    # It may have confirmed the push at hand; then the next one finds it.
    assert time.monotonic() - began < LOAD_S + 2 * timeout_s + 1
    wait_for(lambda: epoch()["members"] == [other], "an epoch without it")


def test_top_and_prometheus_show_epochs_members_and_routes(system: System):
    system.start_learner(*LONG_RUN)
    system.start_actor("one")
    pushed(system, 2)
    second = system.start_actor("two")
    wait_for(
        lambda: system.status()["weights"]["epochs"][-1]["members"] == [1, 2], "the second epoch"
    )
    second.signal(9)
    wait_for(lambda: system.status()["weights"]["evictions"], "an eviction", 30)
    wait_for(lambda: system.status()["weights"]["epochs"][-1]["members"] == [1], "the third epoch")
    top = system.gdpo("top", "top", str(system.run_folder))
    assert top.wait(20) == 0, top.output
    for text in ("epochs", "actor 2 joined", "collective", "last pushes", "broadcast"):
        assert text in top.output
    families = {f.name: f for f in text_string_to_metric_families(system.get("/metrics"))}
    pushes = {s.labels["route"]: s.value for s in families["gdpo_weight_push_actors"].samples}
    assert pushes == {"collective": 1, "shared": 0, "stream": 0}
    assert families["gdpo_weight_epoch"].samples[0].value >= 3
    assert sum(s.value for s in families["gdpo_weight_evictions"].samples) >= 1
    [version] = families["gdpo_actor_version"].samples
    assert (version.labels["actor"], version.value > 0) == ("1", True)
    phases = {s.labels["phase"] for s in families["gdpo_weight_push_seconds"].samples}
    assert phases >= {"pack", "join", "broadcast", "confirm", "whole"}
    system.summary_after_stop()
