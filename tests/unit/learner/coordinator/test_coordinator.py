"""The coordinator without sockets: joining, leases, groups, and the end."""

from collections.abc import Callable
from threading import Timer

import pytest

from protocol.messages import (
    PROTOCOL_VERSION,
    Ack,
    Drain,
    Error,
    Failed,
    Goodbye,
    Lease,
    Pong,
    Weights,
    WeightsPull,
    Welcome,
)
from tests.unit.factories import Cluster, joined, make_config, make_snapshot, make_work

# ---- Joining -----------------------------------------------------------------------------------


def test_an_actor_is_welcomed_with_the_model_files_and_told_of_the_weights():
    cluster = Cluster()
    cluster.hello("a")
    [(welcome, files)] = cluster.heard_with_payloads("a", Welcome)
    assert (welcome.run_id, welcome.files, files) == ("test/1", ("tokenizer.json",), (b"{}",))
    assert cluster.heard("a", Weights) == [make_snapshot(0).announcement("stream")]
    assert cluster.coordinator.num_live == 1


@pytest.mark.parametrize(
    ("changes", "both"),
    [
        ({"protocol": 99}, ("protocol version", "99", str(PROTOCOL_VERSION))),
        ({"run_id": "other/2"}, ("run", "other/2", "test/1")),
        ({"model_digest": "m2"}, ("model", "m2", "m1")),
        ({"session": "b"}, ("session", "'b'", "'a'")),
    ],
)
def test_an_actor_that_does_not_fit_is_refused_with_both_values(changes, both):
    cluster = Cluster()
    cluster.hello("a", **changes)
    [error] = cluster.heard("a", Error)
    assert error.code == "refused"
    assert all(text in error.message for text in both)
    assert cluster.heard("a", Welcome) == []
    assert cluster.coordinator.num_live == 0


def test_an_actor_of_this_run_is_welcomed_back():
    cluster = Cluster()
    cluster.hello("a", run_id="test/1", model_digest="m1")
    assert len(cluster.heard("a", Welcome)) == 1


def test_no_more_actors_are_welcomed_than_the_limit_but_members_may_come_again():
    cluster = Cluster(make_config(admission={"max_actors": 2}))
    for session in ("a", "b", "c"):
        cluster.hello(session)
    [error] = cluster.heard("c", Error)
    assert (error.code, "admission.max_actors = 2" in error.message) == ("refused", True)
    cluster.hello("a")
    assert cluster.heard("a", Error) == []
    assert cluster.coordinator.num_live == 2


def test_whoever_has_not_said_hello_is_told_so():
    cluster = joined("a")
    [lease, *_] = cluster.leases("a")
    for message, payloads in (
        cluster.group_message(lease),
        (Failed(lease=lease, kind="prompt", cause="x"), []),
        (WeightsPull(version=0, chunk=0), []),
        (Goodbye(cause="x"), []),
    ):
        cluster.say("stranger", message, payloads)
        assert [e.code for e in cluster.heard("stranger", Error)] == ["unknown_session"]
    assert cluster.coordinator.counters.unknown_session == 4
    assert cluster.coordinator.leases.counts["train"].outstanding == 4


def test_a_second_hello_gives_the_actors_leases_to_others():
    cluster = joined("a")
    assert cluster.leases("a") == [1, 2, 3, 4]
    cluster.hello("a")
    cluster.join("b")
    assert cluster.leases("b") == [5, 6, 7, 8]
    assert cluster.coordinator.leases.counts["train"].failed == {"actor_lost": 4}


def test_a_status_is_answered_with_the_trainers_version():
    cluster = joined("a")
    cluster.coordinator.advance(3)
    cluster.heard("a", Pong)
    cluster.status("a")
    assert cluster.heard("a", Pong) == [Pong(sequence=1, version=3)]


# ---- Leases ------------------------------------------------------------------------------------


def test_no_lease_goes_to_an_actor_without_weights():
    cluster = joined()
    cluster.hello("a")
    cluster.status("a", capacity=4)
    assert cluster.leases("a") == []
    cluster.weights_ready("a")
    assert len(cluster.leases("a")) == 4


def test_no_lease_is_issued_before_training_is_open_or_after_it_is_closed():
    cluster = Cluster()
    cluster.join("a")
    assert cluster.leases("a") == []
    cluster.open_training()
    leases = cluster.leases("a")
    assert len(leases) == 4
    cluster.coordinator.close_training()
    cluster.finish("a", leases[0])
    cluster.train()
    cluster.pass_time(1)
    assert cluster.leases("a") == []


def test_leases_go_to_the_emptiest_actor_first():
    cluster = Cluster()
    cluster.join("small", capacity=2)
    cluster.join("large", capacity=6)
    cluster.open_training()
    # Shares in use: 0/2 and 0/6, 1/2 and 0/6, 1/2 and 1/6, 1/2 and 2/6.
    assert cluster.leases("small") == [1]
    assert cluster.leases("large") == [2, 3, 4]


def test_an_actor_gets_no_more_leases_than_it_has_room_for():
    cluster = Cluster()
    cluster.join("a", capacity=1)
    cluster.open_training()
    assert cluster.leases("a") == [1]
    cluster.status("a", capacity=1)
    assert cluster.leases("a") == []
    cluster.finish("a", 1)
    assert cluster.leases("a") == [2]
    cluster.status("a", capacity=0)
    cluster.finish("a", 2)
    assert cluster.leases("a") == []


def test_leases_stop_at_the_limit_of_staleness_and_go_on_after_a_step():
    cluster = joined("a", "b")
    leases = cluster.leases("a") + cluster.leases("b")
    assert len(leases) == 4  # (1 + 1) * 2
    for session, lease in (("a", 1), ("b", 2), ("a", 3), ("b", 4)):
        cluster.finish(session, lease)
    cluster.pass_time(1)
    assert cluster.leases("a") + cluster.leases("b") == []
    assert cluster.train()
    cluster.pass_time(1)
    # Both still sample from version 0: (1 + 1 - 1) * 2 may be ahead, and 2 are buffered.
    assert cluster.leases("a") + cluster.leases("b") == []
    cluster.weights_ready("a", version=1)
    assert len(cluster.leases("a")) == 2
    assert cluster.leases("b") == []


def test_the_batch_in_training_counts_until_its_step_is_done():
    cluster = joined("a")
    for lease in cluster.leases("a"):
        cluster.finish("a", lease)
    cluster.buffer.take(2, version=0, timeout_s=0)
    cluster.pass_time(1)
    assert cluster.leases("a") == []  # 2 in training and 2 buffered are the (1 + 1) * 2 allowed


def test_leases_stop_when_the_rest_of_the_run_is_covered():
    cluster = joined("a", training={"steps": 1})
    assert cluster.leases("a") == [1, 2]
    cluster.finish("a", 1)
    cluster.finish("a", 2)
    assert cluster.leases("a") == []
    assert cluster.train()
    cluster.pass_time(1)
    assert cluster.leases("a") == []


# ---- Groups ------------------------------------------------------------------------------------


def test_a_group_is_accepted_once():
    cluster = joined("a")
    [lease, *_] = cluster.leases("a")
    assert cluster.finish("a", lease) == Ack(lease=lease, verdict="accepted")
    again = cluster.finish("a", lease)
    assert (again.verdict, again.cause) == ("duplicate", f"lease {lease} is settled")
    assert len(cluster.buffer) == cluster.buffer.counts.accepted == 1
    assert cluster.coordinator.counters.verdicts == {"accepted": 1, "duplicate": 1}


def test_a_group_for_a_lease_of_somebody_else_or_of_nobody_is_rejected():
    cluster = joined("a", "b")
    [lease, *_] = cluster.leases("a")
    assert cluster.finish("b", lease).cause == f"lease {lease} is held by another actor"
    assert cluster.finish("b", 99).cause == "lease 99 was never issued"
    assert len(cluster.buffer) == 0


def test_an_invalid_group_is_rejected_with_its_problem_and_its_row_leased_again():
    cluster = joined("a")
    [first, *_] = cluster.heard("a", Lease)
    ack = cluster.finish("a", first.lease, lengths=(9, 2))
    assert (ack.verdict, ack.cause) == ("rejected", "group: a completion over max_tokens")
    assert cluster.coordinator.counters.bad_messages == 1
    assert [lease.prompt_id for lease in cluster.heard("a", Lease)] == [first.prompt_id]
    assert cluster.coordinator.leases.counts["train"].failed == {"invalid_group": 1}


def test_a_group_of_a_version_that_does_not_exist_yet_is_rejected():
    cluster = joined("a")
    assert cluster.finish("a", 1, version=1).cause == "group: policy version 1 is unknown"


# ---- The end -----------------------------------------------------------------------------------


def test_draining_tells_every_actor_and_waits_for_their_goodbyes():
    cluster = joined("a", "b")
    cluster.coordinator.drain("done")
    assert cluster.heard("a", Drain) == cluster.heard("b", Drain) == [Drain(cause="done")]
    assert not cluster.coordinator.wait_until_empty(timeout_s=0.01)
    cluster.say("a", Goodbye(cause="done"))
    Timer(0.05, cluster.say, ["b", Goodbye(cause="done")]).start()
    assert cluster.coordinator.wait_until_empty(timeout_s=10)


def test_nobody_gets_a_lease_after_the_drain():
    cluster = joined("a", training={"max_staleness": 8})
    leases = cluster.leases("a")
    cluster.coordinator.drain("training failed")
    cluster.finish("a", leases[0])
    cluster.pass_time(1)
    assert cluster.leases("a") == []


def test_whatever_makes_room_for_leases_wakes_intake_which_issues_them():
    """At once, and not at the next tick; the trainer does not look through all actors itself."""
    cluster = Cluster()
    cluster.join("a", capacity=100)
    cluster.leases("a")
    woken: list[int] = []
    cluster.coordinator.outbox.wakes(lambda: woken.append(1))
    cluster.coordinator.issue()
    assert woken == []
    events: list[Callable[[], object]] = [
        lambda: cluster.coordinator.start_evaluation({"heldout": [make_work("h", "eval")]}, due=0),
        cluster.coordinator.open_training,
        cluster.coordinator.make_room,
        lambda: cluster.coordinator.advance(1),
    ]
    leases: list[int] = []
    for makes_room in events:
        woken.clear()
        makes_room()
        assert woken == [1]
        assert cluster.coordinator.has_room
        assert len(cluster.coordinator.outbox) == 0
        leases += cluster.leases("a")
        assert not cluster.coordinator.has_room
    assert len(leases) > 1
