"""The coordinator without sockets: weights for the actors."""

import math
from threading import Timer

import msgspec
import pytest

from learner.weights.offers import OFFER_AGAIN_S
from protocol.chunk_codec import checksum
from protocol.framing import encode
from protocol.messages import (
    Goodbye,
    Weights,
    WeightsChunk,
    WeightsPull,
    WeightsReady,
)
from tests.unit.factories import Cluster, joined, make_config, make_snapshot

NAN = math.nan


# ---- Weights -----------------------------------------------------------------------------------


def test_an_actor_pulls_the_weights_in_chunks():
    cluster = Cluster()
    cluster.hello("a")
    cluster.say("a", WeightsPull(version=0, chunk=0))
    [(chunk, payloads)] = cluster.heard_with_payloads("a", WeightsChunk)
    packed = bytes(make_snapshot(0).packed.numpy())
    assert chunk == WeightsChunk(version=0, chunk=0, checksum=checksum(packed))
    assert [bytes(payload) for payload in payloads] == [packed]
    assert encode(chunk, payloads)


def test_there_are_no_chunks_behind_the_last_one():
    cluster = Cluster()
    cluster.hello("a")
    for chunk in (1, 2**63 - 1):
        cluster.say("a", WeightsPull(version=0, chunk=chunk))
        [(_, payloads)] = cluster.heard_with_payloads("a", WeightsChunk)
        assert payloads == ()


def test_a_pull_of_a_version_that_is_gone_is_answered_with_the_newest():
    cluster = Cluster()
    cluster.hello("a")
    cluster.snapshots.publish(make_snapshot(1))
    cluster.heard("a", Weights)
    cluster.say("a", WeightsPull(version=0, chunk=0))
    [(_, payloads)] = cluster.heard_with_payloads("a", WeightsChunk)
    assert payloads == ()
    newest = make_snapshot(1)
    assert cluster.heard_with_payloads("a", Weights) == [
        (newest.announcement("stream"), (newest.digests,))
    ]


def test_a_wrong_tensor_is_named(caplog):
    """The weight's digest is right, the bias's is not."""
    cluster = joined("a")
    right = make_snapshot(0).digests
    wrong = right[:16] + bytes(16)
    ready = WeightsReady(
        version=0, digest="wrong", route="stream", receive_seconds=0, load_seconds=0
    )
    for digests, text in ((wrong, "version 0: bias"), (b"", "it does not say which tensors")):
        caplog.clear()
        cluster.say("a", ready, [digests])
        assert text in caplog.text


def test_an_actor_with_other_weights_than_announced_is_fed_again():
    cluster = joined()
    cluster.hello("a")
    cluster.heard("a", Weights)
    cluster.weights_ready("a", digest="wrong")
    cluster.status("a")
    assert cluster.heard("a", Weights) == [make_snapshot(0).announcement("stream")]
    assert cluster.ready() == []
    assert cluster.leases("a") == []
    assert cluster.coordinator.counters.digest_mismatches == 1
    cluster.weights_ready("a")
    assert len(cluster.leases("a")) == 4


def test_an_actor_that_got_a_later_version_wrong_is_not_ready_any_more():
    cluster = joined("a")
    cluster.snapshots.publish(make_snapshot(1))
    cluster.weights_ready("a", version=1, digest="wrong", route="collective")
    assert cluster.ready() == []


def test_an_actor_that_worked_for_long_has_time_to_get_weights_right_again():
    cluster = joined("a", deadlines={"join_timeout_s": 100})
    for _ in range(30):
        cluster.clock.advance(5)
        cluster.status("a")
    cluster.snapshots.publish(make_snapshot(1))
    cluster.weights_ready("a", version=1, digest="wrong")
    cluster.pass_time(1)
    assert cluster.coordinator.num_live == 1
    cluster.weights_ready("a", version=1)
    assert cluster.ready() == ["a"]


def test_weights_that_nobody_published_make_no_actor_ready():
    cluster = joined()
    cluster.hello("a")
    cluster.status("a")
    cluster.weights_ready("a", version=7, digest="anything")
    assert cluster.ready() == []
    assert cluster.leases("a") == []


def test_an_actor_that_pulled_an_old_version_is_told_of_the_newest():
    cluster = Cluster()
    cluster.hello("a")
    cluster.snapshots.publish(make_snapshot(1))
    cluster.coordinator.begin_push(1)
    cluster.heard("a", Weights)
    cluster.weights_ready("a", version=0)
    assert cluster.heard("a", Weights) == [make_snapshot(1).announcement("stream")]


@pytest.mark.parametrize(("backend", "offered"), [("gloo", []), ("stream", [1])])
def test_an_actor_that_kept_up_waits_for_the_next_push_unless_all_pull(
    backend: str, offered: list[int]
):
    """A member that loads what it pulled itself would keep the whole broadcast waiting."""
    cluster = Cluster(
        make_config(weights={"backend": backend}, deadlines={"actor_timeout_s": 1000})
    )
    cluster.hello("a")
    cluster.snapshots.publish(make_snapshot(1))
    cluster.heard("a", Weights)
    cluster.weights_ready("a", version=0)
    assert [offer.version for offer in cluster.heard("a", Weights)] == offered
    cluster.pass_time(OFFER_AGAIN_S + 1)
    assert [actor.number for actor in cluster.coordinator.begin_push(1)] == [1]


def test_an_actor_that_is_behind_and_silent_about_it_is_offered_the_newest_again():
    """The offer may have been lost with a connection, or the answer to it."""
    cluster = joined("a", deadlines={"actor_timeout_s": 1000})
    cluster.snapshots.publish(make_snapshot(1))
    cluster.coordinator.begin_push(1)
    cluster.heard("a", Weights)
    cluster.pass_time(OFFER_AGAIN_S + 1)
    assert cluster.heard("a", Weights) == []  # the push takes care of it
    cluster.coordinator.end_push()
    cluster.pass_time(0.1)
    assert [offer.version for offer in cluster.heard("a", Weights)] == [1]
    for _ in range(3):  # as long as it pulls, it is left alone
        cluster.pass_time(OFFER_AGAIN_S - 1)
        cluster.say("a", WeightsPull(version=1, chunk=0))
        assert cluster.heard("a", Weights) == []
    cluster.pass_time(OFFER_AGAIN_S + 1)
    assert [offer.version for offer in cluster.heard("a", Weights)] == [1]
    cluster.weights_ready("a", version=1)
    cluster.pass_time(OFFER_AGAIN_S + 1)
    assert cluster.heard("a", Weights) == []


def test_an_actor_is_not_offered_less_than_before_unless_others_wait_for_it():
    cluster = joined("a")
    for version in (1, 2):
        cluster.snapshots.publish(make_snapshot(version))
    cluster.say("a", WeightsPull(version=1, chunk=0))  # gone
    assert [offer.version for offer in cluster.heard("a", Weights)][-1] == 2
    older = make_snapshot(1)
    cluster.coordinator.announce("a", older.announcement("stream"), older)
    assert cluster.heard("a", Weights) == []
    broadcast = msgspec.structs.replace(older.announcement("collective"), epoch=1, rank=1)
    cluster.coordinator.announce("a", broadcast, older)
    assert cluster.heard("a", Weights) == [broadcast]


def test_an_actor_that_was_late_by_whichever_route_catches_up():
    cluster = joined("a")
    cluster.snapshots.publish(make_snapshot(1))
    cluster.coordinator.begin_push(1)
    cluster.coordinator.end_push()
    cluster.snapshots.publish(make_snapshot(2))
    cluster.coordinator.begin_push(2)
    cluster.heard("a", Weights)
    cluster.weights_ready("a", version=1, route="collective")
    assert [offer.version for offer in cluster.heard("a", Weights)] == [2]


def test_a_version_that_was_made_before_anybody_was_there_counts_as_pushed():
    """A learner that resumes trains again, and publishes where it got to without a push."""
    cluster = joined("old", "new")
    cluster.snapshots.publish(make_snapshot(1))
    cluster.coordinator.count_as_pushed()
    cluster.weights_ready("new", version=1)
    cluster.snapshots.publish(make_snapshot(2))
    assert cluster.coordinator.pushed == 1
    assert [actor.session for actor in cluster.coordinator.begin_push(2)] == ["new"]
    assert cluster.coordinator.pushed == 2


def test_who_is_behind_a_version_and_who_is_gone():
    cluster = joined("a", "b")
    cluster.hello("loading")
    assert cluster.ready() == ["a", "b"]
    cluster.snapshots.publish(make_snapshot(1))
    cluster.weights_ready("a", version=1)
    assert cluster.coordinator.behind({"a": 1, "b": 2, "stranger": 3}, 1) == {"b": 2}
    assert cluster.coordinator.gone({"a": 1, "b": 2, "stranger": 3}) == ("stranger",)
    # Nobody waits for an actor that has gone.
    cluster.say("b", Goodbye(cause="x"))
    assert cluster.coordinator.behind({"a": 1, "b": 2}, 1) == {}
    assert cluster.coordinator.gone({"a": 1, "b": 2}) == ("b",)


def test_a_wait_ends_with_what_it_waits_for_or_with_its_time():
    offers = (cluster := joined("a")).coordinator
    cluster.snapshots.publish(make_snapshot(1))
    assert not offers.wait_until(lambda: not offers.behind({"a": 1}, 1), timeout_s=0.02)
    Timer(0.05, cluster.weights_ready, ["a", 1]).start()
    assert offers.wait_until(lambda: not offers.behind({"a": 1}, 1), timeout_s=10)
    events = []

    def happen() -> None:
        events.append(1)
        offers.notify()

    Timer(0.05, happen).start()
    assert offers.wait_until(lambda: bool(events), timeout_s=10)


def test_announcements_go_to_live_actors_only():
    cluster = joined("a")
    cluster.heard("a", Weights)
    snapshot = make_snapshot(1)
    offer = msgspec.structs.replace(snapshot.announcement("collective"), epoch=1, rank=1)
    cluster.coordinator.announce("a", offer, snapshot)
    cluster.coordinator.announce("gone", offer, snapshot)
    assert cluster.heard_with_payloads("a", Weights) == [(offer, (snapshot.digests,))]
    assert cluster.heard("gone", Weights) == []
