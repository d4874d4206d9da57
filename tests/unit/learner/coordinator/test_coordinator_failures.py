"""The coordinator when things go wrong: failing rows, lost and hung actors, no actors at all."""

import math
from dataclasses import replace
from typing import Any

import pytest

from learner.config.run import RunConfig
from learner.prompts.work_queue import MAX_ATTEMPTS
from protocol.errors import BadMessage, TrainingError
from protocol.groups import pack_group
from protocol.messages import Ack, Error, Failed, Goodbye, Lease
from tests.unit.factories import Cluster, joined, make_config, make_group


def fail(cluster: Cluster, session: str, lease: int) -> None:
    cluster.say(session, Failed(lease=lease, kind="prompt", cause="the reward raised KeyError"))


# ---- Failing rows ------------------------------------------------------------------------------


def test_a_row_that_fails_is_tried_again_before_others_and_left_out_in_the_end():
    cluster = joined("a", capacity=1, training={"batch_groups": 4})
    prompts = []
    for _ in range(MAX_ATTEMPTS + 1):
        [lease] = cluster.heard("a", Lease)
        prompts.append(lease.prompt_id)
        fail(cluster, "a", lease.lease)
    assert len({*prompts[:MAX_ATTEMPTS]}) == 1
    assert prompts[MAX_ATTEMPTS] != prompts[0]


def test_too_many_failures_in_a_row_end_training_with_the_last_cause():
    cluster = joined("a", capacity=1, training={"batch_groups": 4})
    # Every row is tried three times, and counts once: leases 1, 4, 7 and 10.
    for lease in range(1, 10):
        fail(cluster, "a", lease)
    cluster.coordinator.raise_if_failed()
    fail(cluster, "a", 10)
    with pytest.raises(
        TrainingError, match=r"4 groups failed in a row.*the reward raised KeyError"
    ):
        cluster.coordinator.raise_if_failed()


def test_a_group_that_arrives_ends_the_row_of_failures():
    cluster = joined("a", capacity=1, training={"batch_groups": 4})
    for lease in (1, 2, 3, 5, 6, 7):
        fail(cluster, "a", lease)
        if lease == 3:
            cluster.finish("a", 4)
    cluster.coordinator.raise_if_failed()


def test_a_failure_report_of_somebody_elses_lease_changes_nothing():
    cluster = joined("a", "b")
    fail(cluster, "b", cluster.leases("a")[0])
    assert cluster.coordinator.leases.counts["train"].failed == {}


# ---- Failing rewards ---------------------------------------------------------------------------


def with_policy(policy: str) -> Cluster:
    """One actor with two leases; the reward `format` has this policy."""
    rewards = [
        {"name": "format", "function": "tasks:format", "on_failure": policy},
        {"name": "correctness", "function": "tasks:correctness"},
    ]
    tree = make_config().model_dump(exclude_unset=True)
    cluster = Cluster(RunConfig.model_validate(tree | {"rewards": rewards}))
    cluster.join("a")
    cluster.open_training()
    return cluster


def fail_reward(cluster: Cluster, lease: int, reward: str) -> None:
    cause = f"reward {reward!r} took longer than 60 s"
    cluster.say("a", Failed(lease=lease, kind="reward", cause=cause, reward=reward))


def test_a_failed_reward_is_counted_by_name_and_its_row_leased_again(caplog):
    cluster = with_policy("drop_group")
    [first, second, *_] = cluster.heard("a", Lease)
    fail_reward(cluster, first.lease, "format")
    fail_reward(cluster, second.lease, "no_such_reward")
    assert cluster.coordinator.counters.reward_failures == {"format": 1}
    assert (
        f"reward function tasks:format failed on {first.prompt_id}: "
        "reward 'format' took longer than 60 s" in caplog.text
    )
    again = [lease.prompt_id for lease in cluster.heard("a", Lease)]
    assert again == [first.prompt_id, second.prompt_id]
    cluster.coordinator.raise_if_failed()


def test_a_missing_reward_is_counted_and_its_group_trained():
    cluster = with_policy("missing")
    [lease, *_] = cluster.leases("a")
    scores = [[math.nan, 1], [math.nan, 2]]
    group = replace(make_group(lease, scores=scores), missing={"format": "it raised"})
    cluster.say("a", *pack_group(group))
    assert [ack.verdict for ack in cluster.heard("a", Ack)] == ["accepted"]
    assert len(cluster.buffer) == 1
    assert cluster.coordinator.counters.reward_failures == {"format": 1}
    cluster.coordinator.raise_if_failed()


def test_a_reward_that_must_not_fail_ends_the_run_with_its_cause():
    cluster = with_policy("error")
    [first, second, *_] = cluster.heard("a", Lease)
    fail_reward(cluster, first.lease, "correctness")
    cluster.coordinator.raise_if_failed()
    fail_reward(cluster, second.lease, "format")
    with pytest.raises(TrainingError) as caught:
        cluster.coordinator.raise_if_failed()
    assert str(caught.value) == (
        f"reward function tasks:format failed on {second.prompt_id}: "
        "reward 'format' took longer than 60 s"
    )


# ---- Lost and hung actors ----------------------------------------------------------------------


def test_a_dead_or_hung_actor_delays_nobody_for_longer_than_its_deadline():
    cluster = joined("silent", "alive")
    lost = cluster.heard("silent", Lease)
    done = cluster.leases("alive")
    cluster.clock.advance(6)
    cluster.status("alive")
    for lease in done:
        cluster.finish("alive", lease)
    cluster.pass_time(4)
    assert cluster.coordinator.num_live == 2  # silent for 10 s, which is not over the limit
    cluster.pass_time(0.1)
    again = cluster.heard("alive", Lease)
    assert [lease.prompt_id for lease in again] == [lease.prompt_id for lease in lost]
    assert cluster.coordinator.counters.actors_lost == 1
    assert cluster.coordinator.leases.counts["train"].failed == {"actor_lost": 2}


def test_the_late_group_of_a_lost_actor_is_refused():
    cluster = joined("silent", "alive")
    [lost, *_] = cluster.leases("silent")
    cluster.clock.advance(10.1)
    cluster.status("alive")
    cluster.coordinator.tick()
    cluster.say("silent", *cluster.group_message(lost))
    assert [error.code for error in cluster.heard("silent", Error)] == ["unknown_session"]
    cluster.join("silent")
    ack = cluster.finish("silent", lost)
    assert (ack.verdict, ack.cause) == ("rejected", f"lease {lost} was given up before: actor_lost")
    assert len(cluster.buffer) == 0


def stay_alive(cluster: Cluster, *sessions: str, seconds: int, **status: Any) -> None:
    """Let time pass in which these actors send heartbeats."""
    for _ in range(seconds // 5):
        cluster.clock.advance(5)
        for session in sessions:
            cluster.status(session, **status)
    cluster.coordinator.tick()


def test_a_lease_that_overruns_its_deadline_is_issued_again_under_a_new_number():
    cluster = joined("a", "b")
    overdue = {lease.lease: lease.prompt_id for lease in cluster.heard("a", Lease)}
    for lease in cluster.leases("b"):
        cluster.finish("b", lease)
    stay_alive(cluster, "a", "b", seconds=60)
    again = cluster.heard("a", Lease) + cluster.heard("b", Lease)
    assert {lease.prompt_id for lease in again} == {*overdue.values()}
    assert not {lease.lease for lease in again} & overdue.keys()
    assert cluster.coordinator.leases.counts["train"].failed == {"no_progress": 2}
    for lease in overdue:
        assert cluster.finish("a", lease).verdict == "rejected"


def test_a_lease_that_overruns_its_deadline_goes_to_another_actor():
    cluster = Cluster()
    cluster.join("hung", capacity=1)
    cluster.join("idle", capacity=3)
    cluster.open_training()
    [stuck] = cluster.heard("hung", Lease)
    for lease in cluster.leases("idle"):
        cluster.finish("idle", lease)
    for _ in range(12):
        cluster.clock.advance(5)
        cluster.status("idle", capacity=3)
        cluster.status("hung", capacity=1, leases=(stuck.lease,))
    cluster.coordinator.tick()
    # The hung actor still works on its first lease, and has said that it can hold one.
    assert cluster.heard("hung", Lease) == []
    assert [lease.prompt_id for lease in cluster.heard("idle", Lease)] == [stuck.prompt_id]


def test_an_overrun_lease_takes_room_until_its_actor_answers_or_says_that_it_is_idle():
    cluster = joined("a", capacity=1)
    for answer in ("group", "failed", "idle"):
        [lease] = cluster.leases("a")
        stay_alive(cluster, "a", seconds=60, capacity=1, leases=(lease,))
        assert cluster.leases("a") == []
        if answer == "group":
            assert cluster.finish("a", lease).verdict == "rejected"
        elif answer == "failed":
            fail(cluster, "a", lease)
        else:
            # The lease, or the answer to it, was lost on the way.
            cluster.status("a", capacity=1, leases=())
    assert len(cluster.leases("a")) == 1


def test_an_actor_that_never_gets_its_weights_is_given_up_though_it_sends_heartbeats():
    cluster = joined(deadlines={"join_timeout_s": 100})
    cluster.hello("a")
    stay_alive(cluster, "a", seconds=95, capacity=0)
    assert cluster.coordinator.num_live == 1
    stay_alive(cluster, "a", seconds=10, capacity=0)
    assert cluster.coordinator.num_live == 0


def test_an_actor_that_loads_may_be_silent_for_longer_than_one_that_works():
    cluster = joined()
    cluster.hello("a")
    cluster.pass_time(99)
    assert cluster.coordinator.num_live == 1
    cluster.pass_time(1.1)
    assert cluster.coordinator.num_live == 0


def test_the_leases_of_an_actor_that_says_goodbye_are_issued_again():
    cluster = joined("a")
    held = [lease.prompt_id for lease in cluster.heard("a", Lease)]
    cluster.say("a", Goodbye(cause="SIGTERM"))
    cluster.join("b")
    assert [lease.prompt_id for lease in cluster.heard("b", Lease)] == held
    assert cluster.coordinator.counters.actors_lost == 0


def test_an_actor_that_cannot_be_reached_is_lost():
    cluster = joined("a")
    cluster.coordinator.unreachable("a")
    cluster.coordinator.unreachable("a")
    assert cluster.coordinator.num_live == 0
    assert cluster.coordinator.counters.actors_lost == 1
    assert cluster.coordinator.leases.counts["train"].outstanding == 0


def test_a_run_without_actors_for_too_long_ends_with_what_to_do():
    cluster = joined("a", deadlines={"wait_for_actors_s": 200})
    cluster.pass_time(199)  # lost, which starts the wait
    cluster.clock.advance(200)
    cluster.coordinator.raise_if_failed()
    cluster.clock.advance(1)
    with pytest.raises(TrainingError, match="no actor for 201 s; start one with: gdpo actor"):
        cluster.coordinator.raise_if_failed()
    cluster.join("b")
    cluster.coordinator.raise_if_failed()


def test_a_bad_message_is_counted_and_answered():
    cluster = joined("a")
    cluster.coordinator.bad_message("a", BadMessage("3 frames too many"))
    assert cluster.heard("a", Error) == [Error(code="bad_message", message="3 frames too many")]
    assert cluster.coordinator.counters.bad_messages == 1
    assert cluster.coordinator.num_live == 1


def test_the_first_failure_is_the_one_that_ends_the_run():
    cluster = joined()
    cluster.coordinator.fail(TrainingError("first"))
    cluster.coordinator.fail(TrainingError("second"))
    with pytest.raises(TrainingError, match="first"):
        cluster.coordinator.raise_if_failed()


def test_an_actor_from_which_only_failures_come_is_let_go_while_others_work():
    cluster = joined("good", "bad", capacity=1, training={"max_staleness": 8})
    for _ in range(40):
        for lease in cluster.leases("good"):
            cluster.finish("good", lease)
        for lease in cluster.leases("bad"):
            cluster.say("bad", Failed(lease=lease, kind="prompt", cause="no luck"))
        if cluster.coordinator.num_live == 1:
            break
    [refused] = cluster.heard("bad", Error)
    assert "groups failed in a row" in refused.message
    assert "no luck" in refused.message
    cluster.coordinator.raise_if_failed()
    assert [actor.session for actor in cluster.coordinator.actors()] == ["good"]
