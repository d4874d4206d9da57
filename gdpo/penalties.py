"""What keeps the policy near a reference model.

Shapes: N tokens that the policy chose.
"""

from collections.abc import Callable

from torch import Tensor

from gdpo.ratios import log_ratio


def k3(logprobs_N: Tensor, reference_N: Tensor) -> Tensor:
    """pi_ref / pi - log(pi_ref / pi) - 1, unbiased for KL(pi || pi_ref) and never negative.

    Source: Schulman, "Approximating KL divergence", 2020; the penalty of GRPO, arXiv 2402.03300,
    eq. 4. The log ratio is limited to +-20.
    """
    difference_N = log_ratio(reference_N, logprobs_N)
    # expm1, because the difference loses every digit where the policies nearly agree.
    return difference_N.expm1() - difference_N


def mse(logprobs_N: Tensor, reference_N: Tensor) -> Tensor:
    """(log pi - log pi_ref)^2 / 2, whose gradient is, on policy, that of KL(pi || pi_ref).

    Source: k2 of Schulman, "Approximating KL divergence", 2020; `mse` in verl, with which the
    GDPO paper ran its experiments in mathematics. The log ratio is limited to +-20.
    """
    return log_ratio(logprobs_N, reference_N).square() / 2


KL_PENALTIES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"k3": k3, "mse": mse}
"""Every penalty by the name that a configuration uses."""


def kl_penalty(logprobs: Tensor, reference_logprobs: Tensor, kind: str = "k3") -> Tensor:
    """Estimate KL(pi || pi_ref) at each token, of any shape, from its log-probabilities.

    The estimates hold for tokens that pi sampled. Tokens of an older policy are not reweighted
    here, as nowhere else: the penalty is a leash, not a measurement.

    Raises ValueError for an unknown kind or shapes that do not match.
    """
    if kind not in KL_PENALTIES:
        raise ValueError(f"unknown KL penalty {kind!r}: use one of {', '.join(KL_PENALTIES)}")
    if reference_logprobs.shape != logprobs.shape:
        raise ValueError(
            f"reference_logprobs has shape {tuple(reference_logprobs.shape)}, logprobs "
            f"{tuple(logprobs.shape)}: give one entry for each token"
        )
    return KL_PENALTIES[kind](logprobs, reference_logprobs.detach())
