"""The figures of a run with a real model, and the rewards of its sums."""

import pytest

from benchmarks.digit_sums import correctness_reward, format_reward, row
from benchmarks.real_model import Run, figures_of, make_table

STEP = {
    "seconds": 10.0,
    "step_seconds": 4.0,
    "completions/mean_length": 10.0,
    "staleness_mean": 1.0,
    "staleness_max": 2,
    "actor_idle_share": 0.5,
    "rewards": {"format": 0.0, "correctness": 0.0},
}
LATER = STEP | {"seconds": 20.0, "rewards": {"format": 1.0, "correctness": 0.5}}
SUMMARY = {"weights": {"pushes": 4, "actors_stalled_share": 0.1}}


def test_a_run_becomes_a_column():
    run = Run("ours", [STEP, LATER], SUMMARY, {"learner": [3_000_000], "rewards": [1_000_000] * 5})
    figures = figures_of(run)
    assert figures["steps"] == "2 in 20 s"
    assert figures["tokens trained a second, trainer"] == "160"
    assert figures["tokens trained a second, run"] == "64"
    assert figures["staleness, mean and largest"] == "1.00, 2"
    assert figures["stall a push"] == "500 ms, 4 pushes"
    assert figures["peak memory, learner"] == "3 MB"
    assert figures["peak memory, rewards"] == "5 MB in 5 processes"
    assert figures["correctness"] == "0.00 to 0.50"


def test_a_run_without_a_step_is_a_column_too():
    runs = [Run("earlier", [], {}, {}), Run("ours", [STEP], {}, {})]
    assert make_table(runs).row_count > 5


def test_floors_are_the_least_between_two_checkpoints():
    resident = [(0, 1), (1, 9), (2, 7), (3, 12), (4, 8), (7, 10), (8, 9)]
    assert Run("ours", [], {}, {}, resident).floors == [7, 8, 9]


@pytest.mark.parametrize(
    ("answer", "form", "right"),
    [
        ("5 + 7 = 12", 1.0, 1.0),
        ("5 + 7 is equal to 12, as 12 = 5 + 7 is 12", 0.0, 0.0),
        ("The answer is: **12**.", 1.0, 1.0),
        ("The answer is 13", 1.0, 0.0),
        ("That is hard", 0.0, 0.0),
        ("12", 0.0, 0.0),
    ],
)
def test_rewards_of_sums(answer: str, form: float, right: float):
    truth = [row(5, 7)["ground_truth"]]
    for completion in (answer, [{"role": "assistant", "content": answer}]):
        assert format_reward([], [completion], []) == [form]
        assert correctness_reward([], [completion], [], ground_truth=truth) == [right]
