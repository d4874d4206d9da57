"""The coordinator with a journal, and leases that get lost on the way."""

from dataclasses import dataclass, field
from typing import Any

import pytest

from learner.replay.journal import Journal, ReceivedGroup
from protocol.messages import Ack, Error, Lease, Pong
from tests.unit.factories import Cluster, joined


@dataclass
class FakeJournal:
    """Stores when the test says so."""

    waiting: list[ReceivedGroup] = field(default_factory=list)

    def append(self, received: ReceivedGroup, header: Any, payloads: Any) -> None:
        self.waiting.append(received)

    def store(self, cluster: Cluster) -> None:
        arrivals, self.waiting = self.waiting, []
        cluster.coordinator.stored(arrivals)


@pytest.fixture
def journal() -> FakeJournal:
    return FakeJournal()


@pytest.fixture
def cluster(journal: Journal) -> Cluster:
    cluster = Cluster(journal=journal)
    cluster.join("a")
    cluster.open_training()
    return cluster


def send(cluster: Cluster, session: str, lease: int, **group: Any) -> list[Ack]:
    cluster.say(session, *cluster.group_message(lease, **group))
    return cluster.heard(session, Ack)


def accepted(lease: int) -> Ack:
    return Ack(lease=lease, verdict="accepted")


# ---- Acknowledgements --------------------------------------------------------------------------


def test_guarantee_2_a_group_is_acknowledged_and_trained_on_only_when_it_is_stored(
    cluster, journal
):
    [first, second, *_] = cluster.leases("a")
    assert send(cluster, "a", first) == send(cluster, "a", second) == []
    assert len(cluster.buffer) == 0
    books = cluster.coordinator.leases.counts["train"]
    assert (books.received, books.outstanding) == (0, 4)
    journal.store(cluster)
    assert cluster.heard("a", Ack) == [accepted(first), accepted(second)]
    assert len(cluster.buffer) == 2
    assert (books.received, books.balanced) == (2, True)


def test_guarantee_1_a_duplicate_of_what_is_being_stored_is_not_answered_and_not_stored_again(
    cluster, journal
):
    [lease, *_] = cluster.leases("a")
    assert send(cluster, "a", lease) == send(cluster, "a", lease) == []
    assert len(journal.waiting) == 1
    journal.store(cluster)
    assert cluster.heard("a", Ack) == [accepted(lease)]
    [again] = send(cluster, "a", lease)
    assert again.verdict == "duplicate"
    assert cluster.buffer.counts.accepted == 1


def test_a_group_that_is_being_stored_counts_as_outstanding(cluster, journal):
    leases = cluster.leases("a")
    for lease in leases:
        send(cluster, "a", lease)
    # (1 + 1) * 2 are being stored: no more may be generated.
    cluster.pass_time(1)
    assert cluster.leases("a") == []
    assert len(journal.waiting) == 4


def test_a_group_is_kept_when_its_actor_is_lost_while_it_is_stored(cluster, journal):
    leases = cluster.leases("a")
    send(cluster, "a", leases[0])
    cluster.coordinator.unreachable("a")
    books = cluster.coordinator.leases.counts["train"]
    assert books.failed == {"actor_lost": 3}
    journal.store(cluster)
    assert (books.received, books.outstanding, books.balanced) == (1, 0, True)
    assert len(cluster.buffer) == 1
    cluster.join("b")
    prompts = cluster.heard("b", Lease)
    # The three that were lost; the fourth place is the stored group's.
    assert len(prompts) == 3


def test_an_actor_that_comes_back_while_its_group_is_stored_does_not_fulfil_it_twice(
    cluster, journal
):
    [lease, *_] = cluster.leases("a")
    send(cluster, "a", lease)
    cluster.hello("a")
    assert send(cluster, "a", lease) == []
    journal.store(cluster)
    assert cluster.heard("a", Ack) == [accepted(lease)]
    assert cluster.buffer.counts.accepted == 1


def test_a_lease_that_is_being_stored_does_not_overrun_its_deadline(cluster, journal):
    [lease, *_] = cluster.leases("a")
    send(cluster, "a", lease)
    cluster.clock.advance(61)
    cluster.status("a")
    cluster.coordinator.tick()
    assert cluster.coordinator.leases.counts["train"].failed == {"no_progress": 3}
    journal.store(cluster)
    assert accepted(lease) in cluster.heard("a", Ack)


def test_a_group_of_somebody_else_is_refused_while_it_is_waited_for(cluster, journal):
    [lease, *_] = cluster.leases("a")
    cluster.join("b")
    [ack] = send(cluster, "b", lease)
    assert ack.verdict == "rejected"
    assert journal.waiting == []


def test_an_invalid_group_is_refused_at_once(cluster, journal):
    [lease, *_] = cluster.leases("a")
    [ack] = send(cluster, "a", lease, lengths=(9, 2))
    assert ack.verdict == "rejected"
    assert journal.waiting == []


def test_the_state_for_a_checkpoint_names_what_is_being_stored_as_leased(cluster, journal):
    [lease, *_] = cluster.leases("a")
    send(cluster, "a", lease)
    prompt_indices, books = cluster.coordinator.state()
    assert (prompt_indices.next_prompt_index, sorted(prompt_indices.leased)) == (4, [0, 1, 2, 3])
    assert (prompt_indices.waiting, prompt_indices.buffered) == ((), ())
    assert books["train"].outstanding == 4
    journal.store(cluster)
    prompt_indices, books = cluster.coordinator.state()
    assert len(prompt_indices.leased) == 3
    assert len(prompt_indices.buffered) == 1
    assert not set(prompt_indices.leased) & set(prompt_indices.buffered)


# ---- Leases that get lost ----------------------------------------------------------------------


def pong(cluster: Cluster, session: str, sequence: int, **status: Any) -> int:
    """Say a status and hear its answer."""
    cluster.status(session, sequence=sequence, **status)
    return cluster.heard(session, Pong)[-1].sequence


def test_a_lease_that_was_lost_on_the_way_is_issued_again_at_once():
    cluster = joined("a")
    lost, *arrived = cluster.heard("a", Lease)
    heard = pong(cluster, "a", 2, leases=tuple(lease.lease for lease in arrived))
    # It was sent before the answer that the actor has heard now, and it does not know it.
    cluster.status("a", sequence=3, heard=heard, leases=tuple(lease.lease for lease in arrived))
    [again] = cluster.heard("a", Lease)
    assert again.prompt_id == lost.prompt_id
    assert again.lease != lost.lease
    books = cluster.coordinator.leases.counts["train"]
    assert (books.failed, books.outstanding, books.balanced) == ({"lost": 1}, 4, True)
    # What turns up for it all the same is refused.
    assert cluster.finish("a", lost.lease).verdict == "rejected"


def test_a_lease_that_was_sent_after_the_last_answer_is_not_lost():
    cluster = joined("a", training={"max_staleness": 8})
    leases = cluster.leases("a")
    heard = pong(cluster, "a", 2, leases=tuple(leases))
    cluster.finish("a", leases[0])
    [new] = cluster.leases("a")
    cluster.status("a", sequence=3, heard=heard, leases=tuple(leases[1:]))
    assert cluster.coordinator.leases.counts["train"].failed == {}
    # With the answer to that status it has to be there.
    cluster.status("a", sequence=4, heard=3, leases=tuple(leases[1:]))
    assert cluster.coordinator.leases.counts["train"].failed == {"lost": 1}
    assert cluster.finish("a", new).verdict == "rejected"


def test_a_lease_whose_group_is_not_acknowledged_yet_is_not_lost(cluster, journal):
    leases = tuple(cluster.leases("a"))
    heard = pong(cluster, "a", 2, leases=leases)
    send(cluster, "a", leases[0])
    # The actor lists it until it is acknowledged; the learner knows better all the same.
    for listed in (leases, leases[1:]):
        heard = pong(cluster, "a", heard + 1, heard=heard, leases=listed)
    assert cluster.coordinator.leases.counts["train"].failed == {}
    journal.store(cluster)
    assert cluster.heard("a", Ack) == [accepted(leases[0])]


def test_an_actor_that_heard_no_answer_yet_loses_nothing():
    cluster = joined("a")
    cluster.leases("a")
    for sequence in (2, 3, 4):
        pong(cluster, "a", sequence, heard=-1, leases=())
    assert cluster.coordinator.leases.counts["train"].failed == {}


def test_an_answer_of_an_earlier_session_says_nothing_of_this_one():
    cluster = joined("a")
    cluster.leases("a")
    heard = pong(cluster, "a", 2, leases=())
    cluster.coordinator.unreachable("a")
    cluster.join("a")
    cluster.leases("a")
    cluster.status("a", sequence=9, heard=heard + 5, leases=())
    assert "lost" not in cluster.coordinator.leases.counts["train"].failed
    assert cluster.heard("a", Error) == []
