"""GDPO as pure functions of tensors: estimators, losses, corrections and diagnostics.

Nothing here reads a file, opens a socket, keeps state or knows of a process group, so every
result depends on its arguments alone.

    rewards ──► compute_advantages ──► advantages ──┐
    hidden ───► head_logprobs ───────► logprobs ────┴─► policy_loss(correction=Icepop(...)) ──► loss
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
from gdpo.heads import Head, LossGradient, head_logprobs, head_logprobs_and_entropy
from gdpo.logprobs import token_entropy, token_logprobs, token_logprobs_and_entropy
from gdpo.losses import (
    AGGREGATIONS,
    PolicyLoss,
    loss_denominator,
    packed_policy_loss,
    policy_loss,
)
from gdpo.metrics import (
    TokenRecord,
    effective_sample_size,
    join_records,
    metrics_by_staleness,
    token_metrics,
)
from gdpo.objectives import Correction
from gdpo.penalties import KL_PENALTIES, kl_penalty
from gdpo.ratios import Tokens, interpolated_proximal
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
    "Head",
    "Icepop",
    "KlTerm",
    "LossGradient",
    "M2po",
    "PolicyLoss",
    "Ppo",
    "RewardCondition",
    "Tis",
    "TisSequence",
    "TokenRecord",
    "Tokens",
    "Uncorrected",
    "compute_advantages",
    "effective_sample_size",
    "head_logprobs",
    "head_logprobs_and_entropy",
    "interpolated_proximal",
    "join_records",
    "kl_penalty",
    "loss_denominator",
    "metrics_by_staleness",
    "packed_policy_loss",
    "policy_loss",
    "reward_diagnostics",
    "token_entropy",
    "token_logprobs",
    "token_logprobs_and_entropy",
    "token_metrics",
]
