"""What is here: the GPU, and the packages that other parts need."""

import platform
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import torch

from benchmarks.gpu.report import Report

PACKAGES = ("transformers", "triton", "flash-attn", "flash-attn-4", "pyzmq", "msgspec", "datasets")


def report(row: Report, _: str, dry: bool) -> None:
    """Name them."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    memory = torch.cuda.get_device_properties(0).total_memory / 2**30 if gpu else 0.0
    row(
        "",
        gpu=gpu,
        memory=f"{memory:.0f} GiB",
        python=platform.python_version(),
        torch=torch.__version__,
        cuda=torch.version.cuda,
        nccl=nccl_version(),
        varlen=find_spec("torch.nn.attention.varlen") is not None,
    )
    row("packages", **{name: installed(name) for name in PACKAGES})


def nccl_version() -> str:
    if not torch.cuda.is_available():
        return "-"
    return ".".join(map(str, torch.cuda.nccl.version()))


def installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "-"
