"""How long a lease may last, on a clock that the tests move: no bias, and no lease for ever."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from learner.coordinator.deadlines import ENOUGH, GENEROSITY, REMEMBERED, LeaseLimit
from protocol.messages import Ack, Lease
from tests.unit.factories import Cluster, make_config

TIMEOUT_S = 600.0
REPORT_S = 20.0
TIMES = st.floats(0.1, 1e5)


def limit_after(*times: float) -> float:
    limit = LeaseLimit(TIMEOUT_S)
    for seconds in times:
        limit.arrived(seconds)
    return limit.limit_s


def test_the_limit_follows_what_groups_take_and_is_never_below_the_timeout():
    assert limit_after(*[500.0] * ENOUGH) == GENEROSITY * 500
    assert limit_after(*[20.0] * ENOUGH) == TIMEOUT_S
    # What was before is forgotten.
    assert limit_after(*[500.0] * REMEMBERED, *[100.0] * REMEMBERED) == GENEROSITY * 100


def test_before_anything_is_measured_it_is_generous():
    assert limit_after() == limit_after(*[1.0] * (ENOUGH - 1)) == GENEROSITY * TIMEOUT_S


@given(st.lists(TIMES, min_size=2 * ENOUGH, max_size=REMEMBERED), st.data())
def test_a_few_that_hold_what_they_have_do_not_raise_it_for_all(honest, data):
    """Fewer than a tenth of all groups, whenever they come."""
    liars = [1e9] * (len(honest) // 10)
    times = data.draw(st.permutations(honest + liars))
    assert limit_after(*times[-REMEMBERED:]) <= max(TIMEOUT_S, GENEROSITY * max(honest))


# ---- Simulated actors --------------------------------------------------------------------------


class Actors:
    """Actors that report every `REPORT_S`; each works on one lease at a time."""

    def __init__(self, **group_s: float) -> None:
        """Seconds that each of them takes for a group."""
        self.cluster = Cluster(
            make_config(
                training={"steps": 10_000, "max_staleness": 4},
                deadlines={"lease_timeout_s": TIMEOUT_S, "actor_timeout_s": 2 * REPORT_S},
            )
        )
        self.group_s = group_s
        self.tokens = dict.fromkeys(group_s, 0)
        self.generates = dict.fromkeys(group_s, True)
        self.at_work: dict[str, tuple[Lease, float] | None] = dict.fromkeys(group_s)
        self.leased: dict[str, list[tuple[str, float]]] = {session: [] for session in group_s}
        for session in group_s:
            self.cluster.join(session, capacity=1)
        self.cluster.open_training()

    def live(self, seconds: float) -> "Actors":
        end = self.cluster.clock.now + seconds
        while self.cluster.clock.now < end:
            self.cluster.clock.advance(REPORT_S)
            for session in self.group_s:
                self._work(session)
            self.cluster.coordinator.tick()
            while self.cluster.buffer.take(2, 0, 0):
                self.cluster.coordinator.advance(0)
        return self

    def _work(self, session: str) -> None:
        now = self.cluster.clock.now
        for lease in self.cluster.heard(session, Lease):
            self.at_work[session] = (lease, now)
            self.leased[session].append((lease.prompt_id, now))
        work, held = self.at_work[session], list[int]()
        if work is not None:
            lease, began = work
            held = [lease.lease]
            self.tokens[session] += self.generates[session]
            if now - began >= self.group_s[session]:
                self.cluster.say(session, *self.cluster.group_message(lease.lease))
                self.at_work[session], held = None, []
            elif now - began >= lease.deadline_s:
                # It gives up by itself.
                self.at_work[session], held = None, []
        self.cluster.heard(session, Ack)
        self.cluster.status(
            session, capacity=1, leases=tuple(held), tokens_generated=self.tokens[session]
        )

    @property
    def failed(self) -> dict[str, int]:
        return dict(self.cluster.coordinator.leases.counts["train"].failed)

    @property
    def received(self) -> int:
        return self.cluster.coordinator.leases.counts["train"].received


@pytest.mark.parametrize("group_s", [100, 1500, 4500])
def test_groups_that_take_longer_than_the_timeout_come_in_and_none_is_dropped(group_s):
    actors = Actors(a=group_s, b=group_s).live(10 * group_s)
    assert actors.failed == {}
    assert actors.received >= 16


def test_a_long_tail_is_no_reason_to_give_up():
    """Some prompts take ten minutes and more, where most take two."""
    actors = Actors(quick=120, quick2=120, slow=900).live(9000)
    assert actors.failed == {}
    assert {prompt for prompt, _ in actors.leased["slow"]}


def test_an_actor_that_generates_nothing_loses_its_lease_and_is_named(caplog):
    actors = Actors(good=50, stuck=1e9)
    actors.generates["stuck"] = False
    actors.live(TIMEOUT_S + 2 * REPORT_S)
    assert actors.failed == {"no_progress": 1}
    [lost] = actors.leased["stuck"]
    # Somebody else has it, and in time.
    actors.live(100)
    later = [at for prompt, at in actors.leased["good"] if prompt == lost[0] and at > lost[1]]
    assert later[0] - lost[1] <= TIMEOUT_S + 120
    assert f"({lost[0]}) got nowhere: no token for 600 s on actor 2" in caplog.text


def test_a_lease_lasts_from_the_last_token_on():
    actors = Actors(a=1e9).live(1000)
    actors.generates["a"] = False
    actors.live(TIMEOUT_S - 2 * REPORT_S)
    assert actors.failed == {}
    actors.live(3 * REPORT_S)
    assert actors.failed == {"no_progress": 1}


def test_an_actor_that_lies_about_progress_holds_a_prompt_no_longer_than_measured(caplog):
    """Others take 120 s, the wait for the lease included: eight times that is what it gets."""
    actors = Actors(good=100, liar=50).live(2000)
    actors.group_s["liar"] = 1e9
    actors.live(3000)
    assert set(actors.failed) == {"deadline"}
    # 3000 s hold three times 960, not one of 4800.
    assert actors.failed["deadline"] == 3
    assert "is not done after 960 s on actor 2" in caplog.text
    # Each time somebody else got the prompt, so that none is left out.
    assert "is left out" not in caplog.text


def test_before_anything_is_measured_a_liar_is_given_up_too():
    actors = Actors(liar=1e9).live(GENEROSITY * TIMEOUT_S + 2 * REPORT_S)
    assert actors.failed == {"deadline": 1}


def test_an_actor_is_told_the_limit_that_holds_for_its_lease():
    cluster: Any = Cluster(make_config(deadlines={"lease_timeout_s": TIMEOUT_S}))
    cluster.join("a")
    cluster.open_training()
    assert {lease.deadline_s for lease in cluster.heard("a", Lease)} == {GENEROSITY * TIMEOUT_S}
    assert cluster.coordinator.lease_limit_s == GENEROSITY * TIMEOUT_S
