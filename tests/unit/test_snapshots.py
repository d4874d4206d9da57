"""Packed weights: what a snapshot holds, and which of them are kept."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from learner.snapshots import STILL_PULLED_S, SnapshotStore, pack
from protocol.weights import chunks, layout, packed_digests, total_bytes, whole_digest
from tests.unit.factories import FakeClock, make_model, make_snapshot


def make_store() -> tuple[SnapshotStore, FakeClock]:
    clock = FakeClock()
    return SnapshotStore(make_snapshot(0), clock), clock


def kept(store: SnapshotStore, versions: int = 10) -> list[int]:
    """Versions that can be read. (Reading marks them as pulled.)"""
    return [version for version in range(versions) if store.read(version, 0, 1) is not None]


def unpack(packed: torch.Tensor, specs: list) -> dict[str, torch.Tensor]:
    return {
        s.name: packed[s.offset : s.offset + s.num_bytes]
        .view(getattr(torch, s.dtype))
        .view(s.shape)
        for s in specs
    }


# ---- Packing -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_parameter_lies_where_the_layout_says(dtype):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2))
    model.register_parameter("scalar", torch.nn.Parameter(torch.tensor(2.5)))
    specs = layout((n, dtype, tuple(p.shape)) for n, p in model.named_parameters())
    snapshot = pack(4, model, specs)
    assert (snapshot.version, len(snapshot.packed)) == (4, total_bytes(specs))
    found = unpack(snapshot.packed, specs)
    assert {*found} == {name for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        assert torch.equal(found[name], parameter.to(getattr(torch, dtype)))
    digests = packed_digests(snapshot.packed.numpy().data, specs)
    assert snapshot.digest == whole_digest(digests, specs)


def test_a_snapshot_does_not_change_with_the_model():
    model, specs = make_model(1.0)
    snapshot = pack(0, model, specs)
    before = snapshot.packed.clone()
    with torch.no_grad():
        model.weight.fill_(2.0)
    assert torch.equal(snapshot.packed, before)
    assert pack(0, model, specs).digest != snapshot.digest


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 7), st.integers(0, 31))
def test_the_digest_changes_with_any_bit_of_any_value(index, bit):
    model, specs = make_model(1.0)
    before = pack(0, model, specs)
    assert pack(1, model, specs).digest == before.digest
    flat = before.packed.clone()
    flat[4 * index + bit // 8] ^= 1 << bit % 8
    assert whole_digest(packed_digests(flat.numpy().data, specs), specs) != before.digest


def test_a_tensor_that_is_not_contiguous_is_packed_in_the_order_of_its_shape():
    model = torch.nn.Module()
    model.weight = torch.nn.Parameter(torch.arange(6.0).view(2, 3).t())
    specs = layout([("weight", "float32", (3, 2))])
    packed = pack(0, model, specs).packed
    assert packed.view(torch.float32).tolist() == [0, 3, 1, 4, 2, 5]


def test_tied_parameters_are_packed_once_under_their_first_name():
    model = torch.nn.Sequential(torch.nn.Embedding(5, 3), torch.nn.Linear(3, 5, bias=False))
    model[1].weight = model[0].weight
    specs = layout((n, "float32", tuple(p.shape)) for n, p in model.named_parameters())
    assert [spec.name for spec in specs] == ["0.weight"]
    assert len(pack(0, model, specs).packed) == 5 * 3 * 4


def test_an_announcement_describes_the_snapshot():
    snapshot = make_snapshot(3)
    weights = snapshot.announcement()
    # A linear layer of 3 x 2 weights and 2 biases.
    assert (weights.version, weights.num_bytes, weights.epoch) == (3, 8 * 4, None)
    assert weights.digest == snapshot.digest


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
