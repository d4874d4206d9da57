"""A training batch as tensors, for the other ranks: the groups as on the wire, and advantages.

    numbers     int64    [1 + F]  P, then the bytes of each of the F frames
    advantages  float32  [P, G]
    frames      uint8             header and payloads of each group, as actors send them

Shapes: P groups, G rollouts of each.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from protocol.framing import decode_to_learner, encode
from protocol.groups import NUM_PAYLOADS, Group, GroupLimits, pack_group, unpack_group
from protocol.messages import GroupHeader


def to_tensors(groups: Sequence[Group], advantages_PG: Tensor) -> list[Tensor]:
    """Tensors that, one after the other as bytes, `from_bytes` makes the same batch of."""
    frames = [frame for group in groups for frame in encode(*pack_group(group))]
    numbers = [len(groups), *(len(frame) for frame in frames)]
    content = torch.from_numpy(np.frombuffer(b"".join(frames), dtype=np.uint8).copy())
    return [torch.tensor(numbers), advantages_PG.float(), content]


def from_bytes(payload: Tensor, limits: GroupLimits) -> tuple[list[Group], Tensor]:
    """Groups and advantages [P, G] of a batch, uint8 [bytes]."""
    data = payload.numpy().data
    num_groups = int(payload[:8].view(torch.int64))
    frames_each = 1 + NUM_PAYLOADS
    start = 8 * (1 + num_groups * frames_each)
    sizes = payload[8:start].view(torch.int64).tolist()
    stop = start + 4 * num_groups * limits.num_rollouts
    advantages_PG = payload[start:stop].view(torch.float32).view(num_groups, -1)
    frames = []
    for size in sizes:
        frames.append(data[stop : stop + size])
        stop += size
    groups = []
    for first in range(0, len(frames), frames_each):
        header, payloads = decode_to_learner(frames[first : first + frames_each])
        assert isinstance(header, GroupHeader)
        groups.append(unpack_group(header, payloads, limits))
    return groups, advantages_PG
