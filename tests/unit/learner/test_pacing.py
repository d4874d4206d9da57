"""The pacing rule: by hand, and in simulated runs with the real buffer."""

from dataclasses import dataclass, field, replace
from random import Random
from typing import Any, Literal

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from learner.pacing import Pacing, largest_group_bytes
from learner.replay.buffer import ReplayBuffer
from protocol.errors import ConfigError
from tests.unit.factories import make_group

GROUP_BYTES = make_group().size_bytes
NEVER_STOPS = 20_000


def make_pacing(**changes) -> Pacing:
    values = {
        "max_staleness": 2,
        "batch_groups": 10,
        "steps": 100,
        "max_groups": 1000,
        "max_bytes": 10**9,
        "group_bytes": 1000,
    }
    return Pacing(**(values | changes))


def allowed(pacing: Pacing, **changes: Any) -> int:
    state: dict[str, Any] = {
        "trainer_version": 0,
        "actor_version": 0,
        "outstanding": 0,
        "buffered": 0,
        "in_training": 0,
        "buffered_bytes": 0,
    }
    return pacing.allowed(**(state | changes))


# ---- By hand -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        ({}, 30),  # (2 + 1 - 0) * 10
        ({"outstanding": 12}, 18),
        ({"outstanding": 12, "buffered": 8}, 10),
        ({"outstanding": 12, "buffered": 8, "in_training": 10}, 0),
        ({"outstanding": 10, "buffered": 9, "in_training": 10}, 1),
        ({"outstanding": 40}, 0),  # never negative
        ({"trainer_version": 7, "actor_version": 6}, 20),  # (2 + 1 - 1) * 10
        ({"trainer_version": 7, "actor_version": 5, "outstanding": 9}, 1),
        ({"trainer_version": 7, "actor_version": 4}, 0),  # could only be too stale
        ({"trainer_version": 98, "actor_version": 98}, 20),  # two steps are left
        ({"trainer_version": 99, "actor_version": 99, "in_training": 10}, 0),
        ({"trainer_version": 100, "actor_version": 100}, 0),
    ],
)
def test_leases_are_allowed_up_to_what_can_be_trained_in_time(state, expected):
    assert allowed(make_pacing(), **state) == expected


def test_no_more_groups_are_allowed_than_the_buffer_holds():
    pacing = make_pacing(max_groups=25)
    assert allowed(pacing) == 25
    assert allowed(pacing, outstanding=7, buffered=8, in_training=9) == 1


def test_groups_that_are_used_twice_are_leased_half_as_fast():
    # (3 + 1) // 2 = 2 batches, each of which lasts for two versions; one version behind: 3 // 2.
    pacing = make_pacing(max_staleness=3, max_uses=2)
    assert allowed(pacing) == 20
    assert allowed(pacing, trainer_version=7, actor_version=6) == 10
    # Three steps are left: one batch twice, and one more.
    assert allowed(make_pacing(max_staleness=9, max_uses=2, steps=3)) == 20
    with pytest.raises(ConfigError, match=r"needs training\.max_staleness of at least 2"):
        make_pacing(max_staleness=1, max_uses=3)


def test_outstanding_groups_count_with_their_largest_size():
    pacing = make_pacing(max_bytes=20_500)
    assert allowed(pacing) == 20
    # 20,500 - 3,600 = 16,900 bytes are free: 16 largest groups, of which 5 are on their way.
    assert allowed(pacing, outstanding=5, buffered=9, buffered_bytes=3600) == 11
    assert allowed(pacing, outstanding=5, buffered=9, buffered_bytes=20_500) == 0


def test_bounds_under_which_a_batch_never_fills_are_refused():
    with pytest.raises(ConfigError, match=r"buffer\.max_groups = 9 can never hold 10 groups"):
        make_pacing(max_groups=9)
    with pytest.raises(ConfigError, match=r"buffer\.max_bytes = 9999 may not hold 10 groups"):
        make_pacing(max_bytes=9999)
    assert allowed(make_pacing(max_groups=10, max_bytes=10_000)) == 10


def test_the_largest_group_is_what_the_buffer_counts_for_it():
    # 2 rollouts of 4 tokens (4 + 4 bytes each), a prompt of 2 tokens, 2 rewards: 64 + 8 + 16.
    assert largest_group_bytes(2, 2, 4, 2) == 88 == make_group(lengths=(4, 4)).size_bytes


@pytest.mark.parametrize(
    ("push_every", "changes", "needed"),
    [
        (3, {}, None),  # one batch more may be leased even at version 2: (2 + 1 - 2) * 10
        (4, {}, 3),
        (50, {}, 49),
        (50, {"steps": 3}, None),  # version 2 is the last one that is trained from
        (50, {"steps": 4}, 3),
        (3, {"max_staleness": 3, "max_uses": 2}, None),
        (4, {"max_staleness": 3, "max_uses": 2}, 4),
        (1, {"max_staleness": 0}, None),
        (2, {"max_staleness": 0}, 1),
    ],
)
def test_pushes_that_come_too_seldom_are_refused(push_every, changes, needed):
    if needed is None:
        make_pacing(push_every=push_every, **changes)
        return
    why = rf"push_every = {push_every} needs training\.max_staleness of at least {needed}:"
    with pytest.raises(ConfigError, match=why):
        make_pacing(push_every=push_every, **changes)
    make_pacing(push_every=push_every, **{**changes, "max_staleness": needed})


def test_every_third_version_is_pushed_and_the_last_one():
    pacing = make_pacing(push_every=3, steps=10)
    assert [v for v in range(1, 11) if pacing.is_pushed(v)] == [3, 6, 9, 10]
    assert all(make_pacing(steps=10).is_pushed(v) for v in range(1, 11))


def test_a_lag_leaves_room_for_its_own_batches_only():
    pacing = make_pacing(max_staleness=8, lag=1)
    assert allowed(pacing) == 20
    assert allowed(pacing, outstanding=3, buffered=10) == 7
    # An actor without the newest version gets nothing while the batches held back are complete.
    assert allowed(pacing, trainer_version=5, actor_version=4, buffered=10) == 0
    assert allowed(pacing, trainer_version=5, actor_version=5, buffered=10) == 10
    assert allowed(make_pacing(max_staleness=8, lag=0)) == 10


def test_a_lag_that_could_never_be_kept_is_refused():
    with pytest.raises(ConfigError, match=r"buffer\.lag = 3 is above training\.max_staleness = 2"):
        make_pacing(lag=3)
    with pytest.raises(ConfigError, match=r"needs buffer\.max_uses = 1"):
        make_pacing(lag=1, max_uses=2)
    with pytest.raises(ConfigError, match=r"buffer\.lag = 1 needs weights\.push_every = 1"):
        make_pacing(lag=1, push_every=2)
    with pytest.raises(ConfigError, match=r"can never hold 30 groups \(for buffer\.lag = 2\)"):
        make_pacing(lag=2, max_groups=29)
    with pytest.raises(ConfigError, match=r"max_bytes = 29999 may not hold 30 groups \(for"):
        make_pacing(lag=2, max_bytes=29_999)
    make_pacing(lag=2, max_groups=30, max_bytes=30_000)
    # A run of one step holds nothing back.
    make_pacing(lag=2, max_groups=10, steps=1)


# ---- Simulated runs ----------------------------------------------------------------------------


@dataclass
class Run:
    """Actors, buffer and trainer that take turns at random; every lease remembers its version."""

    pacing: Pacing
    num_actors: int
    random: Random
    in_order: bool
    sampling: Literal["fifo", "freshest"] = "fifo"
    failure_rate: float = 0.0
    resumes: int = 0
    """How often the learner is still to be killed."""
    journal: bool = True
    version: int = 0
    pushed: int = 0
    """Newest version that actors can have."""
    training: bool = False
    num_leased: int = 0
    outstanding: list[tuple[int, int]] = field(default_factory=list)
    """(lease, version that it began under)."""
    staleness: list[set[int]] = field(default_factory=list)
    """Of each batch."""

    def __post_init__(self) -> None:
        self.versions = [0] * self.num_actors
        self.buffer = self.make_buffer()

    def make_buffer(self) -> ReplayBuffer:
        return ReplayBuffer(
            max_groups=self.pacing.max_groups,
            max_bytes=self.pacing.max_bytes,
            max_staleness=self.pacing.max_staleness,
            sampling=self.sampling,
            max_uses=self.pacing.max_uses,
            lag=self.pacing.lag or 0,
        )

    def finish(self) -> None:
        """Until all steps are done; fails if that does not happen."""
        turns = (self.lease, self.arrive, self.follow, self.take, self.step)
        for _ in range(NEVER_STOPS):
            if self.version == self.pacing.steps:
                return
            if self.resumes and self.random.random() < 0.02:
                self.resume()
            self.random.choice(turns)()
            assert len(self.buffer) + len(self.outstanding) <= self.pacing.max_groups
        raise AssertionError(f"stuck at step {self.version} of {self.pacing.steps}")

    def lease(self) -> None:
        version = self.random.choice(self.versions)
        room = self.pacing.allowed(
            trainer_version=self.version,
            actor_version=version,
            outstanding=len(self.outstanding),
            buffered=len(self.buffer),
            in_training=self.buffer.in_training,
            buffered_bytes=self.buffer.size_bytes,
        )
        for _ in range(self.random.randint(0, room)):
            self.num_leased += 1
            self.outstanding.append((self.num_leased, version))

    def arrive(self) -> None:
        if self.outstanding:
            index = 0 if self.in_order else self.random.randrange(len(self.outstanding))
            lease, version = self.outstanding.pop(index)
            if self.random.random() >= self.failure_rate:
                self.buffer.add(make_group(lease, version=version), lease)

    def follow(self) -> None:
        self.versions[self.random.randrange(self.num_actors)] = self.pushed

    def take(self) -> None:
        if not self.training:
            batch = self.buffer.take(
                self.pacing.batch_groups,
                self.version,
                timeout_s=0,
                batches_after=self.pacing.steps - self.version - 1,
            )
            if batch is not None:
                self.training = True
                self.staleness.append(
                    {self.version - group.oldest_version for group in batch.groups}
                )

    def step(self) -> None:
        if self.training:
            self.training = False
            self.version += 1
            self.buffer.step_done()
            if self.pacing.is_pushed(self.version):
                self.pushed = self.version

    def resume(self) -> None:
        """The learner is killed, and resumed: where it was, or without a journal before that."""
        self.resumes -= 1
        if self.journal:
            self.step()
        else:
            self.training = False
            self.version = self.random.randint(0, self.version)
            self.buffer = self.make_buffer()
        self.outstanding.clear()
        self.pushed = self.version
        self.versions = [self.version] * self.num_actors


@st.composite
def runs(draw: st.DrawFn, /, max_uses: int = 1, lag: int | None = None, **values) -> Run:
    max_staleness = draw(st.integers(lag or max_uses - 1, 4))
    batch_groups = draw(st.integers(1, 5))
    steps = draw(st.integers(1, 12))
    held = min(1 + (lag or 0), steps) * batch_groups
    pacing = Pacing(
        max_staleness=max_staleness,
        batch_groups=batch_groups,
        steps=steps,
        max_groups=draw(st.integers(held, 6 * batch_groups)),
        max_bytes=draw(st.integers(held, 6 * batch_groups)) * GROUP_BYTES,
        group_bytes=GROUP_BYTES,
        max_uses=max_uses,
        lag=lag,
        push_every=1 if lag is not None else draw(st.integers(1, max_staleness + 2 - max_uses)),
    )
    return Run(pacing, draw(st.integers(1, 4)), Random(draw(st.integers(0, 2**32))), **values)


@settings(max_examples=100, deadline=None)
@given(runs(in_order=True))
def test_nothing_becomes_too_stale_when_groups_arrive_in_order(run):
    run.finish()
    books = run.buffer.counts
    assert books.evicted.total() == 0
    assert books.trained == run.pacing.steps * run.pacing.batch_groups
    # Nothing was generated in vain either.
    assert run.num_leased == books.trained
    assert run.buffer.largest_staleness <= run.pacing.max_staleness


@settings(max_examples=100, deadline=None)
@given(runs(in_order=False, failure_rate=0.2) | runs(in_order=False, sampling="freshest"))
def test_no_order_of_arrival_or_failure_stops_training_or_exceeds_the_limit(run):
    run.finish()
    assert run.buffer.counts.balanced
    assert run.buffer.counts.evicted["overflow"] == 0
    assert run.buffer.largest_staleness <= run.pacing.max_staleness


@settings(max_examples=100, deadline=None)
@given(runs(in_order=True, max_uses=2))
def test_groups_that_are_used_twice_do_not_make_those_behind_them_too_stale(run):
    run.finish()
    assert run.buffer.counts.evicted == {}


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 4).flatmap(lambda lag: runs(lag=lag, in_order=False, failure_rate=0.2)))
def test_with_a_lag_every_batch_is_exactly_so_stale(run):
    run.finish()
    # All batches that were sampled before the first step are from version 0.
    assert run.staleness == [{min(step, run.pacing.lag)} for step in range(run.pacing.steps)]
    assert run.buffer.counts.evicted.total() == 0
    # Nothing is left at the end.
    assert run.buffer.counts.trained == run.pacing.steps * run.pacing.batch_groups
    assert len(run.buffer) == 0


# ---- Pushes that are rare ----------------------------------------------------------------------


def unchecked(pacing: Pacing, push_every: int) -> Pacing:
    """As if the constructor refused nothing."""
    with pytest.raises(ConfigError, match="push_every"):
        replace(pacing, push_every=push_every)
    object.__setattr__(pacing, "push_every", push_every)
    return pacing


@settings(max_examples=200, deadline=None)
@given(st.data(), st.integers(1, 3), st.booleans())
def test_no_resume_stops_a_run_whose_pushes_are_not_too_rare(data, max_uses, journal):
    run = data.draw(
        runs(
            max_uses=max_uses,
            in_order=False,
            failure_rate=0.1,
            resumes=data.draw(st.integers(0, 3)),
            journal=journal,
        )
    )
    run.finish()
    assert run.buffer.counts.balanced
    assert run.buffer.largest_staleness <= run.pacing.max_staleness


@settings(max_examples=25, deadline=None)
@given(st.data(), st.integers(1, 3))
def test_no_run_survives_pushes_that_are_rarer_than_its_staleness(data, max_uses):
    run = data.draw(runs(max_uses=max_uses, in_order=True))
    limit = run.pacing.max_staleness + 1
    assume(run.pacing.steps > limit)
    run.pacing = unchecked(run.pacing, data.draw(st.integers(limit + 1, 20)))
    with pytest.raises(AssertionError, match="stuck"):
        run.finish()
    assert run.version <= limit


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 4).flatmap(lambda lag: runs(lag=lag, in_order=True)), st.integers(2, 5))
def test_with_a_lag_no_run_survives_rare_pushes(run, push_every):
    assume(run.pacing.steps > run.pacing.lag + 1)
    run.pacing = unchecked(run.pacing, push_every)
    with pytest.raises(AssertionError, match="stuck at step 1 "):
        run.finish()


def lazy_course(pacing: Pacing, resumed_at: int) -> int:
    """Version that training reaches if no group is leased before it is needed.

    Without a journal: what is buffered is lost when the run is resumed at ``resumed_at``.
    """
    version = pushed = uses_left = 0
    while version < pacing.steps:
        if version == resumed_at:
            pushed, uses_left = version, 0
        if not uses_left:
            if allowed(pacing, trainer_version=version, actor_version=pushed) < pacing.batch_groups:
                return version
            uses_left = pacing.max_uses
        uses_left -= 1
        version += 1
        if pacing.is_pushed(version):
            pushed = version
    return version


@pytest.mark.parametrize("max_uses", [1, 2, 3, 4])
def test_exactly_those_pushes_are_refused_after_which_a_run_may_stop(max_uses):
    """The bound is not too strict either: for all that it refuses there is a course that stops."""
    for max_staleness in range(max_uses - 1, 7):
        pacing = make_pacing(max_staleness=max_staleness, max_uses=max_uses)
        for push_every in range(1, 10):
            try:
                tried, refused = replace(pacing, push_every=push_every), False
            except ConfigError:
                tried, refused = unchecked(replace(pacing), push_every), True
            reached = min(lazy_course(tried, resumed_at) for resumed_at in range(30))
            assert (reached < pacing.steps) == refused, (max_staleness, push_every)


def test_groups_that_are_used_twice_may_stop_a_run_that_went_well_so_far():
    """Every second version is pushed, just when the batch is used up; a resume breaks the step."""
    pacing = unchecked(make_pacing(max_staleness=1, max_uses=2), push_every=2)
    assert lazy_course(pacing, resumed_at=0) == 100
    # A batch is used for versions 4 and 5. At 5 actors have 4: (1 + 1 - 1) // 2 = 0 batches.
    assert lazy_course(pacing, resumed_at=3) == 5
