"""Evaluations while training goes on: by whom, of which version, and what comes of them."""

import math
from collections import Counter
from typing import Any

import pytest

from learner.config.data import PassWhen
from learner.prompts.evaluation import Evaluation
from protocol.messages import Ack, Failed, Goodbye, Lease, Weights
from tests.unit.factories import REWARDS, Cluster, joined, make_config, make_work

NAN = math.nan


def start(cluster: Cluster, *names: str, due: int = 0) -> Evaluation:
    """An evaluation of one set with prompts of these names."""
    works = [make_work(name, "eval") for name in names]
    return cluster.coordinator.start_evaluation({"heldout": works}, due)


def purposes(cluster: Cluster, session: str) -> Counter[str]:
    return Counter(lease.purpose for lease in cluster.heard(session, Lease))


def send(cluster: Cluster, session: str, lease: int, **group: Any) -> Ack:
    """Send a group after others; returns its acknowledgement."""
    cluster.heard(session, Ack)
    return cluster.finish(session, lease, **group)


def evaluators(cluster: Cluster) -> list[str]:
    return [actor.session for actor in cluster.coordinator.actors() if actor.evaluates]


def make_version(cluster: Cluster, *followers: str) -> int:
    """One training step; its version is published and pushed to those that can take it."""
    while not cluster.train():
        sent = False
        for actor in cluster.coordinator.actors():
            for lease in cluster.coordinator.leases.held_by(actor.session):
                if lease.work.purpose == "train":
                    group = cluster.group_message(lease.number, version=actor.version)
                    cluster.say(actor.session, *group)
                    sent = True
        assert sent, "there is no batch, and nobody makes one"
    push(cluster, *followers)
    return cluster.version


def push(cluster: Cluster, *followers: str) -> list[str]:
    """Push the newest version; those it was pushed to, of which ``followers`` confirm it."""
    snapshot = cluster.snapshots.latest
    members = [actor.session for actor in cluster.coordinator.begin_push(snapshot.version)]
    for session in members:
        cluster.coordinator.announce(session, snapshot.announcement("stream"), snapshot)
    for session in followers:
        cluster.weights_ready(session, snapshot.version)
    cluster.coordinator.end_push()
    return members


# ---- Of which version --------------------------------------------------------------------------


def test_only_actors_with_a_version_of_that_step_or_later_evaluate_it():
    cluster = joined("a", "b", training={"max_staleness": 3})
    evaluation = start(cluster, "h", due=1)
    assert evaluators(cluster) == []
    make_version(cluster)
    assert evaluators(cluster) == []
    cluster.weights_ready("b", 1)
    assert (evaluators(cluster), evaluation.version) == (["b"], 1)


def test_an_evaluator_is_offered_no_newer_weights_until_it_is_done():
    cluster = joined("a", "b", capacity=20, training={"max_staleness": 3})
    evaluation = start(cluster, "h")
    assert evaluators(cluster) == ["a"]
    [lease] = [lease for lease in cluster.heard("a", Lease) if lease.purpose == "eval"]
    cluster.heard("a", Weights)
    make_version(cluster, "b")
    make_version(cluster, "b")
    cluster.pass_time(9)
    for session in ("a", "b"):
        cluster.status(session)
    cluster.pass_time(9)
    assert cluster.heard("a", Weights) == []
    send(cluster, "a", lease.lease, version=0)
    assert evaluation.done.is_set()
    assert evaluators(cluster) == []
    # No push comes to one that missed two: it is told at once.
    assert [offer.version for offer in cluster.heard("a", Weights)] == [2]
    cluster.weights_ready("a", 2)
    make_version(cluster)
    assert [offer.version for offer in cluster.heard("a", Weights)] == [3]


def test_an_actor_to_which_newer_weights_are_on_their_way_does_not_evaluate():
    cluster = joined("a", training={"max_staleness": 3})
    assert cluster.train() is False
    for lease in cluster.leases("a"):
        cluster.finish("a", lease)
    assert cluster.train()
    # The push has begun, but the actor has not been told yet.
    cluster.coordinator.begin_push(1)
    evaluation = start(cluster, "h")
    assert evaluators(cluster) == []
    snapshot = cluster.snapshots.latest
    cluster.coordinator.announce("a", snapshot.announcement("stream"), snapshot)
    cluster.coordinator.end_push()
    cluster.coordinator.tick()
    assert evaluators(cluster) == []
    cluster.weights_ready("a", 1)
    assert (evaluators(cluster), evaluation.version) == (["a"], 1)


def test_an_actor_that_is_always_behind_evaluates_too():
    cluster = joined("a", "slow", training={"max_staleness": 9})
    make_version(cluster, "a")
    make_version(cluster, "a")
    cluster.say("a", Goodbye(cause="x"))
    evaluation = start(cluster, "h", due=1)
    cluster.heard("slow", Weights)
    # It would be offered version 2 at once.
    cluster.weights_ready("slow", 1)
    assert (evaluators(cluster), evaluation.version) == (["slow"], 1)
    assert cluster.heard("slow", Weights) == []


def test_a_group_with_a_token_of_another_version_is_refused_and_made_again():
    cluster = joined("a", capacity=20, training={"max_staleness": 3})
    evaluation = start(cluster, "h")
    [lease] = [lease for lease in cluster.heard("a", Lease) if lease.purpose == "eval"]
    make_version(cluster)
    ack = send(cluster, "a", lease.lease, version=1)
    assert ack.verdict == "rejected"
    assert "sampled from version 1, where 0 is evaluated" in ack.cause
    assert evaluation.num_missing == 1
    assert [w.prompt_id for w in cluster.coordinator.leases.open_works("eval")] == ["h"]


def test_if_nobody_with_the_version_is_left_all_of_it_is_evaluated_anew_with_another():
    cluster = joined("a", "b", training={"max_staleness": 9}, capacity=20)
    evaluation = start(cluster, "h0", "h1", "h2")
    leases = [lease for lease in cluster.heard("a", Lease) if lease.purpose == "eval"]
    cluster.finish("a", leases[0].lease, scores=[[1, 1], [1, 1]])
    make_version(cluster, "b")
    assert evaluation.version == 0
    cluster.say("a", Goodbye(cause="x"))
    assert (evaluators(cluster), evaluation.version) == (["b"], 1)
    assert evaluation.num_missing == 3
    again = [lease for lease in cluster.heard("b", Lease) if lease.purpose == "eval"]
    assert {lease.prompt_id for lease in again} == {"h0/2", "h1/2", "h2/2"}
    for lease in again:
        send(cluster, "b", lease.lease, scores=[[0, 0], [0, 0]])
    assert evaluation.done.is_set()
    assert evaluation.sets["heldout"].means(REWARDS) == {"format": 0, "correctness": 0}


def test_another_evaluator_makes_what_a_lost_one_has_not_made():
    cluster = joined("a", "b", "c", "d", capacity=2, training={"max_staleness": 9})
    evaluation = start(cluster, *(f"h{i}" for i in range(6)))
    make_version(cluster, "c", "d")
    assert evaluators(cluster) == ["a", "b"]
    assert (purposes(cluster, "a")["eval"], purposes(cluster, "b")["eval"]) == (2, 2)
    cluster.say("a", Goodbye(cause="x"))
    while held := [
        lease for lease in cluster.coordinator.leases.held_by("b") if lease.work.purpose == "eval"
    ]:
        send(cluster, "b", held[0].number, version=0)
    assert evaluation.done.is_set()
    assert evaluation.version == 0
    assert set(evaluation.sets["heldout"].scores) == {f"h{i}" for i in range(6)}


# ---- Neither starves the other -----------------------------------------------------------------


@pytest.mark.parametrize(("actors", "expected"), [("a", 1), ("ab", 1), ("abc", 1), ("abcde", 2)])
def test_at_most_half_of_the_actors_evaluate_while_training_goes_on(actors, expected):
    cluster = joined(*actors, capacity=2)
    start(cluster, *(f"h{i}" for i in range(50)))
    assert len(evaluators(cluster)) == expected


def test_all_actors_evaluate_where_there_is_no_training():
    cluster = Cluster()
    for session in "abc":
        cluster.join(session, capacity=2)
    start(cluster, *(f"h{i}" for i in range(5)))
    assert evaluators(cluster) == ["a", "b", "c"]
    assert sum((purposes(cluster, session) for session in "abc"), Counter()) == {"eval": 5}


def test_an_evaluator_gives_all_of_its_room_while_others_train():
    cluster = joined("a", "b", capacity=3, training={"max_staleness": 9})
    start(cluster, *(f"h{i}" for i in range(50)))
    assert evaluators(cluster) == ["a"]
    for session in ("a", "b") * 3:
        cluster.finish(session, cluster.coordinator.leases.held_by(session)[0].number)
    assert purposes(cluster, "a") == {"train": 3, "eval": 3}
    assert purposes(cluster, "b") == {"train": 6}


def test_half_of_a_single_actors_room_is_the_evaluations_and_what_training_does_not_want():
    # (2 + 1) batches of 4: training wants 12 groups.
    cluster = joined("a", capacity=10, training={"max_staleness": 2, "batch_groups": 4})
    start(cluster, *(f"h{i}" for i in range(50)))
    leases = cluster.coordinator.leases
    given = []

    def end(purpose: str) -> None:
        number = next(held.number for held in leases.held if held.work.purpose == purpose)
        cluster.finish("a", number)
        given.append((leases.outstanding("train"), leases.outstanding("eval")))

    # First it is all training's, which came first.
    for purpose in ["train"] * 6 + ["eval", "train", "eval", "train"]:
        end(purpose)
    assert given == [
        *((9, 1), (8, 2), (7, 3), (6, 4), (5, 5), (5, 5)),
        # Each gets its own back, until training has 12 that are leased or buffered.
        *((5, 5), (5, 5), (5, 5), (4, 6)),
    ]


def test_an_evaluation_of_nothing_is_done_at_once():
    evaluation = start(Cluster())
    assert evaluation.done.is_set()
    assert evaluation.sets["heldout"].means(("format",)) == {"format": None}


# ---- What comes of it --------------------------------------------------------------------------


def test_an_evaluation_ends_with_the_means_over_the_rollouts_that_a_reward_applies_to():
    cluster = Cluster()
    cluster.join("a")
    evaluation = start(cluster, "h0", "h1")
    first, second = cluster.leases("a")
    cluster.clock.advance(3)
    cluster.finish("a", first, scores=[[1, NAN], [0, NAN]], lengths=(3, 2))
    assert not evaluation.done.is_set()
    cluster.finish("a", second, scores=[[1, 4], [1, NAN]], lengths=(8, 7))
    assert evaluation.done.is_set()
    assert evaluation.seconds == 3
    found = evaluation.sets["heldout"]
    # format: (1 + 0 + 1 + 1) / 4; correctness: 4 / 1; tokens: 3 + 2 + 8 + 7.
    assert found.means(REWARDS) == {"format": 0.75, "correctness": 4.0}
    assert (found.num_tokens, found.num_rollouts, found.num_failed) == (20, 4, 0)
    assert len(cluster.buffer) == 0
    assert cluster.coordinator.leases.counts["eval"].received == 2


def test_a_prompt_that_always_fails_is_left_out_of_the_evaluation():
    cluster = Cluster(make_config(training={"batch_groups": 4}))
    cluster.join("a", capacity=1)
    evaluation = start(cluster, "h0", "h1")
    while leases := cluster.heard("a", Lease):
        [lease] = leases
        if lease.prompt_id == "h0":
            cluster.say("a", Failed(lease=lease.lease, kind="prompt", cause="x"))
        else:
            cluster.finish("a", lease.lease, scores=[[1, NAN], [0, NAN]])
    assert evaluation.done.is_set()
    found = evaluation.sets["heldout"]
    assert (len(found.scores), found.num_failed, evaluation.num_missing) == (1, 1, 0)
    assert found.means(REWARDS) == {"format": 0.5, "correctness": None}


def test_what_is_missing_when_time_is_up_is_left_out():
    cluster = joined("a", capacity=30, eval={"timeout_s": 30}, training={"max_staleness": 9})
    evaluation = start(cluster, "h0", "h1")
    first, _ = (lease for lease in cluster.heard("a", Lease) if lease.purpose == "eval")
    cluster.finish("a", first.lease, scores=[[1, 1], [1, 1]])
    for seconds in (9, 9, 9):
        cluster.pass_time(seconds)
        cluster.status("a")
    assert not evaluation.done.is_set()
    cluster.pass_time(3)
    assert evaluation.done.is_set()
    assert (evaluation.num_missing, evaluation.seconds) == (1, 30)
    assert evaluators(cluster) == []
    assert evaluation.sets["heldout"].means(REWARDS) == {"format": 1, "correctness": 1}


def test_what_is_left_of_an_ended_evaluation_does_not_count_in_the_next():
    cluster = Cluster()
    cluster.join("a", capacity=2)
    start(cluster, "old0", "old1")
    late, lost = cluster.leases("a")
    evaluation = start(cluster, "new")
    cluster.finish("a", late, scores=[[0, 0], [0, 0]])
    assert (evaluation.num_missing, evaluation.done.is_set()) == (1, False)
    cluster.say("a", Failed(lease=lost, kind="prompt", cause="x"))
    new, *others = cluster.heard("a", Lease)
    assert (new.prompt_id, others) == ("new", [])
    cluster.finish("a", new.lease, scores=[[1, 1], [1, 1]])
    assert evaluation.done.is_set()
    assert evaluation.sets["heldout"].means(REWARDS) == {"format": 1, "correctness": 1}


def test_sets_are_counted_apart():
    cluster = Cluster()
    cluster.join("a")
    works = {name: [make_work(f"{name}/0", "eval")] for name in ("easy", "hard")}
    evaluation = cluster.coordinator.start_evaluation(works, 0)
    for lease, score in zip(cluster.leases("a"), (1.0, 0.25), strict=True):
        cluster.finish("a", lease, scores=[[score, score]] * 2)
    means = {name: found.means(REWARDS)["format"] for name, found in evaluation.sets.items()}
    assert means == {"easy": 1.0, "hard": 0.25}


def test_passes_are_counted_over_the_rollouts_that_the_reward_applies_to():
    cluster = Cluster()
    cluster.join("a")
    evaluation = start(cluster, "h0", "h1", "h2")
    scores = ([[0, 1], [0, 0.5]], [[1, NAN], [1, 2]], [[0, NAN], [0, NAN]])
    for lease, rows in zip(cluster.leases("a"), scores, strict=True):
        cluster.finish("a", lease, scores=rows)
    passes = evaluation.sets["heldout"].passes(
        (1, 2), PassWhen(reward="correctness", at_least=1.0), REWARDS
    )
    # pass@1: 1 of 2 and 1 of 1; pass@2: only the first prompt has two such rollouts.
    assert passes == {1: 0.75, 2: 1.0}
