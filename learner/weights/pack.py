"""The weights of a version, copied out of the model in training into memory that is used again.

    take() ─► pack: gather, cast, copy, hash ─► Snapshot ─► sent, pulled, mapped, checked ─┐
       ▲                                                                                   │
       └─────────────────── nothing refers to any byte of it any more ◄────────────────────┘

New memory is several times slower to write than memory that was written before, and a snapshot is
as large as the model. So its memory goes back to where it came from, once the last view of it is
gone: a frame that ZeroMQ still sends, the check of a new actor, a broadcast that was given up.
"""

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple, cast

import numpy as np
import numpy.typing as npt
import torch
from torch.distributed.tensor import DTensor

from learner.weights.snapshots import Snapshot
from protocol.weights import TensorSpec, tensor_digest, whole_digest
from transfer.shared_memory import SharedMemory, when_gone

MAX_FREE = 1
"""More than one is never packed at a time; what else was out, for those that are behind, is given
back to the system."""


class Memory(NamedTuple):
    """Where one snapshot lies."""

    packed: torch.Tensor
    """uint8 [num_bytes]. Whatever is made from it without a copy keeps the memory from its next
    use: slices, other types, NumPy arrays, memoryviews, storages."""
    path: str
    """File by which other processes of this user map the same pages, while this one lives. They are
    not kept for those: what they read after the snapshot has gone may be of another version."""


class MemoryPool:
    """Memory for snapshots of one size; any thread may use it.

    At most `MAX_FREE` are kept beside those in use.
    """

    def __init__(self, num_bytes: int, *, pinned: bool = False) -> None:
        """``pinned`` memory is what a GPU copies to at full speed; it needs CUDA."""
        self._num_bytes = num_bytes
        self._pinned = pinned
        # Memory is put back wherever its last reference goes, by garbage collection also in the
        # middle of `take`. A lock would be taken twice then; a deque needs none.
        self._free: deque[SharedMemory] = deque(maxlen=MAX_FREE)

    def take(self) -> Memory:
        """Memory with any content, which returns by itself when nothing refers to it any more."""
        try:
            memory = self._free.pop()
        except IndexError:
            memory = SharedMemory(self._num_bytes, pinned=self._pinned)
        # A new array over it. The tensor made of that, and with it every view of the tensor, holds
        # on to the array; nothing else does.
        array: npt.NDArray[np.uint8] = memory.tensor.numpy()
        when_gone(array, self._free.append, memory)
        return Memory(torch.from_numpy(array), memory.path)


def pack(
    version: int, model: torch.nn.Module, specs: Sequence[TensorSpec], pool: MemoryPool
) -> Snapshot:
    """Copy the model's parameters, cast to the types of ``specs``, into memory of ``pool``.

    Of a sharded model every other rank calls `help_to_pack` meanwhile, with the same ``specs``.
    """
    packed, path = pool.take()
    digests = pack_into(packed, model, specs)
    return Snapshot(version, packed, digests, whole_digest(digests, specs), specs, path)


def pack_into(packed: torch.Tensor, model: torch.nn.Module, specs: Sequence[TensorSpec]) -> bytes:
    """`pack` into given memory, uint8 [num_bytes]; returns the digests of all parameters."""
    data = packed.numpy().data
    digests = [b""] * len(specs)

    def digest(index: int) -> None:
        spec = specs[index]
        digests[index] = tensor_digest(data[spec.offset : spec.offset + spec.num_bytes])

    parameters = dict(model.named_parameters())
    on_their_way: list[tuple[int, torch.cuda.Event]] = []
    for index, spec in enumerate(specs):
        copied = _copy_whole(parameters[spec.name], packed, spec)
        if copied is not None:
            on_their_way.append((index, copied))
        else:
            # While it is in the processor's cache.
            digest(index)
    for index, copied in on_their_way:
        copied.synchronize()
        digest(index)
    return b"".join(digests)


def _copy_whole(
    parameter: torch.Tensor, packed: torch.Tensor, spec: TensorSpec
) -> torch.cuda.Event | None:
    """Copy a parameter; returns what tells when it has arrived, None where it has already.

    A function of its own: nothing holds the whole parameter while the next one is gathered.
    """
    tensor = _whole(parameter, spec)
    _write(tensor, packed, spec)
    return torch.cuda.current_stream(tensor.device).record_event() if tensor.is_cuda else None


def help_to_pack(model: torch.nn.Module, specs: Sequence[TensorSpec]) -> None:
    """Take part in `pack` of another rank: the parameters are gathered one after the other.

    Whoever does so holds one at a time, and while it is put together, twice.
    """
    parameters = dict(model.named_parameters())
    for spec in specs:
        _whole(parameters[spec.name], spec)


def _whole(parameter: torch.Tensor, spec: TensorSpec) -> torch.Tensor:
    """All of a parameter; of one that is sharded, once all ranks have asked for it."""
    tensor = parameter.detach()
    if isinstance(tensor, DTensor):
        # Cast first: less has to travel.
        tensor = cast(DTensor, tensor.to(_dtype(spec))).full_tensor()
    assert tuple(tensor.shape) == spec.shape, f"{spec.name}: {tuple(tensor.shape)} is not its shape"
    return tensor


def _write(tensor: torch.Tensor, packed: torch.Tensor, spec: TensorSpec) -> None:
    raw = packed[spec.offset : spec.offset + spec.num_bytes]
    dtype = _dtype(spec)
    if spec.offset % dtype.itemsize:
        # Among mixed types; a view needs the alignment of its type.
        raw.copy_(tensor.to(dtype).contiguous().view(-1).view(torch.uint8))
    else:
        raw.view(dtype).view(spec.shape).copy_(tensor, non_blocking=True)


def _dtype(spec: TensorSpec) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, spec.dtype)
    return dtype
