"""Weights on each of their routes, in real processes, and where people can see it."""

import signal
import time
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from learner.config.weights import WeightsConfig
from tests.integration.processes import Process, System, assert_books_balance, wait_for

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


def slow_actor(system: System, name: str, load_s: float) -> Process:
    command = (str(load_s), "actor", "--learner", system.url)
    return system.gdpo(name, *command, module="tests.integration.slow_load")


def confirmed(system: System) -> list[dict[str, Any]]:
    """The last pushes that went to two actors in an epoch."""
    pushes = system.status()["weights"]["last_pushes"]
    return [push for push in pushes if push["routes"] == {"collective": 2}]


def test_a_load_of_twelve_seconds_keeps_epoch_and_actors_at_the_limits_of_everybody(
    system: System,
):
    load_s, timeout_s = 12.0, WeightsConfig().timeout_s
    assert load_s > timeout_s
    system.start_learner("training.steps=2000", "weights.backend=gloo")
    slow_actor(system, "one", load_s)
    wait_for(lambda: system.status()["weights"]["last_pushes"], "a push")
    # It comes while the first one loads, and would load whenever a push begins.
    slow_actor(system, "two", load_s)
    wait_for(lambda: len(confirmed(system)) >= 2, "two pushes to both", 150)
    status = system.status()
    for push in confirmed(system):
        assert (push["evicted"], push["behind"]) == ({}, [])
        assert push["seconds"] > load_s
    [epoch] = [epoch for epoch in status["weights"]["epochs"] if epoch["members"] == [1, 2]]
    assert (epoch["ended"], status["actors_live"]) == ("", 2)
    assert not status["weights"]["evictions"]


def test_a_load_longer_than_the_deadline_keeps_its_epoch_and_a_frozen_actor_ends_it(system: System):
    """As above, with shorter times."""
    load_s, timeout_s = 2.4, 2.0
    system.start_learner(
        "training.steps=2000",
        "deadlines.actor_timeout_s=60",
        "weights.backend=gloo",
        f"weights.timeout_s={timeout_s}",
    )
    actors = [slow_actor(system, name, load_s) for name in ("one", "two")]

    def epoch() -> dict[str, Any]:
        epochs = system.status()["weights"]["epochs"]
        return epochs[-1] if epochs else {"members": [], "pushes": 0}

    wait_for(lambda: len(confirmed(system)) >= 3, "three pushes to both")
    pushes = confirmed(system)
    assert all((push["evicted"], push["behind"]) == ({}, []) for push in pushes)
    assert all(push["seconds"] > load_s > timeout_s for push in pushes)
    kept = epoch()
    assert (kept["members"], kept["ended"]) == ([1, 2], "")

    # Who started first need not have joined first.
    other = (system.actor(actors[0].pid) or {})["number"]
    # Both load now, or are about to.
    actors[1].signal(signal.SIGSTOP)
    began = time.monotonic()
    wait_for(lambda: epoch()["ended"] or epoch()["epoch"] > kept["epoch"], "the end of the epoch")
    # It may have confirmed the push at hand; then the next one finds it.
    assert time.monotonic() - began < load_s + 2 * timeout_s + 1
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
