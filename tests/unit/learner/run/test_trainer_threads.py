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
    threads.follow(100.0, busy, holds_up=False)
    assert threads.threads == expected


def test_they_go_back_to_actors_that_are_busy_again_though_the_learner_is_slower_then():
    threads, applied = make_threads(cores=2, threads=1)
    threads.follow(100.0, 0.01, holds_up=True)
    for _ in range(3):
        threads.follow(180.0, 2.0, holds_up=False)
    assert applied == [2, 1]


def test_while_actors_wait_for_the_learner_it_gives_nothing_back():
    """Two actors that idle 70 % of the time keep .6 of a core busy, which rounds to one."""
    threads, applied = make_threads(cores=2, threads=1)
    threads.follow(100.0, 0.01, holds_up=True)
    threads.follow(180.0, 0.6, holds_up=True)
    assert applied == [2]


def test_a_larger_number_that_was_slower_is_tried_again_only_after_a_while():
    threads, applied = make_threads(cores=2, threads=1)
    threads.follow(100.0, 0.0, holds_up=True)
    # A small model: two threads make it slower, and it waits for the actors for a moment.
    threads.follow(60.0, 2.0, holds_up=False)
    for _ in range(23):
        threads.follow(100.0, 0.0, holds_up=True)
    assert applied == [2, 1]
    # 60 * 1.02 ** 24 = 96.5, above 95.
    threads.follow(100.0, 0.0, holds_up=True)
    threads.follow(100.0, 0.0, holds_up=True)
    assert applied == [2, 1, 2]


def test_a_number_is_in_force_on_the_thread_that_trains():
    before = torch.get_num_threads()
    try:
        TrainerThreads(cores=3, threads=before).follow(1.0, 0.0, holds_up=True)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
