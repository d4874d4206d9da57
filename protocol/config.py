"""The configuration that an actor gets in its welcome, and the sections that it comes from."""

from itertools import pairwise
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from protocol.messages import MAX_LEASES, MAX_TEMPERATURE


class StrictModel(BaseModel):
    """Base of every section: unknown keys are errors, and values do not change after validation.

    The docstring under a field is its description in the schema.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


def _is_import_path(value: str) -> str:
    module, _, name = value.partition(":")
    if not name.isidentifier() or not all(part.isidentifier() for part in module.split(".")):
        raise ValueError(f"{value!r} is no function; write package.module:function")
    return value


class When(StrictModel):
    """Condition of a reward (GDPO paper, eq. 8): it counts only where another one is reached."""

    reward: str
    """Name of the other reward."""
    at_least: float
    """Score of the other reward from which this one counts."""


# Advantages are float32, and so is what is multiplied with them.
Weight = Annotated[float, Field(ge=-3.4e38, le=3.4e38)]


class RewardUpdate(StrictModel):
    """A change to a reward's weight, condition, or both; what is not given stays as it is."""

    weight: Weight | None = None
    """New weight; None: as before."""
    when: When | None = None
    """New condition; None: as before."""
    always: bool = False
    """End the condition."""

    @model_validator(mode="after")
    def _one_condition(self) -> Self:
        if self.when is not None and self.always:
            raise ValueError("give a condition (when) or end it (always), not both")
        return self


class ScheduledUpdate(RewardUpdate):
    """A change at a given time."""

    from_step: PositiveInt
    """The first training batch (from 1) that it holds for."""

    @model_validator(mode="after")
    def _changes_something(self) -> Self:
        if self.weight is None and self.when is None and not self.always:
            raise ValueError("a change at a step needs a weight, a when or always = true")
        return self


REWARD_ARGUMENTS = ("prompts", "completions", "completion_ids", "finish")
"""What every reward function gets, besides the columns of the data."""


class RewardConfig(StrictModel):
    """One reward: its function, and how much its score counts."""

    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]
    """Name of the reward in metrics, overrides and conditions."""
    function: Annotated[str, AfterValidator(_is_import_path)]
    """Reward function, ``package.module:function`` with TRL's signature."""
    arguments: dict[str, JsonValue] = {}
    """Further arguments of the function, by name; not those that every function gets."""
    weight: Weight = 1.0
    """Multiplies the reward's normalised advantage (GDPO) or its raw score (GRPO)."""
    when: When | None = None
    """Condition under which it counts; None: always."""
    schedule: tuple[ScheduledUpdate, ...] = ()
    """Changes to weight and condition while training runs."""
    on_failure: Literal["drop_group", "missing", "error"] = "drop_group"
    """What happens when the function raises, hangs, ends its process or returns no scores: the
    prompt is leased again, the reward does not apply to the group, or the run ends."""

    @field_validator("arguments")
    @classmethod
    def _are_new(cls, arguments: dict[str, JsonValue]) -> dict[str, JsonValue]:
        if taken := [name for name in REWARD_ARGUMENTS if name in arguments]:
            raise ValueError(f"every function gets {' and '.join(taken)}: give it another name")
        return arguments

    @model_validator(mode="after")
    def _schedule_is_in_order(self) -> Self:
        steps = [update.from_step for update in self.schedule]
        if any(later <= earlier for earlier, later in pairwise(steps)):
            raise ValueError(f"the schedule's steps are {steps}: write each once, in order")
        return self


_OTHER_DISTRIBUTIONS = (
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
)


class SamplingConfig(StrictModel):
    """How completions are sampled: from the full distribution at a temperature."""

    num_rollouts: Annotated[int, Field(ge=1, le=65_536)] = 8
    """Rollouts per prompt: the group size G."""
    temperature: Annotated[float, Field(gt=0, le=MAX_TEMPERATURE)] = 1.0
    """Sampling temperature; the learner divides its logits by it too."""
    max_tokens: PositiveInt = 1024
    """Longest completion in tokens."""
    max_prompt_tokens: PositiveInt = 4096
    """Longest prompt in tokens; a longer one is not generated from."""

    @model_validator(mode="before")
    @classmethod
    def _samples_the_full_distribution(cls, values: Any) -> Any:
        wrong = [key for key in _OTHER_DISTRIBUTIONS if isinstance(values, dict) and key in values]
        if wrong:
            raise ValueError(
                f"{', '.join(wrong)} cannot be set: the learner computes the log-probabilities of "
                "the full distribution, and the importance ratios would be wrong; leave it out"
            )
        return values


class VllmConfig(StrictModel):
    """The vLLM engine."""

    tensor_parallel: PositiveInt = 1
    """GPUs that one actor's model is spread over."""
    gpu_memory_share: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Share of a GPU's memory for weights and key-value cache."""
    kv_cache_bytes: PositiveInt | None = None
    """Bytes of the key-value cache; None: on a GPU what ``gpu_memory_share`` leaves, on a CPU
    1 GiB."""


class ActorSection(StrictModel):
    """How every actor generates and scores."""

    engine: Literal["auto", "transformers", "vllm"] = "auto"
    """Engine that generates; ``auto``: vLLM where it is installed, there is a GPU and ``device``
    is ``auto``."""
    vllm: VllmConfig = VllmConfig()
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the weights that actors generate with, in which they are sent; ``auto``: the
    learner's."""
    device: str = "auto"
    """Device of an actor as torch names it; ``auto``: a GPU where there is one."""
    max_leases: Annotated[int, Field(ge=1, le=MAX_LEASES)] | None = None
    """Groups that one actor generates at once. None: with vLLM as many as its cache holds, with
    transformers 16, and up to 64 on a CPU that takes hardly longer for them."""
    reward_timeout_s: PositiveFloat = 60.0
    """Longest time in seconds for one reward function on one group; then its process is killed."""
    reward_processes: Annotated[int, Field(ge=1, le=1024)] = 8
    """Reward functions that one actor runs at once, each in a process of its own. Functions that
    wait, for a judge's answer for example, need as many as there are to be calls in flight."""
    status_interval_s: PositiveFloat = 0.5
    """Seconds between two messages in which an actor reports its state."""
    engine_timeout_s: PositiveFloat = 120.0
    """Seconds after which an actor gives up whose engine has not finished one token or one load of
    weights."""
    learner_timeout_s: PositiveFloat = 60.0
    """Seconds without a word from the learner after which an actor gives up."""


class ActorConfig(ActorSection):
    """What the welcome tells an actor: ``[actor]``, resolved, and how to sample and score."""

    sampling: SamplingConfig = SamplingConfig()
    rewards: tuple[RewardConfig, ...] = ()
