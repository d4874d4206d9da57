"""Spot checks of actors at work: when there is one, of what, and what follows from it."""

import dataclasses
import logging
from collections.abc import Callable
from queue import SimpleQueue
from threading import Event
from typing import Any

import pytest
import torch

from learner.coordinator.self_check import CheckResult, SelfCheck
from learner.coordinator.spot_checks import EVERY_S
from learner.weights.snapshots import Snapshot
from protocol.groups import Group
from tests.unit.factories import Cluster, make_config, make_snapshot
from tests.unit.learner.coordinator.test_self_check import (
    check,
    config,
    make_sequence,
    model_logprobs,
    policy,
    snapshot_of,
)

__all__ = ["check", "config", "policy"]

GOOD = CheckResult(100, 1e-4, 1e-3)
DRIFTED = CheckResult(100, 0.3, 2.0, "the moon")


class FakeCheck:
    """Passes everybody at the start, and judges actors at work when the test says so."""

    def __init__(self) -> None:
        self.works = ()
        self.asked: list[tuple[Group, Snapshot]] = []
        self._reports: list[Callable[[CheckResult | None], None]] = []

    def spot_check(self, group, snapshot, report) -> None:
        self.asked.append((group, snapshot))
        self._reports.append(report)

    def judge(self, result: CheckResult | None) -> None:
        self._reports.pop()(result)


class Bench:
    """Two actors that are at work."""

    def __init__(self, share: float = 0.01) -> None:
        self.check = FakeCheck()
        sections = make_config(
            admission={"self_check": False, "spot_check_share": share},
            training={"steps": 1000, "max_staleness": 100},
            deadlines={"lease_timeout_s": 1e6, "actor_timeout_s": 1e6},
        )
        self.cluster = Cluster(sections, self_check=self.check)
        for session in "ab":
            self.cluster.hello(session)
            self.state(session).check = "passed"
            self.cluster.weights_ready(session)
            self.cluster.status(session, capacity=64)
        self.cluster.open_training()
        self.leases = {session: self.cluster.leases(session) for session in "ab"}

    def state(self, session: str) -> Any:
        return self.cluster.coordinator._registry.live[session]

    def arrive(self, session: str = "a", **group: Any) -> None:
        self.leases[session] += self.cluster.leases(session)
        self.cluster.finish(session, self.leases[session].pop(0), **group)

    def judge(self, result: CheckResult | None, after_s: float = 0.0) -> None:
        self.cluster.clock.advance(after_s)
        self.check.judge(result)


def test_a_group_that_arrives_is_compared_with_its_own_version_and_the_figures_are_kept():
    bench = Bench()
    bench.arrive(version=0)
    [(group, snapshot)] = bench.check.asked
    assert snapshot.version == 0
    assert len(group.rollouts) == 2
    bench.judge(GOOD)
    actor = bench.cluster.coordinator.actors()[0]
    assert (actor.difference_mean, actor.difference_largest) == (1e-4, 1e-3)
    bench.cluster.clock.advance(EVERY_S)
    bench.arrive()
    bench.judge(CheckResult(100, 2e-4, 5e-4))
    actor = bench.cluster.coordinator.actors()[0]
    # The newest mean, the largest of all.
    assert (actor.difference_mean, actor.difference_largest) == (2e-4, 1e-3)
    assert bench.cluster.coordinator.counters.spot_checks == 2


def test_it_works_however_stale_groups_are_when_they_are_trained_on():
    bench = Bench()
    for version in range(1, 4):
        bench.cluster.version = version
        bench.cluster.coordinator.advance(version)
        bench.cluster.snapshots.publish(make_snapshot(version))
    # Sampled from what the learner does not have any more.
    bench.arrive(version=0)
    assert bench.check.asked == []
    bench.arrive(version=3)
    [(_, snapshot)] = bench.check.asked
    assert snapshot.version == 3


@pytest.mark.parametrize("took_s", [0.01, 1.0, 50.0])
def test_the_share_of_time_is_kept(took_s):
    bench = Bench(share=0.1)
    busy_s, began = 0.0, bench.cluster.clock.now
    while bench.cluster.clock.now < began + 3000:
        before = len(bench.check.asked)
        bench.arrive("ab"[before % 2])
        if len(bench.check.asked) > before:
            # While one goes on there is no other.
            bench.arrive()
            assert len(bench.check.asked) == before + 1
            bench.judge(GOOD, after_s=took_s)
            busy_s += took_s
        bench.cluster.clock.advance(1)
        while bench.cluster.buffer.take(2, 0, 0):
            bench.cluster.coordinator.advance(0)
    seconds = bench.cluster.clock.now - began
    assert busy_s <= 0.1 * seconds + took_s
    assert len(bench.check.asked) <= seconds / EVERY_S + 1
    assert busy_s >= min(0.08 * seconds, 0.7 * took_s * seconds / EVERY_S)


def test_with_a_share_of_0_there_are_none():
    bench = Bench(share=0.0)
    bench.arrive()
    assert bench.check.asked == []


def test_an_actor_that_drifts_is_named_once_and_stays(caplog):
    bench = Bench()
    with caplog.at_level(logging.WARNING, "learner"):
        for _ in range(2):
            bench.arrive("b")
            bench.judge(DRIFTED)
            bench.cluster.clock.advance(EVERY_S)
    [line] = [r.getMessage() for r in caplog.records]
    assert "actor 2 on" in line
    assert "0.3 on average, 2 at most" in line
    assert "The likely cause: the moon" in line
    assert [actor.drifted for actor in bench.cluster.coordinator.actors()] == [False, True]


def test_a_few_tokens_do_not_accuse_anybody(caplog):
    bench = Bench()
    bench.arrive()
    bench.judge(dataclasses.replace(DRIFTED, num_tokens=5))
    assert not bench.cluster.coordinator.actors()[0].drifted
    assert bench.cluster.coordinator.actors()[0].difference_mean == 0.3


def test_a_verdict_on_an_actor_that_has_left_changes_nothing_and_the_next_one_comes():
    bench = Bench()
    bench.arrive()
    bench.cluster.coordinator.unreachable("a")
    bench.judge(DRIFTED)
    bench.cluster.clock.advance(EVERY_S)
    bench.arrive("b")
    assert len(bench.check.asked) == 2


def test_one_that_cannot_be_computed_is_the_last_one_and_ends_no_run(caplog):
    bench = Bench()
    bench.arrive()
    bench.judge(None)
    bench.cluster.clock.advance(1e6)
    bench.arrive()
    assert len(bench.check.asked) == 1
    bench.cluster.coordinator.raise_if_failed()
    assert "no more spot checks" in caplog.text


# ---- On the thread of the self-check -----------------------------------------------------------


def test_the_thread_compares_an_actor_at_work(check: SelfCheck, policy):
    reports: SimpleQueue[Any] = SimpleQueue()
    check.start(reports.put)
    check.spot_check(make_sequence(model_logprobs(policy, 0.7)), snapshot_of(policy), reports.put)
    result = reports.get(timeout=20)
    assert result.largest_difference < 1e-5
    assert result.likely_cause == ""
    broken = dataclasses.replace(snapshot_of(policy), packed=torch.zeros(3, dtype=torch.uint8))
    check.spot_check(make_sequence(model_logprobs(policy, 0.7)), broken, reports.put)
    assert reports.get(timeout=20) is None


def test_new_actors_go_first_and_the_end_waits_for_them_only(check: SelfCheck, policy):
    group, snapshot = make_sequence(model_logprobs(policy, 0.7)), snapshot_of(policy)
    order: list[str] = []
    entered, go_on = Event(), Event()

    def first(result: Any) -> None:
        entered.set()
        assert go_on.wait(20)

    check.start(lambda error: order.append(str(error)))
    check.submit(group, snapshot, first)
    assert entered.wait(20)
    check.spot_check(group, snapshot, lambda result: order.append("spot"))
    check.submit(group, snapshot, lambda result: order.append("new"))
    go_on.set()
    check.close()
    assert order in (["new"], ["new", "spot"])
