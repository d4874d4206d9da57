"""Statistics over the tokens that a mask selects.

Shapes: B sequences, T token positions. All results are 0-dim tensors on the input's device, so
that reading them, not computing them, is what waits for the device.
"""

import torch
from torch import Tensor


def effective_sample_size(weights_BT: Tensor, mask: Tensor) -> Tensor:
    """Share of the samples that the importance weights leave in effect, from 1/n to 1.

        ESS = (sum w)^2 / (n sum w^2),  over the n tokens of the mask

    Source: Kish, "Survey Sampling", 1965. With no token at all it is 1: nothing is weighted
    unevenly, and 0 would raise an alarm. Weights must not be negative.

    Raises ValueError where the shapes differ.
    """
    if weights_BT.shape != mask.shape:
        raise ValueError(
            f"mask has shape {tuple(mask.shape)}, weights {tuple(weights_BT.shape)}: "
            "give a mask with one entry for each weight"
        )
    mask_BT = mask.bool()
    if mask_BT.numel() == 0:
        return torch.ones((), device=weights_BT.device)
    kept_BT = torch.where(mask_BT, weights_BT.detach(), 0.0).float()
    # Relative to the largest, because squares of large weights overflow float32.
    relative_BT = kept_BT / kept_BT.amax().clamp(min=torch.finfo(torch.float32).tiny)
    count = mask_BT.sum()
    # The largest weight alone makes the sum of squares 1, unless every weight is 0.
    sum_of_squares = relative_BT.square().sum().clamp(min=1)
    ess = relative_BT.sum().square() / (count.clamp(min=1) * sum_of_squares)
    return torch.where(count > 0, ess, 1.0)


def masked_mean(values_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Mean over the tokens of the mask; 0 when there are none."""
    return torch.where(mask_BT, values_BT, 0.0).sum() / mask_BT.sum().clamp(min=1)


def masked_max(values_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Largest of non-negative values over the tokens of the mask; 0 when there are none."""
    return torch.where(mask_BT, values_BT, 0.0).amax()
