"""The lease book: one end for every lease, and books that balance whatever happens."""

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from protocol import leases
from protocol.leases import LeaseBook, LeaseCounts, OutstandingLease
from tests.unit.factories import make_work

ACTORS = st.sampled_from(["a", "b", "c"])
PURPOSES = st.sampled_from(["train", "eval"])


def make_book() -> LeaseBook:
    return LeaseBook()


def found(book: LeaseBook, lease: int, holder: str) -> OutstandingLease:
    held = book.find(lease, holder)
    assert held is not None
    return held


def test_a_lease_carries_its_work_and_its_deadline():
    book, work = make_book(), make_work("row", "eval")
    lease = book.issue(work, "a", now=100, limit_s=10)
    assert (lease.lease, lease.row, lease.prompt_id) == (1, work.row, "row")
    assert (lease.seed, lease.num_rollouts, lease.temperature) == (1, 2, 1.0)
    assert (lease.max_tokens, lease.purpose, lease.deadline_s) == (8, "eval", 10)


def test_lease_numbers_are_never_used_twice():
    book = make_book()
    first = book.issue(make_work(), "a", now=0, limit_s=10).lease
    book.fail(found(book, first, "a"), "actor_lost")
    assert book.issue(make_work(), "a", now=0, limit_s=10).lease == first + 1


def test_only_the_holder_finds_its_lease():
    book = make_book()
    lease = book.issue(make_work(), "a", now=0, limit_s=10).lease
    assert found(book, lease, "a").holder == "a"
    assert book.find(lease, "b") is None
    assert [held.number for held in book.held_by("a")] == [lease]
    assert book.held_by("b") == []


def test_a_lease_knows_when_it_was_issued_and_when_it_ends():
    book = make_book()
    first = book.issue(make_work(), "a", now=5, limit_s=10).lease
    second = book.issue(make_work(), "b", now=7, limit_s=20).lease
    times = [(held.number, held.issued_at, held.expires_at) for held in book.held]
    assert times == [(first, 5, 15), (second, 7, 27)]


def receive(book: LeaseBook, lease: int, holder: str) -> None:
    held = found(book, lease, holder)
    book.arrive(held)
    book.receive(held)


def test_a_group_that_is_being_stored_is_neither_held_nor_received():
    book = make_book()
    held = found(book, book.issue(make_work(), "a", now=0, limit_s=10).lease, "a")
    book.arrive(held)
    assert book.find(held.number, "a") is None
    assert book.held_by("a") == book.held == []
    # It will be answered when it is stored.
    assert book.why_not(held.number) is None
    assert (book.counts["train"].outstanding, book.counts["train"].received) == (1, 0)
    book.receive(held)
    assert (book.counts["train"].outstanding, book.counts["train"].received) == (0, 1)


def test_books_go_on_after_the_loss_of_a_learner():
    books = LeaseCounts.after_loss(received=5, failed={"deadline": 2}, gone=3)
    assert books.balanced
    assert books.leased == 10
    assert books.failed == {"deadline": 2, "learner_lost": 3}


def test_why_not_tells_the_four_cases_apart():
    book = make_book()
    received, failed, held = (
        book.issue(make_work(), "a", now=0, limit_s=10).lease for _ in range(3)
    )
    receive(book, received, "a")
    book.fail(found(book, failed, "a"), "deadline")
    assert book.why_not(received) == ("duplicate", f"lease {received} is settled")
    assert book.why_not(failed) == ("rejected", f"lease {failed} was given up before: deadline")
    assert book.why_not(held) == ("rejected", f"lease {held} is held by another actor")
    for never in (0, -1, held + 1, 2**63):
        assert book.why_not(never) == ("rejected", f"lease {never} was never issued")


@pytest.mark.parametrize("first", ["arrive", "fail"])
@pytest.mark.parametrize("second", ["arrive", "fail"])
def test_a_settled_lease_cannot_be_settled_again(first, second):
    book = make_book()
    held = found(book, book.issue(make_work(), "a", now=0, limit_s=10).lease, "a")
    settle = {"arrive": book.arrive, "fail": lambda held: book.fail(held, "again")}
    settle[first](held)
    before = repr(book.counts)
    with pytest.raises(KeyError):
        settle[second](held)
    assert repr(book.counts) == before


def test_failures_are_remembered_in_bounded_memory(monkeypatch):
    monkeypatch.setattr(leases, "_REMEMBERED_FAILURES", 3)
    book = make_book()
    for _ in range(5):
        book.fail(
            found(book, book.issue(make_work(), "a", now=0, limit_s=10).lease, "a"), "deadline"
        )
    reasons = [book.why_not(lease) for lease in range(1, 6)]
    verdicts = [reason[0] for reason in reasons if reason is not None]
    assert verdicts == ["duplicate"] * 2 + ["rejected"] * 3


class AnyInterleaving(RuleBasedStateMachine):
    """Issues, arrivals, failures, losses, deadlines, duplicates and late groups in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.book = make_book()
        self.now = 0.0
        self.holders: dict[int, str] = {}
        self.purposes: dict[int, str] = {}
        self.ends: Counter[int] = Counter()
        self.arrived: dict[int, OutstandingLease] = {}
        self.received: set[int] = set()

    @rule(actor=ACTORS, purpose=PURPOSES)
    def issue(self, actor, purpose):
        lease = self.book.issue(make_work("row", purpose), actor, self.now, limit_s=10).lease
        assert lease not in self.holders
        self.holders[lease], self.purposes[lease] = actor, purpose

    @rule(actor=ACTORS, lease=st.integers(0, 12))
    def group_arrives(self, actor, lease):
        held = self.book.find(lease, actor)
        if held is not None:
            self.book.arrive(held)
            self.arrived[lease] = held
            return
        answer = self.book.why_not(lease)
        assert (answer is None) == (lease in self.arrived)
        if answer is None:
            return
        verdict, cause = answer
        assert verdict == ("duplicate" if lease in self.received else "rejected")
        assert str(lease) in cause

    @rule(lease=st.integers(0, 12))
    def group_is_stored(self, lease):
        if held := self.arrived.pop(lease, None):
            self.book.receive(held)
            self.ends[lease] += 1
            self.received.add(lease)

    @rule(actor=ACTORS, lease=st.integers(0, 12))
    def actor_fails(self, actor, lease):
        if held := self.book.find(lease, actor):
            self.end_as_failed(held, "actor_failed")

    @rule(actor=ACTORS)
    def actor_is_lost(self, actor):
        for held in self.book.held_by(actor):
            self.end_as_failed(held, "actor_lost")
        assert self.book.held_by(actor) == []

    @rule(seconds=st.floats(0, 15))
    def time_passes(self, seconds):
        self.now += seconds
        for held in self.book.held:
            if held.expires_at <= self.now:
                self.end_as_failed(held, "deadline")

    def end_as_failed(self, held, cause):
        self.book.fail(held, cause)
        self.ends[held.number] += 1

    @invariant()
    def every_lease_is_open_or_has_one_end(self):
        open_leases = {held.number for actor in "abc" for held in self.book.held_by(actor)}
        assert set(self.ends.values()) <= {1}
        assert open_leases | self.arrived.keys() | self.ends.keys() == self.holders.keys()
        assert not (open_leases | self.arrived.keys()) & self.ends.keys()
        assert not open_leases & self.arrived.keys()

    @invariant()
    def the_books_balance(self):
        for purpose, books in self.book.counts.items():
            mine = {lease for lease, of in self.purposes.items() if of == purpose}
            assert books.balanced
            assert books.leased == len(mine)
            assert books.received == len(mine & self.received)
            assert books.outstanding == len(mine - self.ends.keys())
            assert books.outstanding == self.book.outstanding(purpose)


TestAnyInterleaving = AnyInterleaving.TestCase
TestAnyInterleaving.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
