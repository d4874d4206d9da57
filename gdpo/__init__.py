"""GDPO as pure functions of tensors: estimators, losses, corrections and diagnostics.

Nothing here reads a file, opens a socket, keeps state or knows of a process group, so every
result depends on its arguments alone.

    rewards ──► compute_advantages ──► advantages ──┐
    logits ───► token_logprobs ──────► logprobs ────┴─► policy_loss(correction=Icepop(...)) ──► loss
"""

from gdpo.advantages import Advantages, compute_advantages
from gdpo.conditions import RewardCondition
from gdpo.corrections import (
    CORRECTIONS,
    Cispo,
    DecoupledPpo,
    DppoTv,
    Gspo,
    Icepop,
    M2po,
    Ppo,
    Tis,
    TisSequence,
    Uncorrected,
)
from gdpo.diagnostics import reward_diagnostics
from gdpo.estimators import ESTIMATORS
from gdpo.logprobs import token_entropy, token_logprobs, token_logprobs_and_entropy
from gdpo.losses import AGGREGATIONS, PolicyLoss, loss_denominator, policy_loss
from gdpo.metrics import TokenRecord, effective_sample_size, metrics_by_staleness
from gdpo.objectives import Correction
from gdpo.penalties import KL_PENALTIES, kl_penalty
from gdpo.ratios import interpolated_proximal
from gdpo.terms import EntropyTerm, EssScaling, KlTerm

__all__ = [
    "AGGREGATIONS",
    "CORRECTIONS",
    "ESTIMATORS",
    "KL_PENALTIES",
    "Advantages",
    "Cispo",
    "Correction",
    "DecoupledPpo",
    "DppoTv",
    "EntropyTerm",
    "EssScaling",
    "Gspo",
    "Icepop",
    "KlTerm",
    "M2po",
    "PolicyLoss",
    "Ppo",
    "RewardCondition",
    "Tis",
    "TisSequence",
    "TokenRecord",
    "Uncorrected",
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
