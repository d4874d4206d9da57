"""The live status of a run, as the page /status tells it and displays show it.

The learner builds it, and displays read the same types, strictly: what answers at a port may be
anything. Every text in it is fit to be shown.
"""

from typing import Annotated, Literal

from pydantic import AfterValidator, ValidationInfo

from learner.records import AnyFloat, Count, Record, Version
from protocol.errors import one_line

LABEL_CHARACTERS = 80
TEXT_CHARACTERS = 2000
FROM_A_PORT = {"texts": "cut"}
"""Context in which a status is validated that some process told."""


def label(text: str) -> str:
    """Return ``text`` fit to be shown: a terminal would obey what does not print."""
    return one_line(text, LABEL_CHARACTERS)


def _fit_to_be_shown(text: str, info: ValidationInfo) -> str:
    """A learner tells its texts in full; what comes from a port is cut for a display."""
    return label(text) if info.context == FROM_A_PORT else one_line(text, TEXT_CHARACTERS)


Label = Annotated[str, AfterValidator(_fit_to_be_shown)]
"""A text of somebody else's that is going to be shown."""
Bottleneck = Literal["actors", "learner", "balanced"]


class ActorStatus(Record):
    """One actor, as the learner knows it."""

    number: Count
    host: Label
    pid: int
    version: Version
    """The policy version that it has."""
    route: Label
    """The route on which its last weights came; empty before the first."""
    evaluates: bool
    """Whether it keeps its version, because that one is evaluated."""
    leases: Count
    """Leases that it holds."""
    groups: Count
    """Groups that came from it."""
    check: Label
    """How far its self-check is; ``off`` where nobody is checked."""
    check_difference: AnyFloat | None
    """The largest difference of log-probabilities in its self-check; None before that."""
    difference_mean: AnyFloat | None
    """The mean difference of log-probabilities, in nats, in its newest check, spot checks included;
    None before the first."""
    difference_largest: AnyFloat | None
    """The largest difference in all its checks, likewise."""
    idle_share: float | None
    """The share of its time since it was first heard in which it had nothing to generate; None
    before it reported any."""
    stalled_share: float | None
    """The share in which generation stood still for weights, likewise."""
    silent_s: float
    """Seconds since it was last heard."""


class EpochStatus(Record):
    """Weight pushes with the same members."""

    epoch: Count
    backend: Label
    members: list[Count]
    """Numbers of the actors."""
    first_version: Version
    pushes: Count
    form_seconds: float
    """Seconds until all members had met."""
    ended: Label
    """Why it is over; empty while it lasts."""


class PushStatus(Record):
    """One version on its way to the actors."""

    version: Version
    epoch: Count
    """The epoch that it was broadcast in; 0 if it was not."""
    routes: dict[Label, Count]
    """Actors by the route on which they got it."""
    phases: dict[Label, float]
    """Seconds by phase, in the order of the phases."""
    seconds: float
    """Seconds from the announcement to the last confirmation, or the deadline."""
    evicted: dict[Label, Label]
    """Cause by the number of the actor."""
    behind: list[Count]
    """Actors that did not have it when the push ended."""


class WeightsStatus(Record):
    """How the weights get to the actors."""

    backend: Label
    push_every: Count
    """Steps from one push to the next."""
    pushes: Count
    num_bytes: Count
    """Bytes of one version."""
    stream_share: float
    """The share of the learner's time that goes into what actors pull."""
    stream_bytes: Count
    """Bytes sent to actors that pull."""
    stream_plain_bytes: Count
    """Bytes of weights that those stand for."""
    epochs: list[EpochStatus]
    """The last epochs, the newest last."""
    last_pushes: list[PushStatus]
    """The last pushes, the newest last."""
    evictions: dict[Label, Count]
    """Actors that were put out of an epoch, by cause."""


class StepStatus(Record):
    """What the last step was trained on, and how."""

    mean_length: float
    """Tokens of its completions."""
    min_length: float
    max_length: float
    clipped_ratio: float
    """Share of the completions that was cut off."""
    frac_reward_zero_std: float
    """Share of its groups without any signal."""
    entropy: AnyFloat | None
    """Mean entropy of the policy at a sampled token, in nats; None where it is not computed."""
    learning_rate: float


class EvaluatingStatus(Record):
    """The evaluation at hand."""

    version: Version
    """The policy version that is evaluated; -1 while no actor has one that is to be."""
    prompts_done: Count
    prompts: Count


class EvaluationStatus(Record):
    """The evaluation that was done last."""

    version: Version
    seconds: float
    sets: dict[Label, dict[Label, AnyFloat | None]]
    """Means of the rewards, and pass@k, by set; None where there is none."""


class Status(Record):
    """The state of a run now, as the page /status tells it."""

    run: Label
    phase: Label
    step: Count
    """Steps done."""
    steps: Count
    """Steps of the whole run."""
    seconds_left: float | None
    """Seconds to the last step at the mean pace so far; None before the first one."""
    rewards: dict[Label, AnyFloat]
    """Means of the last step; NaN for one that applied to no rollout."""
    last_step: StepStatus | None
    """None before the first one."""
    evaluating: EvaluatingStatus | None
    """None while nothing is evaluated."""
    evaluation: EvaluationStatus | None
    """None before the first one is done."""
    tokens_generated_per_s: float
    tokens_trained_per_s: float
    staleness_mean: float | None
    """Versions, over the groups of the last step; None before the first one."""
    staleness_max: Count | None
    """Versions, likewise."""
    max_staleness: Count
    """Versions: the limit that the configuration sets."""
    buffer_groups: Count
    buffer_bytes: Count
    batch_groups: Count
    """Groups that a batch takes."""
    groups_refilled: Count
    """Groups without signal in whose place others were put, in the whole run."""
    actors_live: Count
    actors_wanted: Count | None
    """Actors that would keep the learner busy; None while unknown."""
    actor_idle_share: float
    learner_wait_share: float
    connections_refused: dict[Label, Count]
    """Connections that were refused, by cause."""
    messages_refused: dict[Label, Count]
    """Messages that were refused, likewise."""
    bottleneck: Bottleneck | None
    """The side that the other one waits for; None while unknown."""
    weights: WeightsStatus
    actors: list[ActorStatus]
