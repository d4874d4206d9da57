"""The CPU threads of the trainer: those that the actors of this machine leave idle.

    threads = cores - (actors here) * (threads of each) * (1 - idle share of actors)

A learner that holds the actors up so gets their cores, and gives them back when it waits itself. A
number that was slower than the one at hand, as more threads are for small models, is not taken.
"""

import os
import socket
from collections.abc import Callable

import torch

from learner.run.parts import Parts

SLOWER = 0.95
"""Share of the speed below which another number of threads counts as slower."""
SMOOTHING = 0.5
"""Weight of the newest step in the speed at a number of threads."""


class TrainerThreads:
    """Decides after each step; to be called on the thread that trains."""

    def __init__(
        self, cores: int, threads: int, apply: Callable[[int], None] = torch.set_num_threads
    ) -> None:
        """Begin at ``threads``, which are in force; ``apply`` puts another number in force."""
        self._cores = cores
        self.threads = threads
        self._apply = apply
        self._speeds: dict[int, float] = {}

    def follow(self, tokens_per_s: float, busy_elsewhere: float) -> None:
        """Choose for the next step, after one with this speed.

        ``busy_elsewhere`` is the number of cores that others here keep busy, on average.
        """
        before = self._speeds.get(self.threads, tokens_per_s)
        self._speeds[self.threads] = before + SMOOTHING * (tokens_per_s - before)
        wanted = min(max(1, self._cores - round(busy_elsewhere)), self._cores)
        known = self._speeds.get(wanted)
        if wanted == self.threads:
            return
        if known is not None and known < SLOWER * self._speeds[self.threads]:
            return
        self.threads = wanted
        self._apply(wanted)


def automatic_threads(parts: Parts) -> TrainerThreads | None:
    """Threads that follow the actors; None where numbers must not depend on them, and on GPUs."""
    config = parts.config
    device = next(parts.policy.model.parameters()).device
    if config.training.threads or config.buffer.lag is not None or device.type != "cpu":
        return None
    return TrainerThreads(len(os.sched_getaffinity(0)), torch.get_num_threads())


def busy_cores(parts: Parts) -> float:
    """Cores of this machine that actors keep busy, on average over the last steps."""
    host = socket.gethostname()
    here = sum(actor.hello.host == host for actor in parts.coordinator.actors())
    return here * parts.config.launch.actor_threads * (1 - parts.throughput.rates.actor_idle_share)
