"""Collectives by NCCL, in the same words as those by gloo in tests/integration/test_collective.py.

On two GPUs: ``pytest -m multi_gpu tests/gpu``. On one, with an NCCL of 2.30 or newer:
``NCCL_MULTI_RANK_GPU_ENABLE=1 NCCL_NVLS_ENABLE=0 NCCL_MAX_CTAS=8 pytest -m gpu tests/gpu``.
"""

import os
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from tests.collectives import BODIES, Crew, Setting
from transfer.backends import gpu_identity, nccl_available

SHARING_SINCE = (2, 30)
TWO_GPUS = Setting(
    backend="nccl",
    devices=("cuda:0", "cuda:1"),
    # What a sender can leave in NCCL's own buffers is 4 MiB per channel, of which there are 32.
    bucket_bytes=256 << 20,
    # Making a communicator takes seconds where CUDA has to start first.
    deadline_s=10.0,
    released_by_abort=True,
)
ONE_GPU = replace(TWO_GPUS, devices=("cuda:0", "cuda:0"))

pytestmark = pytest.mark.timeout(180)


def require_nccl() -> None:
    if not nccl_available():
        pytest.skip("no GPU, or a torch without NCCL")


@pytest.fixture
def crew(request: pytest.FixtureRequest) -> Iterator[Crew]:
    crew = Crew(request.param)
    yield crew
    crew.close()


@pytest.fixture
def two_gpus() -> None:
    require_nccl()
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU only")


@pytest.fixture
def shared_gpu() -> None:
    require_nccl()
    version = torch.distributed.distributed_c10d.ProcessGroupNCCL.get_runtime_nccl_version()
    if version < SHARING_SINCE:
        pytest.skip(f"NCCL {'.'.join(map(str, version))} refuses two ranks on one GPU")
    if os.environ.get("NCCL_MULTI_RANK_GPU_ENABLE") != "1":
        pytest.skip("NCCL_MULTI_RANK_GPU_ENABLE is not set to 1")


@pytest.mark.multi_gpu
@pytest.mark.parametrize("crew", [TWO_GPUS], ids=["two_gpus"], indirect=True)
@pytest.mark.parametrize("body", BODIES, ids=lambda body: body.__name__)
def test_of_two_members_on_two_gpus(two_gpus: None, crew: Crew, body):
    body(crew)


@pytest.mark.gpu
@pytest.mark.parametrize("crew", [ONE_GPU], ids=["one_gpu"], indirect=True)
@pytest.mark.parametrize("body", BODIES, ids=lambda body: body.__name__)
def test_of_two_members_on_one_gpu(shared_gpu: None, crew: Crew, body):
    body(crew)


@pytest.mark.multi_gpu
def test_two_gpus_have_two_identities(two_gpus: None):
    first, second = (gpu_identity(torch.device("cuda", index)) for index in (0, 1))
    assert first
    assert second
    assert first != second
    assert gpu_identity(torch.device("cuda", 0)) == first
