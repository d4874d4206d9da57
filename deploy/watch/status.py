"""What a learner says of itself at /status, read with care: whatever answers at a port may lie."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from deploy.watch.http import get_json
from protocol.errors import BadMessage, one_line

TIMEOUT_S = 2.0
LABEL_CHARACTERS = 80


def label(text: str) -> str:
    """Fit to be shown: a terminal would obey what does not print."""
    return one_line(text, LABEL_CHARACTERS)


Label = Annotated[str, AfterValidator(label)]
Count = Annotated[int, Field(ge=0, le=2**63 - 1)]
Version = Annotated[int, Field(ge=-1, le=2**63 - 1)]
"""-1: none yet."""


class _Answer(BaseModel):
    """What is not known is left out, for a learner may say more than is shown."""

    model_config = ConfigDict(strict=True, frozen=True, allow_inf_nan=False)


class ActorStatus(_Answer):
    """One actor, as the learner knows it."""

    number: Count
    host: Label
    version: Version
    route: Label
    """On which its last weights came; empty before the first."""
    leases: Count
    groups: Count
    idle_share: float | None
    """Of its time since it was first heard: nothing to generate. None before it told any."""
    stalled_share: float | None
    """Likewise: generation stood still for weights."""
    silent_s: float
    """Since it was last heard."""


class EpochStatus(_Answer):
    """Pushes with the same members."""

    epoch: Count
    backend: Label
    members: list[Count]
    first_version: Version
    pushes: Count
    form_seconds: float
    ended: Label
    """Why; empty while it lasts."""


class PushStatus(_Answer):
    """One version on its way to the actors."""

    version: Version
    epoch: Count
    routes: dict[Label, Count]
    """Actors by the route on which they got it."""
    seconds: float
    phases: dict[Label, float]
    """Seconds by phase, in the order of the phases."""
    evicted: dict[Label, Label]
    """Cause by the number of the actor."""
    behind: list[Count]
    """Actors that did not have it when the push ended."""


class WeightsStatus(_Answer):
    """How the weights get to the actors."""

    backend: Label
    push_every: Count
    """Steps from one push to the next."""
    pushes: Count
    num_bytes: Count
    """Of one version."""
    stream_share: float
    """Of the learner's time: encoding and sending what actors pull."""
    stream_bytes: Count
    """Sent."""
    stream_plain_bytes: Count
    """What they stand for."""
    epochs: list[EpochStatus]
    """The last ones, the newest last."""
    last_pushes: list[PushStatus]
    """Likewise."""
    evictions: dict[Label, Count]
    """By cause."""


class Status(_Answer):
    """`learner.run.reports.status_report`, as far as it is shown."""

    run: Label
    phase: Label
    step: Count
    steps: Count
    seconds_left: float | None
    rewards: dict[Label, Annotated[float, Field(allow_inf_nan=True)]]
    """Means of the last step; NaN for one that applied to no rollout."""
    tokens_generated_per_s: float
    tokens_trained_per_s: float
    staleness_mean: float | None
    staleness_max: Count | None
    max_staleness: Count
    buffer_groups: Count
    buffer_bytes: Count
    batch_groups: Count
    actors_live: Count
    actors_wanted: Count | None
    actor_idle_share: float
    learner_wait_share: float
    bottleneck: Literal["actors", "learner", "balanced"] | None
    actors: list[ActorStatus]
    weights: WeightsStatus
    """None: this learner does not tell."""


def read_status(answer: Any) -> Status:
    """Decoded JSON; raises `BadMessage` if it is no status."""
    try:
        return Status.model_validate(answer)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise BadMessage(one_line(f"no status of a learner: {where}: {first['msg']}")) from error


def fetch_status(address: str) -> Status:
    """The status of the learner at ``http://HOST:PORT``.

    Raises `PeerLost` if none answers, `Refused` or `BadMessage` if something else does.
    """
    return read_status(get_json(f"{address}/status", TIMEOUT_S))
