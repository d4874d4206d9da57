"""Packed weights: which snapshots are kept, and what is known of those that are gone."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from learner import snapshots
from learner.snapshots import STILL_PULLED_S, SnapshotStore
from protocol.weights import DIGEST_BYTES, chunks, layout
from tests.unit.factories import FakeClock, make_snapshot


def make_store() -> tuple[SnapshotStore, FakeClock]:
    clock = FakeClock()
    return SnapshotStore(make_snapshot(0), clock), clock


def kept(store: SnapshotStore, versions: int = 10) -> list[int]:
    """Versions that can be read. (Reading marks them as pulled.)"""
    return [version for version in range(versions) if store.read(version, 0, 1) is not None]


@given(st.integers(0, 1000), st.integers(1, 100))
def test_chunks_cover_everything_once(num_bytes, size):
    covered = [
        b for offset, length in chunks(num_bytes, size) for b in range(offset, offset + length)
    ]
    assert covered == list(range(num_bytes))


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
    store.read(0, 0, 8)
    clock.advance(STILL_PULLED_S - 1)
    store.publish(make_snapshot(1))
    assert kept(store) == [0, 1]


def test_of_two_versions_that_are_being_pulled_the_older_survives():
    store, _ = make_store()
    store.read(0, 0, 8)
    store.publish(make_snapshot(1))
    store.read(1, 0, 8)
    store.publish(make_snapshot(2))
    assert kept(store) == [0, 2]


def test_a_version_that_nobody_pulls_any_more_goes():
    store, clock = make_store()
    store.read(0, 0, 8)
    clock.advance(STILL_PULLED_S)
    store.publish(make_snapshot(1))
    assert kept(store) == [1]


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 12)), max_size=20))
def test_at_most_two_snapshots_are_kept_whoever_pulls_what(history):
    store, clock = make_store()
    for back, seconds in history:
        newest = store.latest.version
        store.read(newest - back, 0, 8)
        clock.advance(seconds)
        store.publish(make_snapshot(newest + 1))
        assert len(store._kept) <= 2
        assert store.latest.version in store._kept
        assert store._pulled_at.keys() <= store._kept.keys()


def test_bytes_are_read_only_from_inside_a_snapshot():
    store, _ = make_store()
    whole = bytes(store.latest.packed.numpy())
    assert bytes(store.read(0, 4, 28)) == whole[4:32]
    for offset, num_bytes in ((0, 33), (32, 1), (-1, 4), (0, 0), (0, -4), (2**64, 1), (1, 2**64)):
        assert store.read(0, offset, num_bytes) is None
    assert store.read(1, 0, 4) is None


def test_digests_are_known_of_versions_that_are_gone():
    store, _ = make_store()
    for version in (1, 2):
        store.publish(make_snapshot(version))
    assert [store.digest(v) for v in range(3)] == [make_snapshot(v).digest for v in range(3)]
    assert store.digest(3) is None


def test_digests_of_every_parameter_are_known_of_the_last_few_versions():
    store, _ = make_store()
    last = 2 * snapshots._REMEMBERED_TENSOR_DIGESTS
    for version in range(1, last + 1):
        store.publish(make_snapshot(version))
    known = [version for version in range(last + 2) if store.digests(version) is not None]
    assert known == [*range(last + 1 - snapshots._REMEMBERED_TENSOR_DIGESTS, last + 1)]
    assert store.digests(last) == store.latest.digests
    # Weights and biases.
    assert len(store.latest.digests) == 2 * DIGEST_BYTES


def test_digests_of_every_parameter_are_known_of_a_version_as_long_as_it_can_be_pulled():
    store, _ = make_store()
    for version in range(1, 2 * snapshots._REMEMBERED_TENSOR_DIGESTS):
        store.read(0, 0, 8)
        store.publish(make_snapshot(version))
    assert store.digests(0) == make_snapshot(0).digests
