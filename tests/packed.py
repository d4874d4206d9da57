"""Packed weights in tests: their digests, and memory that holds them."""

import torch

from protocol.weights import TensorSpec, tensor_digest
from transfer.shared_memory import SharedMemory


def packed_digests(packed: bytes | memoryview | torch.Tensor, specs: list[TensorSpec]) -> bytes:
    """`tensor_digest` of every parameter in packed weights, one after the other."""
    view = packed.numpy().data if isinstance(packed, torch.Tensor) else memoryview(packed)
    return b"".join(tensor_digest(view[s.offset : s.offset + s.num_bytes]) for s in specs)


def shared(packed: torch.Tensor) -> SharedMemory:
    """A copy of packed weights, for an engine to load."""
    memory = SharedMemory(len(packed))
    memory.tensor.copy_(packed)
    return memory
