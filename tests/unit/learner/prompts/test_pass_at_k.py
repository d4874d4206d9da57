"""pass@k against the paper's own program, counting, and what must hold of every estimate."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from learner.prompts.pass_at_k import pass_at_k


@pytest.mark.parametrize(
    ("num_rollouts", "num_passed", "k", "expected"),
    [
        (4, 0, 1, 0.0),
        (4, 4, 4, 1.0),
        # 1 - C(3, 1) / C(4, 1) = 1 - 3/4
        (4, 1, 1, 0.25),
        # 1 - C(3, 2) / C(4, 2) = 1 - 3/6
        (4, 1, 2, 0.5),
        # 1 - C(2, 2) / C(4, 2) = 1 - 1/6
        (4, 2, 2, 5 / 6),
        # Fewer failed than are chosen: one that passed is always among them.
        (5, 3, 3, 1.0),
        # 1 - C(7, 5) / C(10, 5) = 1 - 21/252
        (10, 3, 5, 11 / 12),
        # The program of Chen et al. (2021), figure 3: 1 - prod(1 - k / arange(n - c + 1, n + 1))
        (200, 13, 10, 0.4975511147306061),
        (200, 13, 100, 0.9999194971988055),
    ],
)
def test_golden_numbers(num_rollouts, num_passed, k, expected):
    assert pass_at_k(num_rollouts, num_passed, k) == pytest.approx(expected, rel=1e-12)


@given(st.integers(1, 9), st.data())
def test_it_is_the_share_of_all_choices_that_hold_one_that_passed(n, data):
    c, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    passed = [True] * c + [False] * (n - c)
    choices = list(combinations(passed, k))
    assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, choices)) / len(choices))


def test_its_expectation_is_the_chance_itself():
    chance, n, k = 0.3, 8, 4
    passed_N = np.random.default_rng(0).binomial(n, chance, size=20_000)
    mean = np.mean([pass_at_k(n, int(c), k) for c in passed_N])
    # 1 - 0.7 ** 4 = 0.7599; the plug-in estimate 1 - (1 - c / n) ** 4 comes out at 0.69.
    assert mean == pytest.approx(1 - (1 - chance) ** k, abs=0.005)


@pytest.mark.parametrize("k", [0, 5])
def test_more_than_there_are_cannot_be_chosen(k):
    with pytest.raises(ValueError, match=f"pass@{k} of 4"):
        pass_at_k(4, 2, k)
