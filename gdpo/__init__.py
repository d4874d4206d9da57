"""GDPO as pure functions of tensors: estimators, losses, corrections and diagnostics.

Nothing here reads a file, opens a socket, keeps state or knows of a process group, so every
result depends on its arguments alone.
"""

from gdpo.advantages import Advantages, compute_advantages
from gdpo.conditions import Condition
from gdpo.corrections import CORRECTIONS
from gdpo.diagnostics import reward_diagnostics
from gdpo.estimators import ESTIMATORS
from gdpo.logprobs import token_logprobs
from gdpo.losses import AGGREGATIONS, PolicyLoss, loss_denominator, policy_loss
from gdpo.metrics import effective_sample_size

__all__ = [
    "AGGREGATIONS",
    "CORRECTIONS",
    "ESTIMATORS",
    "Advantages",
    "Condition",
    "PolicyLoss",
    "compute_advantages",
    "effective_sample_size",
    "loss_denominator",
    "policy_loss",
    "reward_diagnostics",
    "token_logprobs",
]
