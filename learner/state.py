"""What of a run, besides weights and optimiser, a checkpoint holds: small, and written as JSON."""

from typing import Any

import msgspec

from protocol.messages import Purpose


class OpenPrompts(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How far the stream of prompts is used, and what of it is still to come in."""

    next_prompt_index: int = 0
    """The first one that was never leased."""
    leased: tuple[int, ...] = ()
    waiting: tuple[int, ...] = ()
    """Prompts to be leased again."""
    buffered: tuple[int, ...] = ()
    """Prompts whose groups came in, but were not trained on yet."""


class LeaseState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`protocol.leases.LeaseCounts` of one purpose."""

    received: int
    failed: dict[str, int]
    outstanding: int


class GroupState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`learner.replay.buffer.GroupCounts`, with what is buffered set apart."""

    trained: int = 0
    ended_tokens: int = 0
    """Completion tokens of the groups that were trained or evicted."""
    buffered: int = 0
    """Groups that were not trained on yet."""
    buffered_tokens: int = 0
    reusable: int = 0
    """Groups that are buffered to be trained on again."""
    reusable_tokens: int = 0
    evicted: dict[str, int] = {}
    evicted_tokens: dict[str, int] = {}
    largest_staleness: int = 0


class RewardState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where `learner.training.reward_settings.RewardSchedule` is."""

    setting: dict[str, dict[str, Any]]
    followed: int
    """Step up to which the schedule is contained: one ahead if a command came."""
    changes: tuple[dict[str, Any], ...]
    commands: int
    """Number of the last command that is contained."""


class RunState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Everything that continues the same history."""

    run_id: str
    version: int
    prompts: OpenPrompts
    next_lease: int
    leases: dict[Purpose, LeaseState]
    groups: GroupState
    rewards: RewardState
    batch_std: float | None
    """That of `learner.training.trainer.Trainer`, and the setting that it belongs to."""
    batch_std_setting: dict[str, dict[str, Any]] | None
    tokens_trained: int
    tokens_generated: int
    training_seconds: float
    lag0_difference: float | None
    counters: dict[str, int]
