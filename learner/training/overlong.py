"""Completions that reached `sampling.max_tokens` and were cut off."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch

from protocol.groups import Group

Overlong = Literal["keep", "mask"]


def cut_off(groups: Sequence[Group]) -> torch.Tensor:
    """Whether each rollout was cut off, bool [P, G]."""
    return torch.from_numpy(
        np.array([[rollout.finish == "length" for rollout in group.rollouts] for group in groups])
    )


def trained_on(cut_PG: torch.Tensor, overlong: Overlong) -> torch.Tensor:
    """Whether the loss takes the tokens of each rollout, bool [P, G], by which were `cut_off`.

    What is left out has no part in the loss, its denominator or the metrics of its tokens. It keeps
    its part in the statistics of rewards, so that advantages are those of the whole group: DAPO's
    overlong filtering, arXiv 2503.14476, 3.4.
    """
    return ~cut_PG if overlong == "mask" else torch.ones_like(cut_PG)
