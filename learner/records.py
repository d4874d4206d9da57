"""What a run leaves in its folder: a line for each step, and the summary at the end.

The learner builds these records, and `learner.run_folder` writes them as JSON. Programs that show a
run read the same types, strictly: what is in a file may be anything. Keys that are not known
are left out, for a newer learner may say more.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from protocol.config import When
from protocol.errors import one_line


def first_problem(error: ValidationError) -> str:
    """Return where a record is wrong, and how, on one line."""
    problem = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(map(str, problem["loc"]))
    return one_line(f"{where}: {problem['msg']}" if where else problem["msg"])


Count = Annotated[int, Field(ge=0, le=2**63 - 1)]
Version = Annotated[int, Field(ge=-1, le=2**63 - 1)]
"""A policy version; -1: none yet."""
AnyFloat = Annotated[float, Field(allow_inf_nan=True)]
"""A figure that may be NaN, or infinite, without being wrong."""


class Record(BaseModel):
    """One kind of record; numbers are finite unless a field says otherwise."""

    model_config = ConfigDict(strict=True, frozen=True, allow_inf_nan=False)


# --- rewards ------------------------------------------------------------------------------------


class RewardCounts(Record):
    """How much one reward counts, and when."""

    weight: float
    when: When | None
    """The condition under which it counts; None: always."""


class RewardsFrom(Record):
    """What all rewards count from a step on."""

    from_step: Count
    rewards: dict[str, RewardCounts]


class RewardChangeRecord(Record):
    """One change to what the rewards count, in the course of a run."""

    from_step: Count
    source: Literal["schedule", "command"]
    rewards: dict[str, RewardCounts]
    """What all rewards count after it."""


# --- a step -------------------------------------------------------------------------------------


class Step(Record):
    """One line of metrics.jsonl: a step, with the metrics of its loss beside these keys."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=True)
    __pydantic_extra__: dict[str, float]

    step: Count
    """The policy version after it."""
    seconds: float
    """Seconds of training up to its end, by the learners before a resume too."""
    step_seconds: float
    rewards: dict[str, float]
    """Mean raw score of each reward; NaN for one that applied to no rollout."""
    reward_settings: dict[str, RewardCounts]
    """What the rewards counted in this step."""
    staleness_mean: float
    """Versions, over the groups of the batch."""
    staleness_max: Count
    groups_refilled: Count
    """Groups without signal that are not in the batch: others took their place."""
    tokens_generated_per_s: float
    tokens_trained_per_s: float
    actor_idle_share: float
    learner_wait_share: float
    buffer_groups: Count
    buffer_bytes: Count
    actors_live: Count
    lag0_logprob_difference: float | None
    """The largest difference of actors' and learner's log-probability of a token that was sampled
    from exactly the trainer's version; None without such a token."""
    actor_difference_mean: AnyFloat | None
    """The mean difference of log-probabilities in the newest check of each live actor, at whatever
    lag: of the actor where it is largest. None before any check."""
    actor_difference_largest: AnyFloat | None
    """The largest difference in any check of a live actor, likewise."""

    @property
    def metrics(self) -> dict[str, float]:
        """The metrics of the loss by name: ``loss``, ``ess`` and others."""
        return self.__pydantic_extra__


# --- evaluation -----------------------------------------------------------------------------------


class SetResult(Record):
    """What an evaluation found on one set of held-out prompts."""

    prompts: Count
    """Prompts that were rolled out."""
    failed_prompts: Count
    """Prompts that failed too often and are left out."""
    missing_prompts: Count
    """Prompts that are left out because time was up."""
    num_rollouts: Count
    """Rollouts of each prompt."""
    temperature: float
    """Sampling temperature; 0: greedy."""
    completion_tokens_mean: float
    truncated_share: float
    """Share of the completions that were cut off."""
    means: dict[str, AnyFloat | None]
    """Mean of each reward over the rollouts to which it applies; None if to none."""
    pass_at: dict[str, float]
    """pass@k by k; empty where it is not computed."""

    @property
    def figures(self) -> dict[str, float | None]:
        """The means, and pass@k, by the names that they are shown under."""
        return {**self.means, **{f"pass@{k}": value for k, value in self.pass_at.items()}}


class EvaluationResult(Record):
    """What an evaluation found: one line of evaluations.jsonl."""

    due: Count
    """The training step after which it was to begin."""
    version: Version
    """Policy version of every rollout: that step's, or a later one if no actor had it."""
    seconds: float
    sets: dict[str, SetResult]
    """By the name of the set."""

    @property
    def first(self) -> SetResult:
        """The first set: that of ``data.heldout``, if there is one."""
        return next(iter(self.sets.values()))


# --- the end ------------------------------------------------------------------------------------


class SummaryRewards(Record):
    """What became of the rewards."""

    changes: list[RewardChangeRecord]
    failures: dict[str, Count]
    """Groups that a reward function failed on, by reward."""


class LeaseBooks(Record):
    """Leases of one purpose."""

    leased: Count
    received: Count
    failed: dict[str, Count]
    """Leases that failed, by cause."""
    outstanding: Count
    balanced: bool
    """Whether what was leased is the sum of the others."""


class GroupBooks(Record):
    """Groups that came in."""

    accepted: Count
    trained: Count
    evicted: dict[str, Count]
    """Groups that were dropped, by cause."""
    evicted_tokens: dict[str, Count]
    """Their completion tokens, by cause."""
    buffered: Count
    balanced: bool
    """Whether what was accepted is the sum of the others."""


class Books(Record):
    """What was leased and came in, and where it went."""

    leases: dict[str, LeaseBooks]
    """Books by purpose: check, train, eval."""
    groups: GroupBooks


class SummaryThroughput(Record):
    """Tokens of the whole run."""

    tokens_trained: Count
    tokens_trained_per_s: float
    tokens_generated: Annotated[int, Field(ge=0)]
    """Tokens by all actors ever seen, also for evaluations and for groups that were not used: as
    they say themselves, so that the sum has no limit."""


class SummaryStaleness(Record):
    """Staleness over the whole run, in versions."""

    largest: Count
    """The largest of a group that was trained on."""
    limit: Count


class SummaryWeights(Record):
    """How the weights got to the actors."""

    version: Version
    """The last one."""
    digest_mismatches: Count
    """Times that an actor had other bytes than the learner."""
    actors_stalled_share: float
    """The share of all actors' time in which generation stood still for weights."""
    pushes: Count
    evictions: dict[str, Count]
    """Actors that were put out of an epoch, by cause."""
    stream_share: float
    """The share of the learner's time that went into what actors pulled."""


class Summary(Record):
    """What a run achieved, and its books."""

    run: str
    completed: bool
    """Whether all steps are done, evaluated and saved."""
    ended_because: str
    steps: Count
    """Steps done."""
    seconds_training: float
    rewards: SummaryRewards
    evaluations: list[EvaluationResult]
    """In the order in which they were due."""
    books: Books
    throughput: SummaryThroughput
    staleness: SummaryStaleness
    lag0_logprob_difference: AnyFloat | None
    """The largest one of all steps; see `Step`."""
    phase_seconds: dict[str, float]
    """Mean seconds of each phase of a group and of a weight push."""
    actors_lost: Count
    bad_messages: Count
    connections_refused: dict[str, Count]
    """Connections that were refused, by cause."""
    messages_refused: dict[str, Count]
    """Messages that were refused, likewise."""
    weights: SummaryWeights
    checkpoint: str | None
    """Path of the newest model; None if there is none."""

    @property
    def before(self) -> EvaluationResult | None:
        """The evaluation before the first step; None without one."""
        return next((e for e in self.evaluations if e.due == 0), None)

    @property
    def after(self) -> EvaluationResult | None:
        """The evaluation after the last step; None without one."""
        return next((e for e in self.evaluations if e.due == self.steps > 0), None)


# --- how to reach a learner ---------------------------------------------------------------------


class RunIdentity(Record):
    """Which run a folder holds, whichever learner continues it."""

    run_id: str


class Endpoints(Record):
    """Where a learner listens, for the launcher and for people."""

    learner: str
    """``tcp://HOST:PORT``, for actors."""
    metrics: Annotated[str, Field(pattern=r"^http://[^/]+/metrics$")]
    """``http://HOST:PORT/metrics``."""


class Control(Record):
    """How to command a learner, for its user only."""

    url: str
    token: str = Field(repr=False)
