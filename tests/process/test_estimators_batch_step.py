"""The batch step of the estimators over two processes that really are two."""

import multiprocessing
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from gdpo import compute_advantages
from tests.unit.gdpo.test_estimators_batch_step import WITH_BATCH_STEP, some_rewards


def rank_main(rank: int, folder: str) -> None:
    """One of two processes: rank 0 holds three prompts, rank 1 four."""
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )

    def all_reduce_sum(values: Tensor) -> Tensor:
        dist.all_reduce(values)
        return values

    found = {
        name: compute_advantages(
            some_rewards().split([3, 4])[rank], estimator=name, all_reduce_sum=all_reduce_sum
        ).advantages
        for name in WITH_BATCH_STEP
    }
    save_file(found, f"{folder}/rank{rank}.safetensors")
    dist.destroy_process_group()


@pytest.mark.timeout(60)
def test_two_gloo_ranks_compute_what_one_does(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    ranks = [context.Process(target=rank_main, args=(r, str(tmp_path))) for r in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(timeout=45)
        process.kill()
    assert [process.exitcode for process in ranks] == [0, 0]
    found = [load_file(tmp_path / f"rank{r}.safetensors") for r in range(2)]
    for name in WITH_BATCH_STEP:
        whole = compute_advantages(some_rewards(), estimator=name).advantages
        halves = torch.cat([found[0][name], found[1][name]])
        torch.testing.assert_close(halves, whole, rtol=1e-6, atol=0)
