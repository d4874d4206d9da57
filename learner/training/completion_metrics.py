"""Figures of a batch's completions, by the names that TRL's GRPOTrainer has for them."""

from collections.abc import Mapping, Sequence

from learner.training.overlong import cut_off
from protocol.groups import Group


def completion_metrics(
    groups: Sequence[Group], diagnostics: Mapping[str, float]
) -> dict[str, float]:
    """Describe the completions of a batch, whose `gdpo.reward_diagnostics` are given.

    completions/mean_length     tokens, as are min_length and max_length
    completions/clipped_ratio   share that was cut off at the longest completion there may be
    frac_reward_zero_std        share of groups without signal: no reward varies, or those that do
                                cancel each other out or have weight 0
    """
    lengths = [len(rollout.tokens) for group in groups for rollout in group.rollouts]
    without_signal = diagnostics["groups/dead"] + diagnostics["groups/collapsed"]
    return {
        "completions/mean_length": sum(lengths) / len(lengths),
        "completions/min_length": float(min(lengths)),
        "completions/max_length": float(max(lengths)),
        "completions/clipped_ratio": cut_off(groups).double().mean().item(),
        "frac_reward_zero_std": without_signal / len(groups),
    }
