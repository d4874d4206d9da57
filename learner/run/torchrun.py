"""Becoming one of the processes that ``torchrun --nproc-per-node N -m learner CONFIG`` started.

torchrun says by its environment which rank a process is, and restarts nothing unless it is told to:
a learner whose rank was lost ends, and is continued with ``--resume``, on any number of ranks.
"""

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from learner.config.run import RunConfig
from learner.training.pulse import Pulse
from learner.training.ranks import ALONE, Ranks
from protocol.errors import ConfigError, TrainingError, brief
from protocol.process import torchrun_rank

log = logging.getLogger("learner")

_MEET = timedelta(minutes=10)
"""For all ranks to have started."""
_TIMEOUT = "ranks_timeout_s"
_LATER_S = 5.0
"""By which calls break off later than a silent rank is noticed, which says more."""


@contextmanager
def joined(config: RunConfig | None) -> Iterator[Ranks]:
    """Meet the other ranks, as rank 0 with the ``config``; alone there is nobody to meet.

    Raises `TrainingError` if they do not come, `ConfigError` for what several ranks cannot do.
    """
    rank, size = torchrun_rank()
    if size == 1:
        yield ALONE
        return
    if config is not None:
        _check(config, size)
    try:
        store, _, _ = next(dist.rendezvous("env://", timeout=_MEET))  # type: ignore[no-untyped-call]
        if config is not None:
            store.set(_TIMEOUT, str(config.deadlines.ranks_timeout_s))
        timeout_s = float(store.get(_TIMEOUT).decode())
    except RuntimeError as error:
        raise TrainingError(f"rank {rank} does not reach rank 0: {brief(error)}") from error
    pulse = Pulse(store, rank, size, timeout_s)
    pulse.start(_MEET)
    try:
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
            store=dist.PrefixStore("ranks", store),
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=timeout_s + _LATER_S),
        )
        ranks = Ranks(rank, size, pulse, timeout_s + _LATER_S)
        log.info("rank %d of %d, on %s", rank, size, socket.gethostname())
        yield ranks
    except BaseException as error:
        pulse.leave_cause(error)
        raise
    finally:
        pulse.close()


def _check(config: RunConfig, size: int) -> None:
    if (each := config.training.shard_ranks) and size % each:
        raise ConfigError(f"training.shard_ranks = {each} does not divide the {size} ranks")
    if config.optimizer.kind != "adamw":
        raise ConfigError(
            f'optimizer.kind = "{config.optimizer.kind}" is for one rank: its moments come in '
            'blocks that shards cut; set optimizer.kind = "adamw"'
        )
    if config.model.device not in ("auto", "cpu", "cuda"):
        raise ConfigError(
            f'model.device = "{config.model.device}" is for one rank: with "auto" or "cuda" each '
            "takes the GPU of its number on its machine"
        )
