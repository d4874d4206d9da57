"""Weights of a model that is sharded over processes: real ones, with FSDP2 over gloo.

(A file of its own because every process imports it.)
"""

import os
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

from learner.weights.pack import MemoryPool, help_to_pack, pack
from protocol.weights import TensorSpec, layout, total_bytes

WORLD = 2
SHARD_DEADLINE = timedelta(seconds=20)
LAYERS, WIDTH = 32, 1024
"""Of the model whose memory is measured: 4 MiB a layer, 128 MiB in all."""


def specs_of(model: torch.nn.Module, dtype: str = "float32") -> list[TensorSpec]:
    return layout((name, dtype, tuple(p.shape)) for name, p in model.named_parameters())


def test_a_sharded_model_is_packed_like_the_whole_one_holding_one_parameter_at_a_time(
    tmp_path, monkeypatch
):
    # Else the C library keeps a dozen parameters' worth of freed memory for itself.
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", str(1 << 17))
    # The errors of the processes are raised here.
    torch.multiprocessing.spawn(_be_rank, (tmp_path,), nprocs=WORLD)


def _be_rank(rank: int, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group(
        "gloo",
        init_method=f"file://{tmp_path / 'rendezvous'}",
        rank=rank,
        world_size=WORLD,
        timeout=SHARD_DEADLINE,
    )
    pack_odd_model(rank)
    measure_memory(rank)
    dist.destroy_process_group()


def odd_model() -> torch.nn.Sequential:
    """Sizes that two ranks cannot share evenly, one that leaves a rank without any, one tied."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Embedding(7, 5),
        torch.nn.Linear(5, 3),
        torch.nn.Linear(3, 1),
        torch.nn.Linear(5, 7),
    )
    model[3].weight = model[0].weight
    return model


def pack_odd_model(rank: int) -> None:
    for dtype in ("float32", "bfloat16"):
        model = odd_model()
        specs = specs_of(model, dtype)
        expected = pack(0, model, specs, MemoryPool(total_bytes(specs)))
        for layer in (model[1], model[2]):
            fully_shard(layer)
        fully_shard(model)
        assert specs_of(model, dtype) == specs
        pool = MemoryPool(total_bytes(specs))
        # Every rank keeps a version in turn.
        for version in range(2 * WORLD):
            if rank != version % WORLD:
                help_to_pack(model, specs)
            else:
                snapshot = pack(version, model, specs, pool)
                assert torch.equal(snapshot.packed, expected.packed)
                assert (snapshot.version, snapshot.digests) == (version, expected.digests)


def measure_memory(rank: int) -> None:
    layers = (torch.nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS))
    model = torch.nn.Sequential(*layers)
    specs = specs_of(model)
    for layer in model:
        fully_shard(layer)
    fully_shard(model)
    pool = MemoryPool(total_bytes(specs))

    pool.take().packed.zero_()  # So that the bytes that are kept are not counted.
    for keep in (rank == 0, False):
        call = partial(pack, 0, model, specs, pool) if keep else partial(help_to_pack, model, specs)
        # What pack holds itself it holds every time; gloo's thread may let go of what it gathered
        # a moment after the next parameter is on its way.
        extra = min(extra_memory(call) for _ in range(3))
        # As it was received, and put together.
        assert extra < 2.5 * specs[0].num_bytes, f"{extra / 2**20:.0f} MiB, keep={keep}"


def extra_memory(call: Callable[[], object]) -> int:
    """Bytes by which the resident memory of this process grew at the most during ``call``."""
    Path("/proc/self/clear_refs").write_text("5")  # Resets the peak to what is resident now.
    before = _resident("VmRSS")
    call()
    return _resident("VmHWM") - before


def _resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    [kilobytes] = [line.split()[1] for line in lines if line.startswith(f"{name}:")]
    return int(kilobytes) << 10
