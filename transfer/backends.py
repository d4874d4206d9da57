"""The choice of a backend for broadcasts, and what this process has for one."""

import torch
from torch.distributed import is_nccl_available

from protocol.errors import ConfigError
from transfer.collective import Backend, BackendName
from transfer.gloo import GlooBackend
from transfer.nccl import NcclBackend


def create_backend(name: BackendName, *, own_address: str, device: torch.device) -> Backend:
    """The backend ``name``, whose sockets are bound to this machine's ``own_address``.

    ``device`` is the GPU for NCCL; gloo works in CPU memory, whatever it is. Raises `ConfigError`.
    """
    if name == "gloo":
        return GlooBackend(own_address)
    if not is_nccl_available():
        raise ConfigError(
            'weights.backend = "nccl" needs a torch that is built with NCCL, and this one '
            f'({torch.__version__}) is not: install a CUDA build, or set it to "gloo"'
        )
    if device.type != "cuda" or not torch.cuda.is_available():
        raise ConfigError(
            f'weights.backend = "nccl" needs a GPU, and this process has {device} and sees '
            f'{torch.cuda.device_count()} GPUs: set it to "gloo"'
        )
    return NcclBackend(own_address, device)


def nccl_available() -> bool:
    """Whether this process could broadcast by NCCL."""
    return is_nccl_available() and torch.cuda.is_available()


def gpu_identity(device: torch.device) -> str:
    """The UUID of the GPU ``device``, the same in every process; empty for the CPU.

    NCCL refuses two ranks on one GPU.
    """
    if device.type != "cuda":
        return ""
    return str(torch.cuda.get_device_properties(device).uuid)
