"""Ranks that train together over NCCL, in the same words as those over gloo.

On two GPUs: ``pytest -m multi_gpu tests/gpu``. On one, with an NCCL of 2.30 or newer:
``NCCL_MULTI_RANK_GPU_ENABLE=1 NCCL_NVLS_ENABLE=0 NCCL_MAX_CTAS=8 pytest -m gpu tests/gpu``.
"""

import os
from functools import partial
from pathlib import Path

import pytest
import torch

from tests.process.test_ranks import be_rank
from transfer.backends import nccl_available

pytestmark = pytest.mark.timeout(240)
SIZE = 2


@pytest.mark.multi_gpu
def test_steps_on_two_gpus_are_those_of_one(recipe: Path, tmp_path: Path):
    if torch.cuda.device_count() < SIZE:
        pytest.skip("no two GPUs")
    train(recipe, tmp_path, num_gpus=SIZE)


@pytest.mark.gpu
def test_steps_of_two_ranks_on_one_gpu_are_those_of_one(recipe: Path, tmp_path: Path):
    if not nccl_available() or os.environ.get("NCCL_MULTI_RANK_GPU_ENABLE") != "1":
        pytest.skip("no GPU that two ranks of NCCL may share")
    train(recipe, tmp_path, num_gpus=1)


def train(recipe: Path, tmp_path: Path, num_gpus: int) -> None:
    body = partial(be_gpu_rank, num_gpus=num_gpus)
    torch.multiprocessing.spawn(body, (recipe, tmp_path), nprocs=SIZE)
    print((tmp_path / "table").read_text())


def be_gpu_rank(rank: int, recipe: Path, tmp_path: Path, num_gpus: int) -> None:
    torch.cuda.set_device(rank % num_gpus)
    be_rank(rank, SIZE, recipe, tmp_path, "cpu:gloo,cuda:nccl")
