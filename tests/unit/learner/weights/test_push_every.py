"""Versions that are not pushed: a real coordinator and buffer between random actors and steps."""

from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.messages import Ack, Weights
from tests.unit.factories import Cluster, make_config, make_work

NEVER_STOPS = 5_000
ACTORS = ("a", "b")


class Run:
    """Actors that get weights when chance has it; each group is of the version it began under."""

    def __init__(self, random: Random, *, push_every: int, buffer: Any, **training: Any) -> None:
        self.random = random
        self.cluster = Cluster(
            make_config(training=training, buffer=buffer, weights={"push_every": push_every})
        )
        for session in ACTORS:
            self.cluster.join(session, capacity=3)
        self.has = dict.fromkeys(ACTORS, 0)
        self.begun: dict[str, dict[int, int]] = {session: {} for session in ACTORS}
        """Version by lease."""
        self.trained: set[int] = set()
        """Versions that were sampled from."""
        self.cluster.open_training()

    def finish(self) -> None:
        turns = (self.follow, self.arrive, self.train)
        for _ in range(NEVER_STOPS):
            if self.cluster.version == self.cluster.config.training.steps:
                return
            self.random.choice(turns)(self.random.choice(ACTORS))
        raise AssertionError(f"stuck at step {self.cluster.version}")

    def follow(self, session: str) -> None:
        self._begin()
        self.has[session] = self.cluster.snapshots.latest.version
        self.cluster.weights_ready(session, self.has[session])

    def arrive(self, session: str) -> None:
        self._begin()
        if held := self.begun[session]:
            lease = self.random.choice(list(held))
            version = held.pop(lease)
            self.cluster.say(session, *self.cluster.group_message(lease, version=version))
            [ack] = self.cluster.heard(session, Ack)
            assert ack.verdict == "accepted", ack.cause
            self.trained.add(version)

    def train(self, session: str) -> None:
        self.cluster.train()
        self.cluster.coordinator.tick()

    def _begin(self) -> None:
        for session, held in self.begun.items():
            held |= dict.fromkeys(self.cluster.leases(session), self.has[session])


@pytest.mark.parametrize(
    ("push_every", "max_staleness", "max_uses"), [(3, 4, 1), (5, 4, 1), (3, 4, 3), (1, 0, 1)]
)
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_guarantee_5_holds_however_rare_pushes_are(seed, push_every, max_staleness, max_uses):
    run = Run(
        Random(seed),
        push_every=push_every,
        max_staleness=max_staleness,
        steps=12,
        buffer={"max_uses": max_uses},
    )
    run.finish()
    buffer, coordinator = run.cluster.buffer, run.cluster.coordinator
    assert buffer.largest_staleness <= max_staleness
    assert buffer.counts.balanced
    assert coordinator.leases.counts["train"].balanced
    assert coordinator.leases.counts["train"].received == buffer.counts.accepted
    assert run.trained <= set(range(0, 12, push_every))
    # Twelve divides by three, but not by five: the last version is there in any case.
    assert run.cluster.snapshots.latest.version == 12


def test_an_actor_between_two_pushes_has_what_it_needs_and_is_fed_nothing():
    cluster = Cluster(make_config(training={"max_staleness": 2}, weights={"push_every": 3}))
    cluster.join("a", capacity=4)
    cluster.open_training()
    for version in (1, 2):
        for lease in cluster.leases("a"):
            cluster.finish("a", lease, version=0)
        assert cluster.train()
        assert cluster.version == version
        cluster.heard("a", Weights)
        # It said that it has version 0, which is the newest that anybody can have.
        cluster.weights_ready("a", 0)
        cluster.coordinator.tick()
        assert cluster.heard("a", Weights) == []
        assert cluster.ready(cluster.snapshots.latest.version) == ["a"]


def test_a_late_joiner_gets_the_last_version_that_was_pushed_and_work_for_it():
    cluster = Cluster(make_config(training={"max_staleness": 2}, weights={"push_every": 3}))
    cluster.join("a", capacity=2)
    cluster.open_training()
    for lease in cluster.leases("a"):
        cluster.finish("a", lease, version=0)
    assert cluster.train()
    cluster.hello("late")
    [offer] = cluster.heard("late", Weights)
    assert (offer.version, cluster.version) == (0, 1)
    cluster.weights_ready("late", offer.version)
    cluster.status("late")
    assert cluster.leases("late")


def test_the_evaluation_after_the_last_step_finds_its_version_pushed():
    cluster = Cluster(
        make_config(training={"max_staleness": 2, "steps": 4}, weights={"push_every": 3})
    )
    cluster.join("a", capacity=4)
    cluster.open_training()
    while cluster.version < 4:
        for lease in cluster.leases("a"):
            cluster.finish("a", lease, version=cluster.snapshots.latest.version)
        assert cluster.train()
        cluster.weights_ready("a", cluster.snapshots.latest.version)
    evaluation = cluster.coordinator.start_evaluation(
        {"heldout": [make_work("h", "eval")]}, cluster.version
    )
    cluster.coordinator.tick()
    [lease] = cluster.leases("a")
    cluster.finish("a", lease, version=4)
    assert evaluation.done.is_set()
