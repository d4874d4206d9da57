"""GDPO as pure functions of tensors: estimators, losses, corrections and diagnostics.

Nothing here reads a file, opens a socket, keeps state or knows of a process group, so every
result depends on its arguments alone.
"""

from gdpo.advantages import Advantages, compute_advantages
from gdpo.conditions import Condition
from gdpo.corrections import CORRECTIONS
from gdpo.diagnostics import reward_diagnostics
from gdpo.estimators import ESTIMATORS
from gdpo.logprobs import token_entropy, token_logprobs, token_logprobs_and_entropy
from gdpo.losses import AGGREGATIONS, PolicyLoss, loss_denominator, policy_loss
from gdpo.metrics import TokenRecord, effective_sample_size, metrics_by_staleness
from gdpo.penalties import KL_PENALTIES, kl_penalty
from gdpo.ratios import interpolated_proximal

__all__ = [
    "AGGREGATIONS",
    "CORRECTIONS",
    "ESTIMATORS",
    "KL_PENALTIES",
    "Advantages",
    "Condition",
    "PolicyLoss",
    "TokenRecord",
    "compute_advantages",
    "effective_sample_size",
    "interpolated_proximal",
    "kl_penalty",
    "loss_denominator",
    "metrics_by_staleness",
    "policy_loss",
    "reward_diagnostics",
    "token_entropy",
    "token_logprobs",
    "token_logprobs_and_entropy",
]
