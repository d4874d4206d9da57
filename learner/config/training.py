"""Sections ``[training]``, ``[optimizer]``, ``[buffer]`` and of what is kept on disk."""

from typing import Annotated, Literal, Self

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from protocol.config import StrictModel

Beta = Annotated[float, Field(ge=0, lt=1)]


class TrainingConfig(StrictModel):
    """What a training step is made of, and how far generation may run ahead of it."""

    steps: PositiveInt = 100
    """Training batches in the run."""
    batch_groups: PositiveInt = 32
    """Prompts P in a training batch; each comes with its group of rollouts."""
    minibatches: PositiveInt = 4
    """Optimiser steps per training batch; each takes whole groups."""
    microbatch_tokens: NonNegativeInt = 0
    """Tokens in one forward and backward pass, of one sequence at least; prompts count once for
    their group. 0: by the memory and what a token of the model keeps there."""
    max_staleness: NonNegativeInt = 4
    """Oldest policy version, in training batches back, that a group may contain."""
    threads: NonNegativeInt = 0
    """CPU threads of the learner; 0: on a CPU, those that actors on this machine leave idle, from
    step to step, unless buffer.lag is set."""
    activation_checkpointing: bool = False
    """Whether a layer's activations are computed again in the backward pass, and not kept: memory
    for about a third more time. Log-probabilities and gradients stay the same."""
    compile: bool = False
    """Whether the model's layers are compiled by ``torch.compile``: faster on GPUs, after some
    minutes."""
    shard_ranks: NonNegativeInt = 0
    """Ranks of a learner on several GPUs that share one copy of the weights out, such as those of a
    machine: less has to travel between machines, and the copies take their memory. 0: all ranks."""
    pause_per_step_s: NonNegativeFloat = 0.0
    """Seconds of sleep after every step: to watch back-pressure work, and to test it."""


class OptimizerConfig(StrictModel):
    """The optimiser, and the learning rate over the run."""

    kind: Literal["adamw", "adamw_8bit"] = "adamw"
    """AdamW, or torchao's with moments in 8 bits, 2 bytes a parameter instead of 8 (needs ``pip
    install "async-gdpo[8bit]"`` and a compiler)."""
    master_weights: bool = True
    """Whether a bfloat16 model is trained through weights in float32, which add up what is smaller
    than bfloat16 resolves. Without them weights, gradient and optimiser take 8 bytes a parameter
    and not 18, and at a learning rate of 1e-6 more than 99 % of the updates are rounded away."""
    lr: PositiveFloat = 1e-6
    """Learning rate after the warm-up."""
    warmup_steps: NonNegativeInt = 0
    """Training batches over which the learning rate rises linearly from 0."""
    lr_schedule: Literal["constant", "linear"] = "constant"
    """Course of the learning rate after the warm-up: stay, or fall linearly to 0 at the last
    step."""
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    """Decay per optimiser step of the means of gradients and of squared gradients."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay."""
    max_grad_norm: PositiveFloat = 1.0
    """Norm that the gradient of an optimiser step is clipped to."""


class BufferConfig(StrictModel):
    """The replay buffer."""

    sampling: Literal["fifo", "freshest"] = "fifo"
    """Which groups a batch takes: the next ones in the order of the data, or those of the newest
    policy versions."""
    max_groups: PositiveInt = 4096
    """Groups held at once, leased ones included."""
    max_bytes: PositiveInt = 1 << 30
    """Memory of the groups held at once, in bytes."""
    max_uses: PositiveInt = 1
    """Training batches that a group may be in."""
    durability: Literal["journal", "memory"] = "journal"
    """``journal``: a group is on disk before it is acknowledged, so that a run
    whose learner is killed continues with all of them."""
    journal_max_bytes: PositiveInt = 8 << 30
    """Bytes; when the journal holds more, a checkpoint is made, which frees what is trained."""
    lag: NonNegativeInt | None = None
    """Policy versions that every batch is held back, so that from step lag + 1 on it is exactly
    this stale: an experiment, in which generation and training take turns. None: train on what is
    there."""

    @model_validator(mode="after")
    def _a_lag_needs_order(self) -> Self:
        if self.lag is not None and self.sampling != "fifo":
            raise ValueError('buffer.lag needs buffer.sampling = "fifo"')
        return self


class CheckpointsConfig(StrictModel):
    """Checkpoints, from which a run can continue."""

    every_steps: PositiveInt = 25
    """Training batches between two checkpoints; there is one at the end of the run as well."""
    keep: Annotated[int, Field(ge=2)] = 2
    """Newest checkpoints that stay; the others are deleted."""


class CompletionsConfig(StrictModel):
    """Completions that are kept to be read, by ``gdpo show`` for example."""

    per_step: NonNegativeInt = 8
    """Completions kept of every step, drawn at random; all of the newest one are kept besides. 0:
    none at all."""
    max_bytes: Annotated[int, Field(ge=4 << 20)] = 64 << 20
    """Bytes on disk; those of the oldest steps are deleted for new ones."""
