"""A rank of the learner that follows: it trains on its rows and its shards as rank 0 orders."""

import json
import logging
import signal
from pathlib import Path

import torch

from learner.config.run import RunConfig
from learner.prompts.work_queue import group_limits
from learner.recovery.checkpoints import Checkpoint, verified
from learner.recovery.resume import load_trainer
from learner.run.torchrun import joined
from learner.training.batch import Batch
from learner.training.batch_tensors import from_bytes
from learner.training.policy import Policy
from learner.training.ranks import Order, Ranks
from learner.training.shards import gathered
from learner.training.trainer import Trainer
from learner.weights.pack import help_to_pack
from protocol.errors import TrainingError

log = logging.getLogger("learner")


def describe(config: RunConfig, checkpoint: Checkpoint | None) -> torch.Tensor:
    """The payload of the order to load, uint8 [bytes]."""
    path = None if checkpoint is None else str(checkpoint.path.resolve())
    text = json.dumps({"config": config.model_dump(mode="json"), "checkpoint": path})
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


def run_follower() -> None:
    """Be one of the ranks until rank 0 lets it go; raises the errors of `protocol.errors`."""
    with joined(None) as ranks:
        for signum in (signal.SIGTERM, signal.SIGINT):
            # They go to all; from now on rank 0 decides when to end.
            signal.signal(signum, signal.SIG_IGN)
        order, payload = ranks.next_order()
        if order is Order.LEAVE:
            return
        assert order is Order.LOAD
        given = json.loads(payload.numpy().tobytes())
        config = RunConfig.model_validate(given["config"])
        if config.training.threads:
            torch.set_num_threads(config.training.threads)
        checkpoint = verified(Path(given["checkpoint"])) if given["checkpoint"] else None
        policy, trainer = load_trainer(config, checkpoint, ranks=ranks)
        follow(ranks, config, policy, trainer)


def follow(ranks: Ranks, config: RunConfig, policy: Policy, trainer: Trainer) -> None:
    """Carry out orders until the one to leave; raises what makes that impossible."""
    limits = group_limits(config, policy.vocab_size)
    while True:
        order, payload = ranks.next_order()
        match order:
            case Order.TRAIN:
                groups, advantages_PG = from_bytes(payload, limits)
                try:
                    trainer.update(Batch(groups, config.algorithm.overlong), advantages_PG)
                except TrainingError as error:
                    # Rank 0 has met with the same, and decides what comes of it.
                    log.info("%s", error)
            case Order.GATHER_WEIGHTS:
                with ranks.explained():
                    help_to_pack(policy.model, policy.specs)
            case Order.GATHER_STATE:
                with ranks.explained():
                    gathered(policy.model.state_dict(), keep=False)
                    gathered(trainer.state_tensors(), keep=False)
            case Order.LEAVE:
                return
            case Order.LOAD:
                raise AssertionError("once is enough")
