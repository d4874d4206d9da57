"""Tensors over packed weights, which are laid out as `protocol.weights` describes."""

import torch

from protocol.weights import TensorSpec


def view(packed: torch.Tensor, spec: TensorSpec) -> torch.Tensor:
    """The parameter ``spec`` in uint8 [num_bytes] ``packed``, in its own type and shape.

    It shares ``packed``'s memory. It is a copy only where it is not aligned for its type, which
    happens among mixed types.
    """
    raw = packed[spec.offset : spec.offset + spec.num_bytes]
    dtype: torch.dtype = getattr(torch, spec.dtype)
    # torch wants the offset in the storage aligned, vector instructions the address.
    if raw.storage_offset() % dtype.itemsize or raw.data_ptr() % dtype.itemsize:
        raw = raw.clone()
    return raw.view(dtype).view(spec.shape)
