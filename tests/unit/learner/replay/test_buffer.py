"""The replay buffer: its bounds, its books, and what it never returns."""

import time
from collections import Counter
from collections.abc import Sequence
from threading import Timer

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from learner.replay.buffer import ReplayBuffer, TrainingBatch
from protocol.groups import Group
from tests.unit.factories import make_group

ANY_HISTORY = settings(max_examples=150, deadline=None)


def make_buffer(**changes) -> ReplayBuffer:
    values = {"max_groups": 100, "max_bytes": 1 << 20, "max_staleness": 2}
    return ReplayBuffer(**(values | changes))


def filled(*groups: tuple[int, int], **changes) -> ReplayBuffer:
    """A buffer with groups of (lease, version), added in this order."""
    buffer = make_buffer(**changes)
    for lease, version in groups:
        add(buffer, make_group(lease, version=version))
    return buffer


def add(buffer: ReplayBuffer, group: Group) -> None:
    """With its lease for a prompt_index."""
    buffer.add(group, group.lease)


def leases(batch: TrainingBatch | None) -> list[int]:
    assert batch is not None
    return [group.lease for group in batch.groups]


# ---- Taking ------------------------------------------------------------------------------------


def test_fifo_takes_groups_in_the_order_of_their_leases():
    buffer = filled((3, 0), (1, 0), (4, 0), (2, 0))
    assert leases(buffer.take(3, version=0, timeout_s=0)) == [1, 2, 3]
    add(buffer, make_group(1))
    assert leases(buffer.take(2, version=0, timeout_s=0)) == [1, 4]


def test_freshest_takes_the_groups_with_the_youngest_oldest_token():
    buffer = filled((1, 1), (2, 3), (3, 2), (4, 3), sampling="freshest")
    assert leases(buffer.take(3, version=3, timeout_s=0)) == [2, 4, 3]


def test_nothing_is_taken_before_a_batch_is_complete():
    buffer = filled((1, 0), (2, 0))
    assert buffer.take(3, version=0, timeout_s=0) is None
    assert len(buffer) == 2
    assert buffer.counts.trained == 0


def test_take_gives_up_after_its_timeout():
    started = time.monotonic()
    assert make_buffer().take(1, version=0, timeout_s=0.05) is None
    assert 0.05 <= time.monotonic() - started < 5


def test_a_group_that_arrives_completes_the_batch_that_is_waited_for():
    buffer = filled((1, 0))
    Timer(0.05, add, [buffer, make_group(2)]).start()
    assert leases(buffer.take(2, version=0, timeout_s=10)) == [1, 2]


def test_wake_ends_the_wait_for_a_batch():
    buffer = make_buffer()
    Timer(0.05, buffer.wake).start()
    started = time.monotonic()
    assert buffer.take(1, version=0, timeout_s=2) is None
    assert time.monotonic() - started < 1.5


def test_what_was_taken_is_in_training_until_the_step_is_done():
    buffer = filled((1, 0), (2, 0), (3, 0))
    buffer.take(2, version=0, timeout_s=0)
    assert (len(buffer), buffer.in_training) == (1, 2)
    buffer.step_done()
    assert (len(buffer), buffer.in_training) == (1, 0)


def test_a_group_is_used_max_uses_times_and_no_more():
    buffer = filled((1, 0), (2, 0), max_uses=2)
    assert leases(buffer.take(1, version=0, timeout_s=0)) == [1]
    assert (buffer.counts.trained, buffer.in_training, len(buffer)) == (0, 0, 2)
    assert leases(buffer.take(1, version=0, timeout_s=0)) == [1]
    assert (buffer.counts.trained, buffer.in_training, len(buffer)) == (1, 1, 1)
    assert leases(buffer.take(1, version=0, timeout_s=0)) == [2]


def test_with_a_lag_the_batches_behind_are_waited_for():
    buffer = filled((1, 0), (2, 0), (3, 0), (4, 0), (5, 0), lag=2)
    assert buffer.take(2, version=0, timeout_s=0, batches_after=9) is None
    add(buffer, make_group(6))
    assert leases(buffer.take(2, version=0, timeout_s=0, batches_after=9)) == [1, 2]
    # Of the last batches of a run fewer are held back.
    assert buffer.take(2, version=1, timeout_s=0, batches_after=2) is None
    assert leases(buffer.take(2, version=1, timeout_s=0, batches_after=1)) == [3, 4]
    assert leases(buffer.take(2, version=2, timeout_s=0, batches_after=0)) == [5, 6]


# ---- Evicting ----------------------------------------------------------------------------------


def even(groups: Sequence[Group]) -> list[bool]:
    """Groups of even leases have no signal."""
    return [group.lease % 2 == 0 for group in groups]


def test_groups_without_signal_are_left_out_and_counted():
    buffer = filled((1, 0), (2, 0), (3, 0), (5, 0))
    batch = buffer.take(2, version=0, timeout_s=0, lack_signal=even)
    assert batch is not None
    assert leases(batch) == [1, 3]
    assert batch.num_refilled == 1
    assert batch.evicted == ((2, "no_signal"),)
    assert set(batch.finished) == {1, 2, 3}
    assert buffer.counts.evicted == {"no_signal": 1}
    assert buffer.counts.evicted_tokens == {"no_signal": 5}
    assert buffer.counts.balanced


def test_only_groups_whose_turn_it_is_are_asked_for_a_signal():
    buffer = filled((1, 0), (3, 0), (4, 0), (5, 0))
    assert leases(buffer.take(2, version=0, timeout_s=0, lack_signal=even)) == [1, 3]
    # In the next step other rewards may count.
    assert leases(buffer.take(2, version=0, timeout_s=0, lack_signal=None)) == [4, 5]


def test_room_that_is_made_in_the_wait_is_told_at_once():
    buffer = filled((1, 0), (2, 0))
    assert buffer.take(2, version=0, timeout_s=60, lack_signal=even) is None
    assert (len(buffer), buffer.num_refilled) == (1, 1)
    add(buffer, make_group(3))
    batch = buffer.take(2, version=0, timeout_s=60, lack_signal=even)
    assert batch is not None
    assert leases(batch) == [1, 3]
    assert (batch.num_refilled, buffer.num_refilled) == (1, 0)


def test_what_was_left_out_for_a_batch_to_come_is_not_in_the_state_of_the_last_one():
    buffer = filled((1, 0), (2, 0))
    assert buffer.take(2, version=0, timeout_s=0, lack_signal=even) is None
    assert buffer.counts.evicted == {"no_signal": 1}
    state = buffer.state()
    assert (state.evicted, state.evicted_tokens, state.ended_tokens) == ({}, {}, 0)


def test_groups_that_became_too_stale_in_the_queue_are_evicted_and_counted():
    buffer = filled((1, 0), (2, 1), (3, 1))
    # At version 3 with a limit of 2 the oldest version allowed is 1.
    assert leases(buffer.take(2, version=3, timeout_s=0)) == [2, 3]
    assert buffer.counts.evicted == {"stale": 1}
    assert buffer.counts.evicted_tokens == {"stale": 5}
    assert buffer.largest_staleness == 2


def test_staleness_counts_from_the_oldest_token_of_the_group():
    group = make_group(version=4)
    # Of two rollouts, one began under version 1.
    object.__setattr__(group.rollouts[1], "spans", ((0, 1), (1, 4)))
    buffer = make_buffer()
    add(buffer, group)
    assert buffer.take(1, version=4, timeout_s=0) is None
    assert buffer.counts.evicted == {"stale": 1}


def test_a_full_buffer_makes_room_by_evicting_the_oldest_lease():
    buffer = filled((2, 0), (1, 0), (3, 0), max_groups=2)
    assert buffer.counts.evicted == {"overflow": 1}
    assert buffer.counts.evicted_tokens == {"overflow": 5}
    assert leases(buffer.take(2, version=0, timeout_s=0)) == [2, 3]


def test_a_group_that_is_larger_than_the_buffer_does_not_stay():
    buffer = make_buffer(max_bytes=100)
    add(buffer, make_group(1, lengths=(8, 8)))  # 16 * 8 + 8 + 16 bytes
    assert (len(buffer), buffer.size_bytes) == (0, 0)
    assert buffer.counts.evicted == {"overflow": 1}


def test_a_group_that_was_trained_once_and_then_evicted_counts_as_trained():
    buffer = filled((1, 0), max_uses=2)
    buffer.take(1, version=0, timeout_s=0)
    assert buffer.take(1, version=3, timeout_s=0) is None
    assert buffer.counts.trained == 1
    assert buffer.counts.evicted.total() == buffer.counts.evicted_tokens.total() == 0
    assert buffer.counts.balanced


@pytest.mark.parametrize(
    "change", [{"max_groups": 0}, {"max_bytes": 0}, {"max_uses": 0}, {"max_staleness": -1}]
)
def test_bounds_that_hold_nothing_are_refused(change):
    with pytest.raises(ValueError, match="must be positive"):
        make_buffer(**change)


# ---- Guarantees --------------------------------------------------------------------------------

ADD = st.tuples(st.just("add"), st.integers(0, 3), st.integers(1, 6))
TAKE = st.tuples(st.just("take"), st.integers(1, 3), st.integers(0, 1))
SETTINGS = st.fixed_dictionaries(
    {
        "max_groups": st.integers(1, 6),
        "max_bytes": st.integers(50, 500),
        "max_staleness": st.integers(0, 2),
        "max_uses": st.integers(1, 3),
        "sampling": st.sampled_from(["fifo", "freshest"]),
    }
)


@ANY_HISTORY
@given(SETTINGS, st.lists(ADD | TAKE, max_size=40), st.randoms(use_true_random=False))
def test_guarantees_1_3_4_and_5_hold_for_any_history(values, history, random):
    buffer = ReplayBuffer(**values)
    version, added = 0, {}
    uses: Counter[int] = Counter()
    numbers = list(range(len(history)))
    random.shuffle(numbers)
    for kind, *arguments in history:
        if kind == "add":
            lag, length = arguments
            group = make_group(numbers.pop(), version=max(version - lag, 0), lengths=(length, 1))
            added[group.lease] = group
            add(buffer, group)
        else:
            num_groups, step = arguments
            taken = buffer.take(num_groups, version, timeout_s=0)
            for group in taken.groups if taken else []:
                uses[group.lease] += 1
                assert version - group.oldest_version <= values["max_staleness"]  # guarantee 5
            assert taken is None or len({*leases(taken)}) == num_groups
            version += step
        check_books(buffer, added, uses, values)


def check_books(buffer, added, uses, values):
    books = buffer.counts
    kept = [entry.group for entry in buffer._entries]
    assert max(uses.values(), default=0) <= values["max_uses"]  # guarantee 1
    assert len(buffer) <= values["max_groups"]  # guarantee 4
    assert buffer.size_bytes == sum(group.size_bytes for group in kept) <= values["max_bytes"]
    assert books.balanced  # guarantee 3
    assert (books.accepted, books.buffered) == (len(added), len(kept))
    unused = [g for lease, g in added.items() if not uses[lease] and g not in kept]
    assert books.evicted.total() == len(unused)
    assert books.evicted_tokens.total() == sum(group.num_tokens for group in unused)
    assert books.evicted_tokens.keys() == books.evicted.keys()
