"""Packed weights: which snapshots are kept, and what is known of those that are gone."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from learner.weights import snapshots
from learner.weights.snapshots import STILL_PULLED_S, SnapshotStore
from protocol.weights import CHUNK_BYTES, DIGEST_BYTES, item_bytes, layout, num_chunks
from tests.unit.factories import FakeClock, make_snapshot


def make_store() -> tuple[SnapshotStore, FakeClock]:
    clock = FakeClock()
    return SnapshotStore(make_snapshot(0), clock), clock


def kept(store: SnapshotStore, versions: int = 10) -> list[int]:
    """Versions that can be pulled. (Asking marks them as being pulled.)"""
    return [version for version in range(versions) if store.pulled(version) is not None]


@pytest.mark.parametrize(
    ("num_bytes", "chunks"),
    [(0, 0), (1, 1), (CHUNK_BYTES, 1), (CHUNK_BYTES + 1, 2), (5 * CHUNK_BYTES, 5)],
)
def test_the_last_chunk_may_be_shorter(num_bytes, chunks):
    assert num_chunks(num_bytes) == chunks


def test_differences_are_of_words_of_the_smallest_type():
    assert item_bytes(layout([("a", "float32", ()), ("b", "bfloat16", ())])) == 2
    assert item_bytes(layout([("a", "float32", ())])) == 4


@pytest.mark.parametrize(
    "manifest", [[("w", "int8", (2,))], [("w", "float64", ())], [("w", "float32", (2, -1))]]
)
def test_a_manifest_that_cannot_be_sent_is_refused(manifest):
    with pytest.raises(ValueError, match=r"^w: "):
        layout(manifest)


# ---- Keeping -----------------------------------------------------------------------------------


def test_the_newest_snapshot_is_the_latest_and_others_go():
    store, _ = make_store()
    for version in (1, 2):
        store.publish(make_snapshot(version))
    assert store.latest.version == 2
    assert kept(store) == [2]


def test_a_version_that_is_being_pulled_survives_the_next_one():
    store, clock = make_store()
    store.pulled(0)
    clock.advance(STILL_PULLED_S - 1)
    store.publish(make_snapshot(1))
    assert kept(store) == [0, 1]


def test_of_two_versions_that_are_being_pulled_the_older_survives():
    store, _ = make_store()
    store.pulled(0)
    store.publish(make_snapshot(1))
    store.pulled(1)
    store.publish(make_snapshot(2))
    assert kept(store) == [0, 2]


def test_a_version_that_nobody_pulls_any_more_goes():
    store, clock = make_store()
    store.pulled(0)
    clock.advance(STILL_PULLED_S)
    store.publish(make_snapshot(1))
    assert kept(store) == [1]


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 12)), max_size=20))
def test_at_most_two_snapshots_are_kept_whoever_pulls_what(history):
    store, clock = make_store()
    for back, seconds in history:
        newest = store.latest.version
        store.pulled(newest - back)
        clock.advance(seconds)
        store.publish(make_snapshot(newest + 1))
        assert len(store._kept) <= 2
        assert store.latest.version in store._kept
        assert store._pulled_at.keys() <= store._kept.keys()


def test_digests_are_known_of_versions_that_are_gone():
    store, _ = make_store()
    for version in (1, 2):
        store.publish(make_snapshot(version))
    assert [store.digest(v) for v in range(3)] == [make_snapshot(v).digest for v in range(3)]
    assert store.digest(3) is None


WRONG_BIAS = make_snapshot(0).digests[:DIGEST_BYTES] + bytes(DIGEST_BYTES)
"""The weight's digest is that of version 0."""


def test_a_wrong_parameter_is_named_for_the_last_few_versions():
    store, _ = make_store()
    last = 2 * snapshots._REMEMBERED_TENSOR_DIGESTS
    for version in range(1, last + 1):
        store.publish(make_snapshot(version))
    known = [v for v in range(last + 2) if store.wrong_tensors(v, WRONG_BIAS)]
    assert known == [*range(last + 1 - snapshots._REMEMBERED_TENSOR_DIGESTS, last + 1)]
    assert store.wrong_tensors(last, store.latest.digests) == []
    # Not as many digests as parameters.
    assert store.wrong_tensors(last, b"") == []


def test_a_wrong_parameter_is_named_for_a_version_as_long_as_it_can_be_pulled():
    store, _ = make_store()
    for version in range(1, 2 * snapshots._REMEMBERED_TENSOR_DIGESTS):
        store.pulled(0)
        store.publish(make_snapshot(version))
    assert store.wrong_tensors(0, WRONG_BIAS) == ["bias"]
