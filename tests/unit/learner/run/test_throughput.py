"""Rates of a run, from what its actors report."""

import math

import pytest

from learner.run.throughput import Throughput
from protocol.errors import BadMessage
from protocol.framing import decode_to_learner, encode
from tests.unit.factories import Cluster, make_status


def make_progress() -> tuple[Cluster, Throughput]:
    cluster = Cluster()
    cluster.join("a")
    progress = Throughput(cluster.coordinator, clock=cluster.clock)
    progress.sample()
    return cluster, progress


def test_rates_are_differences_over_the_time_between_samples():
    cluster, progress = make_progress()
    cluster.clock.advance(4)
    with progress.waiting():
        cluster.clock.advance(1)
    progress.note(2, 100, 4)
    cluster.status(
        "a", tokens_generated=250, groups_generated=4, idle_seconds=1.0, uptime_seconds=5.0
    )
    rates = progress.sample()
    assert rates.tokens_generated_per_s == 50  # 250 / 5
    assert rates.tokens_trained_per_s == 20  # 100 / 5
    assert rates.actor_idle_share == pytest.approx(0.2)  # 1 / 5
    assert rates.learner_wait_share == pytest.approx(0.2)  # 1 / 5
    # The learner uses 2 * 2 groups in 4 busy seconds, an actor makes 4 groups in 4 busy seconds.
    assert rates.actors_wanted == 1


def test_the_shares_of_an_actor_are_of_its_time_since_it_was_first_heard():
    cluster, progress = make_progress()
    assert progress.shares("nobody") is None
    cluster.join("b")
    cluster.status("b", idle_seconds=50.0, stall_seconds=10.0, uptime_seconds=100.0)
    progress.sample()
    cluster.clock.advance(20)
    cluster.status("b", idle_seconds=55.0, stall_seconds=11.0, uptime_seconds=120.0)
    progress.sample()
    # 5 and 1 of 20 seconds
    assert progress.shares("b") == pytest.approx((0.25, 0.05))


def test_a_wait_that_still_goes_on_counts_already():
    cluster, progress = make_progress()
    cluster.clock.advance(10)
    with progress.waiting():
        cluster.clock.advance(30)
        assert progress.sample().learner_wait_share == pytest.approx(0.75)  # 30 / 40


def test_rates_cover_some_steps_however_long_they_take():
    cluster, progress = make_progress()
    for step in range(1, 5):
        cluster.clock.advance(100)
        progress.steps, progress.tokens_trained = step, 1000 * step
        rates = progress.sample()
    assert rates.tokens_trained_per_s == pytest.approx(10)  # 1000 / 100


def test_what_an_actor_did_before_it_was_seen_does_not_count_as_now():
    cluster, progress = make_progress()
    cluster.join("b")
    cluster.status("b", idle_seconds=900.0, uptime_seconds=1000.0)
    progress.sample()
    cluster.clock.advance(5)
    cluster.status("b", idle_seconds=902.0, uptime_seconds=1005.0)
    assert progress.sample().actor_idle_share == pytest.approx(0.4)  # 2 / 5


def test_tokens_of_actors_that_left_stay_counted():
    cluster, progress = make_progress()
    cluster.status("a", tokens_generated=250)
    assert progress.tokens_generated == 250
    cluster.coordinator.unreachable("a")
    assert progress.tokens_generated == 250


def test_tokens_of_an_actor_that_joins_again_are_counted_once():
    cluster, progress = make_progress()
    cluster.status("a", tokens_generated=250)
    assert progress.tokens_generated == 250
    cluster.hello("a")
    assert progress.tokens_generated == 250
    # An actor counts from the start of its process, not from its hello.
    cluster.status("a", tokens_generated=260)
    assert progress.tokens_generated == 260


@pytest.mark.parametrize("name", ["uptime_seconds", "idle_seconds"])
@pytest.mark.parametrize("seconds", [math.nan, math.inf, -math.inf])
def test_no_status_of_an_actor_stops_the_learner(name, seconds):
    cluster, progress = make_progress()
    status = make_status(groups_generated=4, **{"uptime_seconds": 5.0, name: seconds})
    try:
        cluster.say("a", *decode_to_learner(encode(status)))
    except BadMessage:
        return
    cluster.clock.advance(5)
    progress.steps = 2
    progress.sample()


def test_an_actor_whose_clock_runs_wild_does_not_spoil_the_shares():
    cluster, progress = make_progress()
    cluster.join("b")
    progress.sample()
    cluster.clock.advance(10)
    cluster.status("a", uptime_seconds=10.0, idle_seconds=0.0)
    cluster.status("b", uptime_seconds=1e12, idle_seconds=1e12, stall_seconds=1e12)
    rates = progress.sample()
    assert rates.actor_idle_share == pytest.approx(0.5)  # 10 of 20 s: b counts with its 10
    assert progress.stalled_share == pytest.approx(0.5)
    cluster.clock.advance(10)
    cluster.status("a", uptime_seconds=20.0)
    cluster.status("b")  # back to 0
    assert 0 <= progress.sample().actor_idle_share <= 1


def test_actors_that_come_and_go_are_remembered_in_bounded_memory(monkeypatch):
    monkeypatch.setattr("learner.run.throughput._REMEMBERED_ACTORS", 10)
    cluster, progress = make_progress()
    for number in range(100):
        cluster.join(f"s{number}")
        cluster.status(f"s{number}", tokens_generated=5)
        progress.sample()
        cluster.coordinator.unreachable(f"s{number}")
    assert progress.tokens_generated == 500
    assert len(progress._last) <= 11
    assert progress._first.keys() == progress._last.keys()
