"""The configuration tree. `learner.config.file` reads it."""

from ipaddress import IPv4Address
from pathlib import Path
from typing import Annotated, Literal, Self

import tomli_w
from pydantic import (
    AfterValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from learner.config.algorithm import AlgorithmConfig
from learner.pacing import Pacing, largest_group_bytes
from protocol.config import ActorConfig, RewardConfig, SamplingConfig, StrictModel
from protocol.errors import ConfigError
from protocol.keys import AllowList, KeyPair, load_key
from protocol.messages import MAX_COLLECTIVE_S, MAX_TEMPERATURE
from protocol.sockets import is_loopback, parse_tcp
from protocol.weights import CHUNK_BYTES

Beta = Annotated[float, Field(ge=0, lt=1)]


def _is_address(url: str) -> str:
    parse_tcp(url)
    return url


class ModelConfig(StrictModel):
    """The policy. The learner loads it; actors get its configuration and weights over the wire."""

    path: str
    """Hub name, or a folder with config, safetensors and tokenizer files."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the trained weights."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    device: str = "auto"


class DataConfig(StrictModel):
    """Anything `datasets` loads: a hub name, or a .jsonl, .json, .parquet or .csv file."""

    train: str
    """Needs a ``prompt`` column; all other columns reach the reward functions by name."""
    train_split: str = "train"
    heldout: str | None = None
    """Prompts for the evaluation before and after training."""
    heldout_split: str = "train"


class EvalConfig(StrictModel):
    """Evaluation on held-out prompts, before the first step and after the last."""

    prompts: PositiveInt = 128
    num_rollouts: PositiveInt = 4
    temperature: Annotated[float, Field(ge=0, le=MAX_TEMPERATURE)] = 1.0
    timeout_s: PositiveFloat = 600.0


class BufferConfig(StrictModel):
    """The replay buffer."""

    sampling: Literal["fifo", "freshest"] = "fifo"
    max_groups: PositiveInt = 4096
    max_bytes: PositiveInt = 1 << 30
    max_uses: PositiveInt = 1
    """How often a group may be trained on."""
    durability: Literal["journal", "memory"] = "journal"
    """``journal``: a group is on disk before it is acknowledged, so that a killed learner goes on
    with every one of them."""
    journal_max_bytes: PositiveInt = 8 << 30
    """A checkpoint is made when the journal holds more, and frees what is trained."""
    lag: NonNegativeInt | None = None
    """Hold every batch back, so that from step lag + 1 on it is exactly so many versions stale: an
    experiment on staleness, in which generation and training take turns."""

    @model_validator(mode="after")
    def _a_lag_needs_order(self) -> Self:
        if self.lag is not None and self.sampling != "fifo":
            raise ValueError('buffer.lag needs buffer.sampling = "fifo"')
        return self


class CheckpointsConfig(StrictModel):
    """What a run can go on from."""

    every_steps: PositiveInt = 25
    """Training batches between two checkpoints; there is one at the end of the run as well."""
    keep: Annotated[int, Field(ge=2)] = 2
    """Newest ones; the others are deleted."""


class WeightsConfig(StrictModel):
    """The weight push."""

    backend: Literal["auto", "nccl", "gloo", "shared", "stream"] = "auto"
    """``nccl`` and ``gloo`` broadcast, without encryption or authentication: naming one says that
    the network is private. ``shared`` is for actors on this machine; with ``stream`` every actor
    pulls from the learner's socket. ``auto``: on loopback NCCL or gloo, beyond it ``stream``."""
    timeout_s: Annotated[float, Field(gt=0, le=MAX_COLLECTIVE_S)] = 10.0
    """Longest wait of a push without progress: for actors to meet, for a bucket, for a
    confirmation."""
    push_timeout_s: Annotated[float, Field(gt=0, le=MAX_COLLECTIVE_S)] = 60.0
    """Longest push; actors that are later catch up by themselves."""
    push_every: PositiveInt = 1
    """Training batches between two pushes; the last version is pushed in any case.

    A push overlaps the next training steps by itself, at 1 too: it has a thread of its own, and
    actors go on generating. More than 1 saves the time of packing, sending and loading, and costs
    staleness: actors are up to push_every - 1 versions behind when a push begins. So
    training.max_staleness must be at least push_every + buffer.max_uses - 2; at exactly that
    nothing is leased while a push goes on.
    """
    bucket_bytes: Annotated[int, Field(gt=0, multiple_of=CHUNK_BYTES)] = 4 << 20
    """Weights in one broadcast call; whole MiB."""
    compress: bool = False
    """Compress weights that are pulled in full (differences always are): for slow links."""
    address: IPv4Address | None = None
    """Of this machine, where actors reach the broadcast; None: that of endpoints.bind."""


class KeysConfig(StrictModel):
    """CURVE keys, made by `gdpo keygen`: who may connect to the learner, over an encrypted link."""

    secret: str | None = None
    """The learner's own key, a ``.key_secret`` file."""
    allowed: str | None = None
    """Folder of the actors' public keys, ``.key`` files; they may come and go while it runs."""
    actor: str | None = None
    """The ``.key_secret`` file of the actors that `gdpo run` starts."""

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if (self.secret is None) != (self.allowed is None):
            raise ValueError("set keys.secret and keys.allowed, or none of them")
        if self.actor is not None and self.secret is None:
            raise ValueError("keys.actor needs keys.secret and keys.allowed")
        return self


class TrainingConfig(StrictModel):
    """What a training step is made of, and how far generation may run ahead of it."""

    steps: PositiveInt = 100
    """Training batches."""
    batch_groups: PositiveInt = 32
    """Prompts P in a training batch."""
    minibatches: PositiveInt = 4
    """Optimiser steps per training batch."""
    microbatch_sequences: PositiveInt = 64
    """Sequences in one forward and backward pass: lower it when memory runs out."""
    max_staleness: NonNegativeInt = 4
    """Oldest policy version, in training batches back, that a group may contain."""
    threads: NonNegativeInt = 0
    """CPU threads of the trainer; 0 leaves torch's choice."""
    pause_per_step_s: NonNegativeFloat = 0.0
    """Sleep after every step: to watch back-pressure work, and to test it."""


class OptimizerConfig(StrictModel):
    """AdamW, and the learning rate over the run."""

    lr: PositiveFloat = 1e-6
    warmup_steps: NonNegativeInt = 0
    """Batches over which the learning rate rises linearly."""
    lr_schedule: Literal["constant", "linear"] = "constant"
    """After the warm-up: stay, or fall linearly to 0 at the last step."""
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    weight_decay: NonNegativeFloat = 0.0
    max_grad_norm: PositiveFloat = 1.0


class EndpointsConfig(StrictModel):
    """Where the learner listens."""

    bind: Annotated[str, AfterValidator(_is_address)] = "tcp://127.0.0.1:5555"
    """Where actors connect; port 0 takes any free one. Beyond loopback it needs `keys`."""
    metrics_host: str = "127.0.0.1"
    metrics_port: Annotated[int, Field(ge=0, le=65_535)] = 9400
    """Prometheus endpoint; 0 takes any free port."""


class DeadlinesConfig(StrictModel):
    """How long the learner waits for its actors."""

    lease_timeout_s: PositiveFloat = 600.0
    """An actor that has not returned a group after so long loses it to another."""
    actor_timeout_s: PositiveFloat = 10.0
    """An actor that is silent for so long is lost."""
    join_timeout_s: PositiveFloat = 300.0
    """Longest time from an actor's hello to its first weights."""
    wait_for_actors_s: PositiveFloat = 600.0
    """Without any live actor for so long, the run ends with an error."""


class AdmissionConfig(StrictModel):
    """Which actors may join."""

    max_actors: PositiveInt = 1024
    """More are refused."""
    self_check: bool = True
    """Compare the log-probabilities of every new actor with the learner's before it gets work."""
    check_limit: PositiveFloat | None = None
    """Mean difference above which an actor is refused; None: 0.001 in float32, else 0.05."""


class LaunchConfig(StrictModel):
    """What `gdpo run` starts on this machine."""

    actors: PositiveInt = 2
    actor_threads: PositiveInt = 1
    """CPU threads of each actor."""
    start_timeout_s: PositiveFloat = 3600.0
    """For the learner to load model and data, downloads included."""
    max_restarts: NonNegativeInt = 10
    """Of dead actors, in the whole run."""


class RunConfig(StrictModel):
    """The whole tree."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """Of the run folder ``runs/NAME``."""
    runs_folder: str = "runs"
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    model: ModelConfig
    data: DataConfig
    rewards: Annotated[tuple[RewardConfig, ...], Field(min_length=1)]
    algorithm: AlgorithmConfig = AlgorithmConfig()
    sampling: SamplingConfig = SamplingConfig()
    training: TrainingConfig = TrainingConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    endpoints: EndpointsConfig = EndpointsConfig()
    deadlines: DeadlinesConfig = DeadlinesConfig()
    admission: AdmissionConfig = AdmissionConfig()
    buffer: BufferConfig = BufferConfig()
    checkpoints: CheckpointsConfig = CheckpointsConfig()
    weights: WeightsConfig = WeightsConfig()
    keys: KeysConfig = KeysConfig()
    eval: EvalConfig = EvalConfig()
    actor: ActorConfig = ActorConfig()
    launch: LaunchConfig = LaunchConfig()

    @model_validator(mode="after")
    def _parts_agree(self) -> Self:
        names = [reward.name for reward in self.rewards]
        if len(set(names)) < len(names):
            raise ValueError("two rewards have the same name; give each its own")
        for reward in self.rewards:
            for when in (reward.when, *(update.when for update in reward.schedule)):
                if when and when.reward not in names:
                    raise ValueError(
                        f"rewards.{reward.name}.when names {when.reward!r}; "
                        f"the rewards are {', '.join(names)}"
                    )
            if reward.schedule and reward.schedule[-1].from_step > self.training.steps:
                raise ValueError(
                    f"rewards.{reward.name}.schedule goes up to step "
                    f"{reward.schedule[-1].from_step}, the run up to {self.training.steps}"
                )
        if {"rewards", "sampling"} & self.actor.model_fields_set:
            raise ValueError("write [[rewards]] and [sampling] at the top level, not below [actor]")
        if self.actor.engine == "vllm":
            for what, value in (
                ("sampling.temperature", self.sampling.temperature),
                ("eval.temperature", self.eval.temperature),
            ):
                if value != 0 and not 0.01 <= value <= 2:
                    raise ValueError(f"{what} = {value:g}: vLLM takes 0.01 to 2")
        if self.buffer.journal_max_bytes < self.buffer.max_bytes:
            raise ValueError(
                f"buffer.journal_max_bytes = {self.buffer.journal_max_bytes} is below "
                f"buffer.max_bytes = {self.buffer.max_bytes}: the journal holds what the buffer "
                "does"
            )
        sequences = self.training.batch_groups * self.sampling.num_rollouts
        if sequences < self.training.minibatches:
            raise ValueError(
                f"training.minibatches = {self.training.minibatches} exceeds the {sequences} "
                "sequences of a batch"
            )
        return self

    @model_validator(mode="after")
    def _network_is_guarded(self) -> Self:
        host, _ = parse_tcp(self.endpoints.bind)
        if self.keys.secret is None and not is_loopback(host):
            raise ValueError(
                f"endpoints.bind = {self.endpoints.bind} is reachable from other machines, which "
                "needs keys: make them with gdpo keygen, then set keys.secret and keys.allowed; "
                "without keys use tcp://127.0.0.1:PORT"
            )
        address = self.collective_address
        if address is not None and not is_loopback(address) and not _is_ipv4(address):
            raise ValueError(
                f'weights.backend = "{self.weights.backend}" needs an IPv4 address of this '
                "machine, and endpoints.bind names none: set weights.address"
            )
        return self

    @property
    def collective_address(self) -> str | None:
        """Where the broadcast of weights listens; None if there is none."""
        host, _ = parse_tcp(self.endpoints.bind)
        address = str(self.weights.address or host)
        wanted = self.weights.backend in ("nccl", "gloo")
        if self.weights.backend == "auto":
            wanted = is_loopback(host) and is_loopback(address)
        return address if wanted else None

    def load_keys(self) -> KeyPair | None:
        """The learner's own key, None without; raises `ConfigError`, for the other files too."""
        keys = self.keys
        if keys.secret is None or keys.allowed is None:
            return None
        if not Path(keys.allowed).is_dir():
            raise ConfigError(f"keys.allowed = {keys.allowed}: no such folder")
        if keys.actor is not None:
            actor = load_key(Path(keys.actor))
            if not AllowList(Path(keys.allowed)).allows(actor.public):
                raise ConfigError(
                    f"the key of keys.actor = {keys.actor} is not in keys.allowed = "
                    f"{keys.allowed}: copy its .key file there"
                )
        return load_key(Path(keys.secret))

    def pacing(self) -> Pacing:
        """How many leases may be out; raises `ConfigError` for limits that could never be kept."""
        return Pacing(
            max_staleness=self.training.max_staleness,
            batch_groups=self.training.batch_groups,
            steps=self.training.steps,
            max_groups=self.buffer.max_groups,
            max_bytes=self.buffer.max_bytes,
            group_bytes=largest_group_bytes(
                self.sampling.num_rollouts,
                self.sampling.max_prompt_tokens,
                self.sampling.max_tokens,
                len(self.rewards),
            ),
            max_uses=self.buffer.max_uses,
            lag=self.buffer.lag,
            push_every=self.weights.push_every,
        )

    def for_actors(self) -> ActorConfig:
        """What goes into the welcome."""
        dtype = self.model.dtype if self.actor.dtype == "auto" else self.actor.dtype
        return self.actor.model_copy(
            update={"rewards": self.rewards, "sampling": self.sampling, "dtype": dtype}
        )

    def to_toml(self) -> str:
        """The resolved configuration; reading it back gives the same run."""
        tree = self.model_dump(mode="json", exclude_none=True)
        for part in ("rewards", "sampling"):
            del tree["actor"][part]
        return tomli_w.dumps(tree)


def _is_ipv4(host: str) -> bool:
    try:
        return not IPv4Address(host).is_unspecified
    except ValueError:
        return False
