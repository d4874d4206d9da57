"""The CPU threads of the trainer: those that the actors of this machine leave idle.

    threads = cores - (actors here) * (threads of each) * (1 - idle share of actors)

A learner that holds the actors up so gets their cores; it gives them back once it does so no
more. A larger number that was slower than the one at hand, as it is for small models, is taken
again only after a while.
"""

import math
import os
import socket
from collections.abc import Callable

import torch

from learner.run.parts import Parts

SLOWER = 0.95
"""Share of the speed below which another number of threads counts as slower."""
FORGETTING = 1.02
"""Factor by which a speed that was too slow is thought better of after each step without it."""
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

    def follow(self, tokens_per_s: float, busy_elsewhere: float, *, holds_up: bool) -> None:
        """Choose for the next step, after one with this speed.

        ``busy_elsewhere`` is the number of cores that others here keep busy, on average;
        ``holds_up`` says whether actors wait for the learner.
        """
        before = self._speeds.get(self.threads, tokens_per_s)
        speed = self._speeds[self.threads] = before + SMOOTHING * (tokens_per_s - before)
        wanted = min(max(1, self._cores - round(busy_elsewhere)), self._cores)
        if wanted == self.threads or (holds_up and wanted < self.threads):
            return
        known = self._speeds.get(wanted, math.inf)
        if wanted > self.threads and known < SLOWER * speed:
            # It may have been another load that made it slow.
            self._speeds[wanted] = known * FORGETTING
            return
        self.threads = wanted
        self._apply(wanted)


def automatic_threads(parts: Parts) -> TrainerThreads | None:
    """Threads that follow the actors; None where numbers must not depend on them.

    Neither on GPUs, nor where several ranks wait for each other.
    """
    config = parts.config
    device = next(parts.policy.model.parameters()).device
    fixed = config.training.threads or config.buffer.lag is not None
    if fixed or device.type != "cpu" or parts.trainer.ranks.size > 1:
        return None
    return TrainerThreads(len(os.sched_getaffinity(0)), torch.get_num_threads())


def busy_cores(parts: Parts) -> float:
    """Cores of this machine that actors keep busy, on average over the last steps."""
    host = socket.gethostname()
    here = sum(actor.hello.host == host for actor in parts.coordinator.actors())
    return here * parts.config.launch.actor_threads * (1 - parts.throughput.rates.actor_idle_share)
