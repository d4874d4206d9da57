"""Leases just in time: the arithmetic, the measurements, and simulated runs of a real coordinator.

Time passes only as the tests say.
"""

import heapq
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from statistics import fmean
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from learner.coordinator.pace import HEADROOM, REMEMBERED, TICK_S, Pace, batches_within
from protocol.messages import Lease
from tests.unit.factories import Cluster, make_config, make_snapshot

# ---- The arithmetic ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lead_s", "until_next_s", "max_uses", "expected"),
    [
        (2.9, 3, 1, 0),  # the next one is needed later
        (3, 3, 1, 1),
        (3, 0, 1, 1),  # needed at 0, 10, 20 ...
        (9.9, 0, 1, 1),
        (10, 0, 1, 2),
        (25, 3, 1, 3),  # at 3, 13, 23
        (25, 3, 2, 2),  # at 3, 13, 33: the next one may be in its last use
        (33, 3, 2, 3),
        (0, 0, 3, 1),
    ],
)
def test_batches_count_from_when_each_is_needed(lead_s, until_next_s, max_uses, expected):
    within = batches_within(lead_s, until_next_s=until_next_s, step_s=10, max_uses=max_uses)
    assert within == expected


SECONDS = st.floats(0, 1e6, allow_subnormal=False)


@given(SECONDS, SECONDS, SECONDS, st.floats(1e-3, 1e6), st.integers(1, 5))
def test_a_longer_lead_a_nearer_need_and_shorter_steps_never_ask_for_less(
    lead, more, until, step, uses
):
    def within(lead: float, until: float, step: float) -> int:
        found = batches_within(lead, until_next_s=until, step_s=step, max_uses=uses)
        assert found is not None
        return found

    base = within(lead, until, step)
    assert base >= 0
    assert within(lead + more, until, step) >= base
    assert within(lead, max(0.0, until - more), step) >= base
    assert within(lead, until, step / 2) >= base
    # Whoever waits has something to wait for.
    assert within(lead, 0.0, step) >= 1


def test_steps_of_no_time_hold_nothing_back():
    assert batches_within(1, until_next_s=0, step_s=0) is None


# ---- The measurements --------------------------------------------------------------------------


def measured(*, batch_s: float = 2.0, step_s: float = 10.0, wait_s: float = 0.0) -> Pace:
    """Two groups make a batch; it is 0 o'clock, and a step has just begun."""
    pace = Pace(batch_groups=2)
    began = -step_s - wait_s
    pace.batch_wanted(began - 1000)
    pace.batch_taken(began)
    pace.leased(0, began)
    pace.leased(1, began)
    pace.stored(1, began + batch_s / 2)
    pace.stored(0, began + batch_s)
    pace.batch_wanted(-wait_s)
    pace.batch_taken(0)
    return pace


def test_nothing_is_held_back_before_there_are_measurements():
    pace = Pace(batch_groups=2)
    assert pace.groups_wanted(0) is None
    pace.batch_wanted(0)
    for prompt_index in (0, 1):  # Of the first batch, with cold engines: that does not count.
        pace.leased(prompt_index, 0)
        pace.stored(prompt_index, 50)
    pace.batch_taken(50)
    for prompt_index in (2, 3):
        pace.leased(prompt_index, 50)
        pace.stored(prompt_index, 52)
    assert pace.groups_wanted(53) is None  # no step has ended
    pace.batch_wanted(60)
    assert pace.groups_wanted(60) == 2
    assert pace.lead_s(60) == pytest.approx(3.1)


def test_a_batch_is_leased_the_lead_before_it_is_needed():
    # 1.5 * 2 + .1 = 3.1 s before 10, before 20 and so on.
    pace = measured(batch_s=2, step_s=10)
    assert pace.lead_s(0) == pytest.approx(3.1)
    assert [pace.groups_wanted(now) for now in (0, 6.8, 7, 9.9)] == [0, 0, 2, 2]
    # The step takes longer than the one before.
    assert pace.groups_wanted(25) == 2
    pace.batch_wanted(25)
    assert pace.groups_wanted(30) == 2


def test_a_slow_batch_is_leased_several_steps_ahead():
    # 1.5 * 14 + .1 = 21.1 s: needed at 10 and 20 from now, and from 8.9 s on at 30.
    pace = measured(batch_s=14, step_s=10)
    assert [pace.groups_wanted(now) for now in (0, 8.8, 9)] == [4, 4, 6]


def test_a_wait_of_the_trainer_makes_the_lead_longer_by_as_much():
    assert measured(wait_s=4).lead_s(0) == pytest.approx(7.1)
    # The first wait, before there was any batch, does not count: measured() has one.
    assert measured().lead_s(0) == pytest.approx(3.1)


def test_a_batch_that_is_late_counts_before_it_is_there():
    pace = measured(batch_s=2, step_s=10)
    pace.leased(2, 7)
    assert pace.lead_s(8) == pytest.approx(HEADROOM * 2 + TICK_S)
    assert pace.lead_s(17) == pytest.approx(HEADROOM * 10 + TICK_S)


def test_a_prompt_that_is_leased_again_is_timed_from_its_first_lease():
    pace = Pace(batch_groups=1)
    pace.batch_taken(0)
    pace.batch_wanted(1)
    pace.leased(7, 10)
    pace.leased(7, 15)
    pace.stored(7, 16)
    assert pace.lead_s(16) == pytest.approx(HEADROOM * 6 + TICK_S)


def test_a_prompt_that_is_given_up_is_not_waited_for():
    pace = measured(batch_s=2)
    pace.leased(2, 0)
    pace.leased(3, 0)
    pace.stored(2, 1)
    pace.gave_up(3)
    assert pace.lead_s(1000) == pytest.approx(HEADROOM * 2 + TICK_S)


def test_what_was_held_back_between_two_leases_is_not_taken_for_slowness():
    pace = measured(batch_s=2)
    pace.leased(2, 0)
    pace.burst_over()
    pace.stored(2, 1)
    pace.leased(3, 100)
    pace.leased(4, 100)
    pace.stored(3, 101)
    pace.stored(4, 102)
    assert pace.lead_s(102) == pytest.approx(HEADROOM * 2 + TICK_S)


def test_what_was_slow_once_is_forgotten():
    pace = measured(batch_s=50, step_s=10)
    for index in range(REMEMBERED):
        pace.leased(10 + index, 0)
        pace.burst_over()
        pace.stored(10 + index, 2)
    assert pace.lead_s(2) == pytest.approx(HEADROOM * 2 + TICK_S)


# ---- Simulated runs ----------------------------------------------------------------------------


@dataclass
class Run:
    """Actors, coordinator and trainer on one clock."""

    step_s: float
    group_s: float
    spread: float = 0.3
    """Standard deviation of the logarithm of a group's time; that of steps is a third of it."""
    actors: int = 2
    capacity: int = 8
    push_s: float = 0.05
    steps: int = 40
    batch_groups: int = 8
    max_staleness: int = 4
    max_uses: int = 1
    push_every: int = 1
    just_in_time: bool = True
    silent: float = 0.0
    """Share of groups without signal, which are refilled."""
    seed: int = 0
    staleness: list[float] = field(default_factory=list)
    """Mean of each batch."""
    waited_s: float = 0.0
    """After the first batch."""

    def __post_init__(self) -> None:
        self.random = Random(self.seed)
        self.cluster = Cluster(
            make_config(
                training={
                    "steps": self.steps,
                    "batch_groups": self.batch_groups,
                    "max_staleness": self.max_staleness,
                },
                buffer={"max_uses": self.max_uses},
                weights={"push_every": self.push_every},
                deadlines={"lease_timeout_s": 1e6, "actor_timeout_s": 1e6},
            )
        )
        self.sessions = [f"a{i}" for i in range(self.actors)]
        self.versions = dict.fromkeys(self.sessions, 0)
        self.events: list[tuple[float, int, Callable[[], None]]] = []
        self.numbers = itertools.count()
        self.waiting_since: float | None = None

    def finish(self) -> "Run":
        for session in self.sessions:
            self.cluster.join(session, self.capacity)
        self.cluster.open_training()
        self.began_at = self.now
        self.tick()
        self.want()
        while self.events and len(self.staleness) < self.steps:
            self.cluster.clock.now, _, event = heapq.heappop(self.events)
            event()
            self.take()
            self.lease()
        assert len(self.staleness) == self.steps, "stuck"
        self.seconds = self.now - self.began_at
        return self

    @property
    def now(self) -> float:
        return self.cluster.clock.now

    def after(self, seconds: float, event: Callable[[], None]) -> None:
        heapq.heappush(self.events, (self.now + seconds, next(self.numbers), event))

    def tick(self) -> None:
        self.cluster.coordinator.tick()
        self.after(TICK_S, self.tick)

    def lease(self) -> None:
        """Begin what actors are told to; they do not look at anything else."""
        self.cluster.coordinator.issue()
        outbox = self.cluster.coordinator.outbox
        while outbox:
            message = outbox.pop()
            if isinstance(message.header, Lease):
                self.roll_out(message.session, message.header.lease)

    def roll_out(self, session: str, lease: int) -> None:
        version = self.versions[session]

        silent = self.silent and self.random.random() < self.silent
        scores = [[0.0, 0.0]] * 2 if silent else None

        def send() -> None:
            self.cluster.say(
                session, *self.cluster.group_message(lease, version=version, scores=scores)
            )

        self.after(self.group_s * self.random.lognormvariate(0, self.spread), send)

    def want(self) -> None:
        self.waiting_since = self.now
        if self.just_in_time:
            self.cluster.coordinator.batch_wanted()

    def take(self) -> None:
        if self.waiting_since is None:
            return
        version = self.cluster.version
        batch = self.cluster.buffer.take(
            self.batch_groups,
            version,
            timeout_s=0,
            lack_signal=lambda groups: [not group.scores.any() for group in groups],
        )
        self.cluster.coordinator.make_room()
        if batch is None:
            return
        if self.just_in_time:
            self.cluster.coordinator.batch_taken(batch.num_refilled)
        if self.staleness:
            self.waited_s += self.now - self.waiting_since
        self.waiting_since = None
        self.staleness.append(fmean(version - group.oldest_version for group in batch.groups))
        self.after(self.step_s * self.random.lognormvariate(0, self.spread / 3), self.step)

    def step(self) -> None:
        version = self.cluster.version = self.cluster.version + 1
        self.cluster.coordinator.advance(version)
        if self.cluster.pacing.is_pushed(version):
            self.cluster.snapshots.publish(make_snapshot(version))
            self.after(self.push_s, lambda: self.follow(version))
        self.want()

    def follow(self, version: int) -> None:
        for session in self.sessions:
            if version > self.versions[session]:
                self.versions[session] = version
                self.cluster.weights_ready(session, version)

    @property
    def settled(self) -> float:
        """Mean staleness once the first measurements have been used."""
        return fmean(self.staleness[self.steps // 3 :])


def test_a_learner_bound_run_is_as_stale_as_it_has_to_be_and_not_as_it_may():
    """A batch takes about a third of a step; two actors would be idle most of the time."""
    facts: dict[str, Any] = {"step_s": 2.0, "group_s": 0.4}
    before = Run(**facts, just_in_time=False).finish()
    after = Run(**facts).finish()
    assert before.settled == 4
    # Sampled during the step before: less is not possible without waiting.
    assert after.settled == 1
    assert after.waited_s <= before.waited_s + 0.01 * after.seconds


def test_long_rollouts_are_leased_as_many_steps_ahead_as_they_take():
    """They take about 3 steps, and actors have room for twice as many: 4 to 6 steps ahead."""
    facts: dict[str, Any] = {"step_s": 2.0, "group_s": 5.0, "spread": 0.1, "capacity": 32}
    facts["max_staleness"] = 16
    after = Run(**facts, steps=60).finish()
    assert 3 <= after.settled <= 6
    before = Run(**facts, steps=60, just_in_time=False).finish()
    assert before.settled > 15
    assert after.waited_s <= before.waited_s + 0.01 * after.seconds


def test_an_actor_bound_run_is_not_slowed_down():
    facts: dict[str, Any] = {"step_s": 0.5, "group_s": 2.0, "capacity": 6, "steps": 30}
    before = Run(**facts, just_in_time=False).finish()
    after = Run(**facts).finish()
    assert after.seconds <= before.seconds * 1.02


def test_groups_without_signal_are_leased_for_beforehand():
    """Half of them are refilled: a trainer that waited for each would mostly wait."""
    run = Run(step_s=2.0, group_s=0.4, silent=0.5).finish()
    counts = run.cluster.buffer.counts
    assert counts.evicted["no_signal"] > 0.3 * counts.accepted
    assert counts.trained == 40 * 8
    assert counts.balanced
    assert run.settled < 2
    assert run.waited_s < 0.05 * run.seconds


@settings(max_examples=12, deadline=None)
@given(
    facts=st.fixed_dictionaries(
        {
            "step_s": st.floats(0.5, 4),
            "group_s": st.floats(0.1, 8),
            "spread": st.floats(0, 0.5),
            "actors": st.integers(1, 3),
            "capacity": st.integers(2, 16),
            "push_s": st.floats(0, 2),
            "max_staleness": st.integers(1, 6),
            "max_uses": st.integers(1, 2),
            "silent": st.sampled_from([0.0, 0.3]),
            "seed": st.integers(0, 2**32),
        }
    ),
    push_every=st.integers(1, 3),
)
def test_the_trainer_does_not_wait_longer_and_nothing_is_staler(
    facts: dict[str, Any], push_every: int
):
    # The one combination that is leased too late has a test of its own, below.
    facts["push_every"] = push_every if facts["max_uses"] == 1 else 1
    facts["push_every"] = min(facts["push_every"], facts["max_staleness"] + 1)
    before = Run(**facts, steps=24, just_in_time=False).finish()
    after = Run(**facts, steps=24).finish()
    assert after.cluster.buffer.largest_staleness <= facts["max_staleness"]
    assert after.settled <= before.settled + 0.25
    # The two draw other times, so neither is exactly the other; a batch more is within that.
    slack_s = 0.03 * before.seconds + 3 * facts["group_s"]
    assert after.waited_s <= before.waited_s + slack_s


@pytest.mark.xfail(
    strict=True, reason="a batch waits for the push that permits it: the lead does not know of it"
)
def test_batches_used_twice_with_rare_pushes_are_leased_early_enough():
    """What may not be leased before the next push has to be leased before this one is too old."""
    facts: dict[str, Any] = {"step_s": 3.0, "group_s": 0.5, "actors": 1, "capacity": 3}
    facts |= {"push_s": 1.5, "push_every": 2, "max_uses": 2, "max_staleness": 3, "spread": 0.0}
    before = Run(**facts, steps=24, just_in_time=False).finish()
    after = Run(**facts, steps=24).finish()
    assert after.waited_s <= before.waited_s + 0.03 * before.seconds
