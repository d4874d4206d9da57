"""The batch step: the advantages of a whole training batch to a std of 1 (eq. 6).

Shapes: P prompts, G rollouts of one prompt.
"""

from collections.abc import Callable

import torch
from torch import Tensor

AllReduceSum = Callable[[Tensor], Tensor]


def alone(values: Tensor) -> Tensor:
    """The sum over ranks where there is only one."""
    return values


def batch_std(
    group_sum_PG: Tensor, counted_PG: Tensor, all_reduce_sum: AllReduceSum = alone
) -> float:
    """Sample std of A_sum over the counted sequences of all ranks, each counted once (1 or 0).

        std = sqrt(sum A_sum^2 / (n - 1))

    Source: GDPO, arXiv 2601.05242, eq. 6. The first of the two passes that a variance takes over
    ranks is left out: it would find the mean, which is 0 because every group's A_sum adds up to 0
    (and is taken as 0 where gd2po dropped rollouts), so that adding up squares loses no digits.
    `all_reduce_sum` gets a float64 tensor of two numbers, once, and returns its sum over ranks.
    """
    moments = torch.stack([counted_PG.sum(), (group_sum_PG * group_sum_PG).sum()])
    count, sum_of_squares = all_reduce_sum(moments).tolist()
    return float((sum_of_squares / max(count - 1, 1)) ** 0.5)


def smoothed_std(current: float, previous: float | None, decay: float) -> float | None:
    """Exponential moving average of the batch std: decay * previous + (1 - decay) * current.

    A batch without any signal has std 0 and says nothing about the scale of the others: it leaves
    the average alone. None until there was a signal.
    """
    if current == 0:
        return previous
    return current if previous is None else decay * previous + (1 - decay) * current
