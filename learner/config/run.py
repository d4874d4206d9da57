"""The whole configuration of a run, and what its sections must agree on."""

from pathlib import Path
from typing import Annotated, Self

import tomli_w
from pydantic import Field, model_validator

from learner.config.actors import (
    AdmissionConfig,
    DeadlinesConfig,
    EndpointsConfig,
    KeysConfig,
    LaunchConfig,
)
from learner.config.algorithm import AlgorithmConfig
from learner.config.data import DataConfig, EvalConfig, HeldoutSet, ModelConfig, heldout_sets
from learner.config.training import (
    BufferConfig,
    CheckpointsConfig,
    CompletionsConfig,
    OptimizerConfig,
    TrainingConfig,
)
from learner.config.weights import WeightsConfig, is_ipv4
from learner.pacing import Pacing, largest_group_bytes
from protocol.config import ActorConfig, ActorSection, RewardConfig, SamplingConfig, StrictModel
from protocol.errors import ConfigError
from protocol.keys import AllowList, KeyPair, load_key
from protocol.sockets import is_loopback, parse_tcp


class RunConfig(StrictModel):
    """The configuration of a run. These keys stand before the first section."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """Name of the run and of its folder; the configuration file's name where none is given."""
    runs_folder: str = "runs"
    """Folder in which run folders are made; relative to where the command is started."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of everything random: the order of prompts and of minibatches, and the sampling."""
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
    completions: CompletionsConfig = CompletionsConfig()
    weights: WeightsConfig = WeightsConfig()
    keys: KeysConfig = KeysConfig()
    eval: EvalConfig = EvalConfig()
    actor: ActorSection = ActorSection()
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
        if self.actor.engine == "vllm":
            for what, value in (
                ("sampling.temperature", self.sampling.temperature),
                ("eval.temperature", self.eval.temperature),
                *((f"eval.sets.{s.name}.temperature", s.temperature) for s in self.heldout_sets),
            ):
                if value != 0 and not 0.01 <= value <= 2:
                    raise ValueError(f"{what} = {value:g}: vLLM takes 0.01 to 2")
        if self.buffer.journal_max_bytes < self.buffer.max_bytes:
            raise ValueError(
                f"buffer.journal_max_bytes = {self.buffer.journal_max_bytes} is below "
                f"buffer.max_bytes = {self.buffer.max_bytes}: the journal holds what the buffer "
                "does"
            )
        if self.training.batch_groups < self.training.minibatches:
            raise ValueError(
                f"training.minibatches = {self.training.minibatches} exceeds "
                f"training.batch_groups = {self.training.batch_groups}: a minibatch takes whole "
                "groups"
            )
        return self

    @model_validator(mode="after")
    def _can_be_evaluated(self) -> Self:
        sets, names = self.heldout_sets, [reward.name for reward in self.rewards]
        if self.eval.every_steps and not sets:
            raise ValueError(
                f"eval.every_steps = {self.eval.every_steps}, but there is nothing to evaluate on: "
                "set data.heldout or eval.sets"
            )
        when = self.eval.pass_when
        if when is not None and when.reward not in names:
            raise ValueError(
                f"eval.pass_when names {when.reward!r}; the rewards are {', '.join(names)}"
            )
        return self

    @model_validator(mode="after")
    def _refills_need_no_lag(self) -> Self:
        if self.algorithm.no_signal == "refill" and self.buffer.lag is not None:
            raise ValueError(
                'algorithm.no_signal = "refill" does not go with buffer.lag: what takes the place '
                "of a group is sampled from a later version; leave one of them out"
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
        if address is not None and not is_loopback(address) and not is_ipv4(address):
            raise ValueError(
                f'weights.backend = "{self.weights.backend}" needs an IPv4 address of this '
                "machine, and endpoints.bind names none: set weights.address"
            )
        return self

    @property
    def heldout_sets(self) -> tuple[HeldoutSet, ...]:
        """The sets of prompts to evaluate on, in their order; empty without any."""
        return heldout_sets(self.data, self.eval)

    @property
    def collective_address(self) -> str | None:
        """Host where the broadcast of weights listens; None if there is none."""
        host, _ = parse_tcp(self.endpoints.bind)
        address = str(self.weights.address or host)
        wanted = self.weights.backend in ("nccl", "gloo")
        if self.weights.backend == "auto":
            wanted = is_loopback(host) and is_loopback(address)
        return address if wanted else None

    @property
    def all_pull(self) -> bool:
        """Whether every actor pulls its weights, as there is no other way to any of them."""
        backend = self.weights.backend
        return backend == "stream" or (backend == "auto" and self.collective_address is None)

    def load_keys(self) -> KeyPair | None:
        """Read the learner's own key, None without.

        Raises `ConfigError`, for the other files of ``[keys]`` too.
        """
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
        """Build the rule of how many leases may be out.

        Raises `ConfigError` for limits that could never be kept.
        """
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
        """Resolve what every actor gets in its welcome."""
        section = dict(self.actor)
        if self.actor.dtype == "auto":
            section["dtype"] = self.model.dtype
        return ActorConfig(**section, sampling=self.sampling, rewards=self.rewards)

    def to_toml(self) -> str:
        """Print the resolved configuration; reading it back gives the same run."""
        return tomli_w.dumps(self.model_dump(mode="json", exclude_none=True))
