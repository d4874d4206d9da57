"""Packed weights: what lies in them, and memory that is used again, but not too soon."""

import gc
import mmap
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
import zmq
from hypothesis import given, settings
from hypothesis import strategies as st

from learner.weights.pack import MAX_FREE, Memory, MemoryPool, pack, pack_into
from learner.weights.snapshots import SnapshotStore
from protocol.weights import TensorSpec, layout, total_bytes, whole_digest
from tests.packed import packed_digests
from tests.unit.factories import make_model, make_snapshot, pack_alone


def specs_of(model: torch.nn.Module, dtype: str = "float32") -> list[TensorSpec]:
    return layout((name, dtype, tuple(p.shape)) for name, p in model.named_parameters())


def unpack(packed: torch.Tensor, specs: list[TensorSpec]) -> dict[str, torch.Tensor]:
    return {
        s.name: packed[s.offset : s.offset + s.num_bytes]
        .clone()
        .view(getattr(torch, s.dtype))
        .view(s.shape)
        for s in specs
    }


# ---- What is packed ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("own_dtype", [torch.float32, torch.bfloat16])
def test_every_parameter_lies_where_the_layout_says(dtype, own_dtype):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2)).to(own_dtype)
    model.register_parameter("scalar", torch.nn.Parameter(torch.tensor(2.5)))
    model.register_parameter("empty", torch.nn.Parameter(torch.empty(0, 4)))
    specs = specs_of(model, dtype)
    snapshot = pack_alone(4, model, specs)
    assert (snapshot.version, len(snapshot.packed)) == (4, total_bytes(specs))
    found = unpack(snapshot.packed, specs)
    assert {*found} == {name for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        assert torch.equal(found[name], parameter.to(getattr(torch, dtype)))


def test_types_may_be_mixed_also_where_none_is_aligned():
    model = torch.nn.Module()
    for name, size in (("a", 3), ("b", 2), ("c", 1), ("d", 5)):
        model.register_parameter(name, torch.nn.Parameter(torch.arange(size) + 0.5))
    types = {"a": "bfloat16", "b": "float32", "c": "float16", "d": "float32"}
    specs = layout((n, types[n], tuple(p.shape)) for n, p in model.named_parameters())
    # a: 6 bytes; b at 6; c at 14; d at 16.
    assert [spec.offset for spec in specs] == [0, 6, 14, 16]
    found = unpack(pack_alone(0, model, specs).packed, specs)
    assert all(torch.equal(found[n].float(), p) for n, p in model.named_parameters())


def test_a_snapshot_carries_the_digests_of_its_bytes():
    model = torch.nn.Linear(3, 2)
    specs = specs_of(model, "bfloat16")
    snapshot = pack_alone(0, model, specs)
    assert snapshot.digests == packed_digests(snapshot.packed, specs)
    assert snapshot.digest == whole_digest(snapshot.digests, specs)


def test_a_snapshot_does_not_change_with_the_model():
    model, specs = make_model(1.0)
    snapshot = pack_alone(0, model, specs)
    before = snapshot.packed.clone()
    with torch.no_grad():
        cast(torch.Tensor, model.weight).fill_(2.0)
    assert torch.equal(snapshot.packed, before)
    assert pack_alone(0, model, specs).digest != snapshot.digest


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 7), st.integers(0, 31))
def test_the_digest_changes_with_any_bit_of_any_value(index, bit):
    model, specs = make_model(1.0)
    before = pack_alone(0, model, specs)
    assert pack_alone(1, model, specs).digest == before.digest
    flat = before.packed.clone()
    flat[4 * index + bit // 8] ^= 1 << bit % 8
    assert whole_digest(packed_digests(flat, specs), specs) != before.digest


def test_a_tensor_that_is_not_contiguous_is_packed_in_the_order_of_its_shape():
    model = torch.nn.Module()
    model.weight = torch.nn.Parameter(torch.arange(6.0).view(2, 3).t())
    packed = pack_alone(0, model, specs_of(model)).packed
    assert packed.view(torch.float32).tolist() == [0, 3, 1, 4, 2, 5]


def test_tied_parameters_are_packed_once_under_their_first_name():
    model = torch.nn.Sequential(torch.nn.Embedding(5, 3), torch.nn.Linear(3, 5, bias=False))
    model[1].weight = model[0].weight
    specs = specs_of(model)
    assert [spec.name for spec in specs] == ["0.weight"]
    assert len(pack_alone(0, model, specs).packed) == 5 * 3 * 4


def test_a_parameter_of_another_shape_is_not_spread_over_its_place():
    model = torch.nn.Module()
    model.weight = torch.nn.Parameter(torch.ones(1))
    with pytest.raises(AssertionError, match=r"^weight: \(1,\) is not its shape"):
        pack_alone(0, model, layout([("weight", "float32", (3,))]))


def test_weights_are_packed_into_given_memory_too():
    model, specs = make_model(3.0)
    memory = torch.zeros(total_bytes(specs), dtype=torch.uint8)
    assert pack_into(memory, model, specs) == make_snapshot(3).digests
    assert torch.equal(memory, make_snapshot(3).packed)


def test_an_announcement_describes_the_snapshot():
    snapshot = make_snapshot(3)
    weights = snapshot.announcement("stream")
    # A linear layer of 3 x 2 weights and 2 biases.
    assert (weights.version, weights.num_bytes, weights.epoch) == (3, 8 * 4, None)
    assert weights.digest == snapshot.digest


@pytest.mark.gpu
def test_a_model_on_a_gpu_is_packed_like_one_in_memory():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Embedding(1000, 64), torch.nn.Linear(64, 64))
    specs = specs_of(model, "bfloat16")
    expected = pack_alone(0, model, specs)
    pool = MemoryPool(total_bytes(specs), pinned=True)
    model.cuda()
    for version in range(3):
        snapshot = pack(version, model, specs, pool)
        assert snapshot.packed.is_pinned()
        assert snapshot.digests == expected.digests
        assert torch.equal(snapshot.packed, expected.packed)


# ---- Memory that is used again -----------------------------------------------------------------

SIZE = 1 << 16


@pytest.fixture
def pool() -> MemoryPool:
    return MemoryPool(SIZE)


def inode(memory: Memory) -> int:
    """Addresses and descriptors of memory that is gone are given to the next."""
    return Path(memory.path).stat().st_ino


def taken_when_free(pool: MemoryPool) -> int:
    """What is taken once anything is free: what was sent goes by a thread of pyzmq's own."""
    deadline = time.monotonic() + 10
    while not pool._free:
        assert time.monotonic() < deadline, "the memory never came back"
        time.sleep(0.001)
    return inode(pool.take())


def test_memory_that_nothing_refers_to_is_used_again(pool):
    first = pool.take()
    itself = inode(first)
    second = pool.take()
    assert inode(second) != itself
    del first
    assert inode(pool.take()) == itself


VIEWS: dict[str, Callable[[torch.Tensor], object]] = {
    "the tensor": lambda t: t,
    "slice": lambda t: t[10:20],
    "other type": lambda t: t[:8].view(torch.float32),
    "shape of a parameter": lambda t: t[16:32].view(torch.float32).view(2, 2),
    "transposed": lambda t: t.view(2, -1).t()[3:],
    "parameter": lambda t: torch.nn.Parameter(t[:4].view(torch.float32)),
    "detached": lambda t: t.detach(),
    "storage": lambda t: t.untyped_storage(),
    "array": lambda t: t.numpy(),
    "slice of an array": lambda t: t.numpy()[5:6],
    "array of another type": lambda t: t.numpy().view(np.float16)[1:].reshape(-1, 1),
    "memoryview": lambda t: t.numpy().data,
    "slice of a memoryview": lambda t: t[100:200].numpy().data[3:4],
    "tensor of a memoryview": lambda t: torch.frombuffer(t.numpy().data, dtype=torch.uint8)[1:],
    "array by DLPack": lambda t: np.from_dlpack(t),
    "tensor by DLPack": lambda t: torch.from_dlpack(t)[1:],
    "tensor of an array of it": lambda t: torch.from_numpy(t.numpy()[2:]),
    "frame": lambda t: zmq.Frame(t.numpy().data, copy=False),
    "buffer of a frame": lambda t: zmq.Frame(t.numpy().data, copy=False).buffer[7:8],
}


@pytest.mark.parametrize("name", VIEWS)
def test_memory_is_not_used_again_while_any_view_of_it_lives(pool, name):
    memory = pool.take()
    itself, view = inode(memory), VIEWS[name](memory.packed)
    del memory
    others = [pool.take() for _ in range(3)]
    assert itself not in map(inode, others)
    del view
    assert taken_when_free(pool) == itself


def test_memory_is_not_used_again_while_a_frame_of_it_waits_to_be_sent(pool):
    """In the queue to a slow actor, long after everybody else has forgotten the snapshot."""
    with zmq.Context() as context, context.socket(zmq.PUSH) as sender:
        sender.connect("inproc://actor")
        memory = pool.take()
        memory.packed.fill_(7)
        itself = inode(memory)
        sender.send(memory.packed.numpy().data, copy=False)
        del memory
        others = [pool.take() for _ in range(3)]
        assert itself not in map(inode, others)
        with context.socket(zmq.PULL) as receiver:
            receiver.bind("inproc://actor")
            assert receiver.recv() == bytes([7]) * SIZE
        assert taken_when_free(pool) == itself


def test_a_snapshot_that_is_pulled_keeps_its_memory_after_it_has_left_the_store():
    model, specs = make_model(0.0)
    pool = MemoryPool(total_bytes(specs))
    store = SnapshotStore(pack(0, model, specs, pool))
    pulled = store.pulled(0)
    assert pulled is not None
    chunk = pulled.packed[4:12].numpy().data
    content = bytes(chunk)
    store._pulled_at.clear()
    with torch.no_grad():
        for version in range(1, 5):
            for parameter in model.parameters():
                parameter.fill_(float(version))
            store.publish(pack(version, model, specs, pool))
    assert store.pulled(0) is None
    assert bytes(chunk) == content


def test_packing_again_and_again_uses_two_memories():
    model, specs = make_model(1.0)
    pool = MemoryPool(total_bytes(specs))
    store = SnapshotStore(pack(0, model, specs, pool))
    used = {Path(store.latest.path).stat().st_ino}
    for version in range(1, 10):
        store.publish(pack(version, model, specs, pool))
        used.add(Path(store.latest.path).stat().st_ino)
    assert len(used) == 2


def still_there(inodes: set[int]) -> tuple[int, int]:
    """How many of these memories this process has mapped, and how many it has open."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    mapped = {int(line.split()[4]) for line in lines if "gdpo-weights" in line}
    links = [link for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    opened = {link.stat().st_ino for link in links if "gdpo-weights" in str(link.readlink())}
    return len(inodes & mapped), len(inodes & opened)


def test_no_more_is_kept_free_than_is_packed_at_a_time(pool):
    taken = [pool.take() for _ in range(5)]
    all_of_them = {inode(memory) for memory in taken}
    assert still_there(all_of_them) == (5, 5)
    del taken
    assert still_there(all_of_them) == (MAX_FREE, MAX_FREE)


def test_a_pool_that_is_gone_leaves_its_memory_to_those_who_have_it():
    memory = MemoryPool(SIZE).take()
    memory.packed.fill_(3)
    itself, view = {inode(memory)}, memory.packed[5:]
    del memory
    assert int(view.sum()) == 3 * (SIZE - 5)
    del view
    assert still_there(itself) == (0, 0)


def test_another_mapping_of_the_path_shows_the_same_bytes(pool):
    memory = pool.take()
    memory.packed.copy_(torch.arange(SIZE) % 251)
    with Path(memory.path).open("rb") as file:
        other = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    assert other[:] == bytes(memory.packed.numpy())
    memory.packed[17] = 255
    assert other[17] == 255


def test_threads_never_get_memory_that_another_still_sees(pool):
    """Each writes its own number, keeps views of some kind for a while, and finds it unchanged."""
    wrong: list[str] = []
    ends = time.monotonic() + 0.5

    def work(number: int) -> None:
        rng = random.Random(number)
        held: list[tuple[int, memoryview]] = []
        while time.monotonic() < ends and not wrong:
            tensor, content = pool.take().packed, rng.randrange(256)
            tensor.fill_(content)
            offset = rng.randrange(SIZE - 1)
            held.append((content, tensor[offset:].numpy().data))
            if rng.random() < 0.3:
                _Cycle(tensor)
            del tensor
            rng.shuffle(held)
            while len(held) > rng.randrange(4):
                expected, data = held.pop()
                if {*data[:: max(1, len(data) // 50)]} != {expected}:
                    wrong.append(f"thread {number}: not all {expected}")

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(pool._free) <= MAX_FREE


class _Cycle:
    """Goes by garbage collection, wherever that happens."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor, self.itself = tensor, self


def test_memory_that_only_garbage_refers_to_is_used_again_once_that_is_collected(pool):
    memory = pool.take()
    itself = inode(memory)
    _Cycle(memory.packed)
    del memory
    gc.collect()
    assert inode(pool.take()) == itself


def test_garbage_collection_at_any_moment_of_taking_does_not_block(pool):
    """It puts memory back on the very thread that is taking some."""
    threshold = gc.get_threshold()
    try:
        for allocations in range(40):
            gc.disable()
            _Cycle(pool.take().packed)
            gc.set_threshold(gc.get_count()[0] + allocations)
            gc.enable()
            pool.take()
    finally:
        gc.set_threshold(*threshold)
        gc.enable()
