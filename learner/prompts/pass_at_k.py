"""pass@k: the chance that at least one of k rollouts of a prompt passes."""

from math import comb


def pass_at_k(num_rollouts: int, num_passed: int, k: int) -> float:
    """Estimate pass@k of one prompt from n rollouts of which c passed, without bias.

        pass@k = 1 - C(n - c, k) / C(n, k)

    the share of all choices of k of the n rollouts that hold one that passed (Chen et al. 2021,
    arXiv 2107.03374, eq. 1). Raises `ValueError` for fewer than k rollouts, from which no unbiased
    estimate can be made.
    """
    if not 1 <= k <= num_rollouts:
        raise ValueError(f"pass@{k} of {num_rollouts} rollouts")
    # Exact whole numbers, as the product of the paper's program, but without rounding.
    return 1.0 - comb(num_rollouts - num_passed, k) / comb(num_rollouts, k)
