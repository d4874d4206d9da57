"""The corrections: how a policy learns from tokens that an older policy sampled.

Shapes: N tokens that the policy chose. mu, pi_prox, pi and their ratios w, r, rho are those of
`gdpo.ratios`. A = advantage.

A correction has its limits as fields, and turns `gdpo.ratios.Tokens` into a
`gdpo.objectives.Objective`, to be maximised. Advantages depend on rewards only, so every
correction goes with every estimator.

A token that is masked or truncated stays in the denominator of the loss. Masking multiplies by 0,
so that a NaN in what was masked is still seen.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from gdpo.objectives import ClippedCorrection, Correction, Objective, proximal
from gdpo.ratios import Tokens, behaviour_weight, log_ratio, sequence_ratio, sequence_weight


@dataclass(frozen=True, kw_only=True)
class DecoupledPpo(ClippedCorrection):
    """Clip against the proximal policy, and weight by how it differs from the behaviour policy.

        min(w, C) * min(r A, clip(r, 1 - e_low, 1 + e_high) A),  no gradient through w

    Source: AReaL, arXiv 2505.24298, its decoupled PPO objective (after Hilton et al., arXiv
    2110.00641), with w truncated at C.
    """

    name = "decoupled_ppo"
    needs_proximal = True
    weight_cap: float = 5.0
    """C: tokens of larger w are truncated to it."""

    def objective(self, tokens: Tokens) -> Objective:
        """Truncate the weight of each token [N]."""
        return self._truncate(self._clip_to_proximal(tokens), behaviour_weight(tokens))

    def _truncate(self, clipped: Objective, weight_N: Tensor) -> Objective:
        """The objective times min(weight, C)."""
        return Objective(
            value_N=clipped.value_N * weight_N.clamp(max=self.weight_cap),
            ratio_N=clipped.ratio_N,
            truncated_N=weight_N > self.weight_cap,
            clipped_low_N=clipped.clipped_low_N,
            clipped_high_N=clipped.clipped_high_N,
        )


@dataclass(frozen=True, kw_only=True)
class Tis(DecoupledPpo):
    """Truncated importance sampling: the formula of `DecoupledPpo`, with C = 2.

        min(w, C) * min(r A, clip(r, 1 - e_low, 1 + e_high) A),  no gradient through w

    Source: Yao et al., "Your efficient RL framework secretly brings you off-policy RL training",
    2025; C = 2 as in verl and slime.
    """

    name = "tis"
    weight_cap: float = 2.0
    """C: tokens of larger w are truncated to it."""


@dataclass(frozen=True, kw_only=True)
class TisSequence(Tis):
    """As `Tis`, with one weight for each sequence.

        min(prod_t w_t, C) * min(r A, clip(r, 1 - e_low, 1 + e_high) A)

    Source: as `Tis`, with the sequence level of verl: unbiased but for the truncation, where
    token weights ignore what the earlier tokens did, at the price of a weight that soon vanishes
    or explodes with length.
    """

    name = "tis_sequence"
    by_token = False

    def objective(self, tokens: Tokens) -> Objective:
        """Truncate the weight of each sequence, at each of its tokens [N]."""
        return self._truncate(self._clip_to_proximal(tokens), sequence_weight(tokens))


@dataclass(frozen=True, kw_only=True)
class Icepop(ClippedCorrection):
    """Mask the tokens whose weight is out of bounds, instead of truncating it.

        w * min(r A, clip(r, 1 - e_low, 1 + e_high) A)  if a <= w <= b else 0

    Source: IcePop, in Ring-1T, arXiv 2510.18855; a = 0.5 and b = 5 as in NeMo-RL and OpenRLHF.
    """

    name = "icepop"
    needs_proximal = True
    weight_floor: float = 0.5
    """a: tokens of smaller w are masked."""
    weight_cap: float = 5.0
    """b: tokens of larger w are masked."""

    def objective(self, tokens: Tokens) -> Objective:
        """Mask tokens [N] by their weight."""
        clipped, weight_N = self._clip_to_proximal(tokens), behaviour_weight(tokens)
        low_N, high_N = weight_N < self.weight_floor, weight_N > self.weight_cap
        return Objective(
            value_N=clipped.value_N * weight_N * ~(low_N | high_N),
            ratio_N=clipped.ratio_N,
            clipped_low_N=clipped.clipped_low_N,
            clipped_high_N=clipped.clipped_high_N,
            masked_low_N=low_N,
            masked_high_N=high_N,
        )


@dataclass(frozen=True, kw_only=True)
class Ppo(ClippedCorrection):
    """Clip against the behaviour policy itself; the proximal policy is not used.

        min(rho A, clip(rho, 1 - e_low, 1 + e_high) A)

    Source: PPO, arXiv 1707.06347, eq. 7, with mu in the place of the old policy.
    """

    name = "ppo"
    needs_proximal = False

    def objective(self, tokens: Tokens) -> Objective:
        """Clip rho of each token [N]."""
        return self._clip(log_ratio(tokens.policy_N, tokens.behaviour_N).exp(), tokens)


@dataclass(frozen=True, kw_only=True)
class Uncorrected(ClippedCorrection):
    """Take stale tokens as if the proximal policy had sampled them: the naive baseline.

        min(r A, clip(r, 1 - e_low, 1 + e_high) A)

    Source: PPO, arXiv 1707.06347, eq. 7, with pi_prox as the old policy; mu is ignored.
    """

    name = "none"
    needs_proximal = True

    def objective(self, tokens: Tokens) -> Objective:
        """Clip r of each token [N]."""
        return self._clip_to_proximal(tokens)


@dataclass(frozen=True, kw_only=True)
class Gspo(ClippedCorrection):
    """Clip one ratio for the whole sequence, the geometric mean of its tokens'.

        min(s A, clip(s, 1 - e_low, 1 + e_high) A),  s = exp(mean_t log r_t)

    Source: GSPO, arXiv 2507.18071, eq. 5 to 7, with pi_prox as the old policy; e = 3e-4 and
    4e-4. With the aggregation `sequence_mean` the loss is the paper's. As in `Uncorrected`, mu is
    ignored.
    """

    name = "gspo"
    by_token = False
    needs_proximal = True
    clip_low: float = 3e-4
    """The clip's lower end is 1 - clip_low."""
    clip_high: float = 4e-4
    """The clip's upper end is 1 + clip_high."""

    def objective(self, tokens: Tokens) -> Objective:
        """Clip the ratio of each sequence, at each of its tokens [N]."""
        log_ratio_N = log_ratio(tokens.policy_N, proximal(tokens))
        return self._clip(sequence_ratio(log_ratio_N, tokens), tokens)


@dataclass(frozen=True, kw_only=True)
class Cispo(Correction):
    """Clip the weight of a policy gradient step instead of the step: no token is dropped.

        stop_grad(clip(rho, 1 - e_low, 1 + e_high)) A log pi

    Source: CISPO, in MiniMax-M1, arXiv 2506.13585, eq. 4 and 5, with mu as the old policy. By
    default rho is only clipped above, at 5, as the paper has no lower limit.
    """

    name = "cispo"
    needs_proximal = False
    clip_low: float = 1.0
    """The clip's lower end is 1 - clip_low."""
    clip_high: float = 4.0
    """The clip's upper end is 1 + clip_high."""

    def objective(self, tokens: Tokens) -> Objective:
        """Clip rho as the weight of each token [N]."""
        ratio_N = log_ratio(tokens.policy_N, tokens.behaviour_N).exp().detach()
        weight_N = ratio_N.clamp(1 - self.clip_low, 1 + self.clip_high)
        return Objective(
            value_N=weight_N * tokens.advantage_N * tokens.policy_N,
            ratio_N=ratio_N,
            truncated_N=weight_N != ratio_N,
        )


@dataclass(frozen=True, kw_only=True)
class DppoTv(Correction):
    """Mask the tokens whose probability already moved far enough, and pull all towards mu.

        rho A m - c (log rho)^2,  m = 0 where A > 0 and pi - mu > d, or A <= 0 and pi - mu < -d

    Source: DPPO with binary total variation, arXiv 2602.04879; d = 0.2 and c = 1e-3 as in
    prime-rl. A ratio clip binds on rare tokens, whose ratio moves easily, and hardly on likely
    ones; the difference of probabilities binds on those that matter.
    """

    name = "dppo_tv"
    needs_proximal = False
    tv_limit: float = 0.2
    """d: limit on |pi - mu|."""
    log_ratio_penalty: float = 1e-3

    """c: coefficient of (log rho)^2."""

    @property
    def acts_without_advantage(self) -> bool:
        """Whether there is a penalty, which is on every token."""
        return self.log_ratio_penalty > 0

    def objective(self, tokens: Tokens) -> Objective:
        """Mask tokens [N] by the difference of their probabilities."""
        log_rho_N = log_ratio(tokens.policy_N, tokens.behaviour_N)
        ratio_N = log_rho_N.exp()
        moved_N = tokens.policy_N.detach().exp() - tokens.behaviour_N.exp()
        high_N = (tokens.advantage_N > 0) & (moved_N > self.tv_limit)
        low_N = (tokens.advantage_N <= 0) & (moved_N < -self.tv_limit)
        surrogate_N = ratio_N * tokens.advantage_N * ~(low_N | high_N)
        return Objective(
            value_N=surrogate_N - self.log_ratio_penalty * log_rho_N.square(),
            ratio_N=ratio_N.detach(),
            masked_low_N=low_N,
            masked_high_N=high_N,
        )


@dataclass(frozen=True, kw_only=True)
class M2po(Correction):
    """Mask the fewest tokens that bring the second moment of log rho under its limit.

        rho A m,  m = 0 for the largest (log rho)^2, until the mean of the others < limit

    Source: M2PO, arXiv 2510.01161. Decided here:

    1. Tokens with the same (log rho)^2 are masked together, so that their order does not matter.
    2. The mean is over the tokens of one call: of a microbatch, where minibatches are split.
    """

    name = "m2po"
    by_token = False
    needs_proximal = False
    second_moment_limit: float = 0.04
    """Limit on the mean of (log rho)^2."""

    @property
    def acts_without_advantage(self) -> bool:
        """They do: they have a part in the mean."""
        return True

    def objective(self, tokens: Tokens) -> Objective:
        """Mask the tokens [N] with the largest (log rho)^2."""
        log_rho_N = log_ratio(tokens.policy_N, tokens.behaviour_N)
        ratio_N = log_rho_N.exp()
        square_N = log_rho_N.detach().square()
        cut_N = square_N > _largest_kept(square_N, self.second_moment_limit)
        return Objective(
            value_N=ratio_N * tokens.advantage_N * ~cut_N,
            ratio_N=ratio_N.detach(),
            masked_low_N=cut_N & (ratio_N < 1),
            masked_high_N=cut_N & (ratio_N > 1),
        )


def _largest_kept(square_N: Tensor, limit: float) -> Tensor:
    """The largest value, 0-dim, such that those up to it have a mean under the limit; else -1."""
    if len(square_N) == 0:
        return square_N.new_tensor(-1.0)
    sorted_N = square_N.to(torch.float64).sort().values
    count_N = torch.arange(1, len(sorted_N) + 1, device=sorted_N.device)
    # Sorted upwards, the running means only grow: a prefix of them is under the limit. A value
    # that goes on beyond that prefix is not kept at all.
    under_N = sorted_N.cumsum(0) / count_N < limit
    first_cut = sorted_N[under_N.sum().clamp(max=len(sorted_N) - 1)]
    kept_N = under_N & ((sorted_N < first_cut) | under_N.all())
    return torch.where(kept_N, sorted_N, -1.0).amax()


CORRECTIONS: dict[str, type[Correction]] = {
    kind.name: kind
    for kind in (
        DecoupledPpo,
        Ppo,
        Tis,
        TisSequence,
        Icepop,
        DppoTv,
        Gspo,
        Cispo,
        M2po,
        Uncorrected,
    )
}
"""Every correction by the name that a configuration uses."""
DEFAULT_CORRECTION: Correction = Icepop()
"""What lost least to staleness in the project's own sweep (docs/results/learning.md)."""
