"""From the groups of a training batch to padded tensors.

Shapes: P groups, G rollouts each, K rewards; B = P*G sequences, T predicted positions. Column t
of every [B, T] tensor belongs to the prediction of ``tokens_BL[:, t + 1]``.
"""

from dataclasses import dataclass, fields
from typing import Self

import numpy as np
import torch

from protocol.groups import Group


@dataclass(frozen=True, slots=True, eq=False)
class PaddedBatch:
    """Sequences of a training batch, padded on the right."""

    tokens_BL: torch.Tensor
    """int64 [B, T + 1]: prompt, completion, padding."""
    mask_BT: torch.Tensor
    """bool: the predicted token was sampled by the policy."""
    behaviour_BT: torch.Tensor
    """float32: log-probability of the token under the policy that sampled it."""
    versions_BT: torch.Tensor
    """int32: version of that policy."""
    lengths_B: torch.Tensor
    """int64: tokens of prompt and completion."""

    def select(self, rows: torch.Tensor) -> Self:
        """Some of the sequences, without padding that none of them needs."""
        part = type(self)(*(getattr(self, field.name)[rows] for field in fields(self)))
        length = int(part.lengths_B.max())
        return type(self)(
            tokens_BL=part.tokens_BL[:, :length],
            mask_BT=part.mask_BT[:, : length - 1],
            behaviour_BT=part.behaviour_BT[:, : length - 1],
            versions_BT=part.versions_BT[:, : length - 1],
            lengths_B=part.lengths_B,
        )


def collate(groups: list[Group], device: torch.device) -> PaddedBatch:
    """Lay out all sequences as tensors, group by group."""
    sequences = [(group.prompt_tokens, rollout) for group in groups for rollout in group.rollouts]
    lengths = np.array([len(prompt) + len(rollout.tokens) for prompt, rollout in sequences])
    shape = (len(sequences), int(lengths.max()))
    tokens = np.zeros(shape, dtype=np.int64)
    mask = np.zeros(shape, dtype=bool)
    behaviour = np.zeros(shape, dtype=np.float32)
    versions = np.full(shape, -1, dtype=np.int32)
    for row, (prompt, rollout) in enumerate(sequences):
        start, stop = len(prompt), lengths[row]
        tokens[row, :start] = prompt
        tokens[row, start:stop] = rollout.tokens
        mask[row, start:stop] = True
        behaviour[row, start:stop] = rollout.logprobs
        versions[row, start:stop] = rollout.token_versions
    return PaddedBatch(
        tokens_BL=torch.from_numpy(tokens).to(device),
        mask_BT=torch.from_numpy(mask[:, 1:].copy()).to(device),
        behaviour_BT=torch.from_numpy(behaviour[:, 1:].copy()).to(device),
        versions_BT=torch.from_numpy(versions[:, 1:].copy()).to(device),
        lengths_B=torch.from_numpy(lengths).to(device),
    )


def scores(groups: list[Group]) -> torch.Tensor:
    """Raw scores, float32 [P, G, K]; NaN = does not apply."""
    return torch.from_numpy(np.stack([group.scores for group in groups]))
