"""Threads go to the learner while it is the bottleneck, and back when it is not."""

import pytest
import torch

from learner.run.trainer_threads import TrainerThreads


def make_threads(cores: int = 8, threads: int = 6) -> tuple[TrainerThreads, list[int]]:
    applied: list[int] = []
    return TrainerThreads(cores, threads, applied.append), applied


@pytest.mark.parametrize(
    ("busy", "expected"),
    [
        (0.01, 8),  # two actors that idle 99.5 % of the time
        (0.8, 7),  # two that idle 60 %
        (2.0, 6),  # two that never do
        (20.0, 1),  # more than there are cores
    ],
)
def test_the_learner_has_the_cores_that_actors_leave_idle(busy, expected):
    threads, _ = make_threads()
    threads.follow(100.0, busy)
    assert threads.threads == expected


def test_they_go_back_to_actors_that_are_busy_again():
    threads, applied = make_threads(cores=2, threads=1)
    for busy in (0.01, 0.3, 2.0, 2.0):
        threads.follow(100.0, busy)
    assert applied == [2, 1]


def test_a_number_of_threads_that_was_slower_is_not_taken_again():
    threads, applied = make_threads(cores=2, threads=1)
    threads.follow(100.0, 0.0)
    # A small model: two threads make it slower, and the actors are busier for a moment.
    threads.follow(60.0, 2.0)
    for _ in range(5):
        threads.follow(100.0, 0.0)
    assert applied == [2, 1]


def test_a_number_is_in_force_on_the_thread_that_trains():
    before = torch.get_num_threads()
    try:
        TrainerThreads(cores=3, threads=before).follow(1.0, 0.0)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
