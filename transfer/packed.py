import torch

from protocol.weights import TensorSpec


def view(packed: torch.Tensor, spec: TensorSpec) -> torch.Tensor:
    raw = packed[spec.offset : spec.offset + spec.num_bytes]
    dtype = getattr(torch, spec.dtype)
    if spec.offset % dtype.itemsize:
        raw = raw.clone()
    return raw.view(dtype).view(spec.shape)
