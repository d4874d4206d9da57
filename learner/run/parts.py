"""What a learner consists of before anybody can reach it, built from its configuration.

load       model and data: everything that the user may have got wrong
assemble   what decides, still without a connection to anybody
resume     (`learner.run.resumption`) where the learner before was left
connect    (`learner.run.connections`) ports, and the threads on them
"""

import time
from dataclasses import dataclass, fields
from functools import partial

import torch
from prometheus_client import CollectorRegistry

from learner.completions.files import CompletionFiles
from learner.completions.keeper import CompletionKeeper, TrainedOn
from learner.config.run import RunConfig
from learner.coordinator.admission import Greeting
from learner.coordinator.coordinator import Coordinator
from learner.coordinator.self_check import SelfCheck
from learner.pacing import Pacing
from learner.phases import Phases
from learner.prompts.rows import Row, load_heldout, load_rows
from learner.prompts.stream import PromptStream, check_work
from learner.prompts.work_queue import WorkQueue
from learner.recovery.checkpoints import Checkpoint
from learner.recovery.history import History
from learner.recovery.resume import load_trainer
from learner.replay.buffer import ReplayBuffer, TrainingBatch
from learner.run.follower import describe
from learner.run.progress import Progress
from learner.run.throughput import Throughput
from learner.run_folder import RunFolder
from learner.training.policy import Policy, load_tokenizer, with_dtype
from learner.training.ranks import Order, Ranks
from learner.training.reward_settings import RewardSchedule
from learner.training.trainer import StepResult, Trainer
from learner.weights.chunks import ChunkSource
from learner.weights.pack import MemoryPool, pack
from learner.weights.routes import Topology, topology_of
from learner.weights.snapshots import Snapshot, SnapshotStore
from learner.weights.stream import WeightsStream
from protocol.keys import KeyPair
from protocol.messages import Welcome
from protocol.observability import Heartbeat
from protocol.weights import item_bytes, total_bytes

CHECK_ROWS = 64
"""Rows that new actors are checked with, in turn: one of them may be unusable."""


@dataclass(frozen=True, slots=True, eq=False)
class Materials:
    """Model and data, and what is measured of them."""

    config: RunConfig
    folder: RunFolder
    registry: CollectorRegistry
    """Where everything registers its metrics for Prometheus."""
    phases: Phases
    keys: KeyPair | None
    heldout: list[list[Row]]
    """The rows of each of ``config.heldout_sets``; empty without any."""
    prompts: PromptStream
    heartbeat: Heartbeat
    """The main thread's: training and evaluations beat it."""
    policy: Policy
    trainer: Trainer
    topology: Topology
    rewards: RewardSchedule
    history: History
    buffer: ReplayBuffer


@dataclass(frozen=True, slots=True, eq=False)
class Parts(Materials):
    """Everything that a learner has before its ports open."""

    progress: Progress
    throughput: Throughput
    memory: MemoryPool
    snapshots: SnapshotStore
    weights_stream: WeightsStream
    work: WorkQueue
    pacing: Pacing
    completions: CompletionKeeper
    self_check: SelfCheck | None
    coordinator: Coordinator

    def packed(self) -> Snapshot:
        """Copy the weights of the trainer's version out of the model."""
        return _packed(self.trainer, self.policy, self.memory)

    def note(self, step: StepResult, batch: TrainingBatch) -> None:
        """Count a step, for pages and reports, and keep some of its completions."""
        self.progress.note(step)
        self.throughput.note(step.version, step.num_tokens, len(batch.groups) + batch.num_refilled)
        self.completions.add(
            TrainedOn(step.version, batch.groups, batch.prompt_indices, step.advantages_PG.numpy())
        )


def load(
    config: RunConfig, folder: RunFolder, checkpoint: Checkpoint | None, ranks: Ranks
) -> Materials:
    """Load model and data, the model as it was at ``checkpoint``; raises `ConfigError`.

    All other ranks are told to load it too.
    """
    config = with_dtype(config)
    if config.training.threads:
        torch.set_num_threads(config.training.threads)
    data, registry = config.data, CollectorRegistry()
    phases = Phases(registry)
    keys = config.load_keys()
    rows = load_rows(data.train, data.train_split)
    heldout = load_heldout(config.heldout_sets)
    prompts = PromptStream(rows, config)
    heartbeat = Heartbeat("trainer", limit_s=120.0)
    if ranks.size > 1:
        ranks.order(Order.LOAD, [describe(config, checkpoint)])
    policy, trainer = load_trainer(config, checkpoint, heartbeat.beat, ranks)
    return Materials(
        config=config,
        folder=folder,
        registry=registry,
        phases=phases,
        keys=keys,
        heldout=heldout,
        prompts=prompts,
        heartbeat=heartbeat,
        policy=policy,
        trainer=trainer,
        topology=topology_of(config, next(policy.model.parameters()).device),
        rewards=RewardSchedule(config.rewards, config.training.steps),
        history=History(folder, config, policy, phases),
        buffer=ReplayBuffer.of(config),
    )


def assemble(given: Materials) -> Parts:
    """Make the parts that decide; raises `ConfigError` for settings that do not fit together."""
    config, policy = given.config, given.policy
    checks = [check_work(row, config) for row in given.prompts.rows[:CHECK_ROWS]]
    self_check = None
    if config.admission.self_check:
        self_check = SelfCheck(policy, config, checks, given.trainer.way)
    memory = MemoryPool(
        total_bytes(policy.specs),
        pinned=any(parameter.is_cuda for parameter in policy.model.parameters()),
    )
    snapshots = SnapshotStore(_packed(given.trainer, policy, memory))
    weights_stream = WeightsStream(
        ChunkSource(snapshots, width=item_bytes(policy.specs), compress=config.weights.compress)
    )
    work, pacing = WorkQueue(given.prompts), config.pacing()
    coordinator = Coordinator(
        config,
        greeting=_greeting(given),
        work=work,
        buffer=given.buffer,
        pacing=pacing,
        snapshots=snapshots,
        vocab_size=policy.vocab_size,
        phases=given.phases,
        journal=given.history.journal,
        clock=time.monotonic,
        on_pull=weights_stream.pull,
        self_check=self_check,
    )
    return Parts(
        **{field.name: getattr(given, field.name) for field in fields(given)},
        progress=Progress(),
        throughput=Throughput(coordinator),
        memory=memory,
        snapshots=snapshots,
        weights_stream=weights_stream,
        work=work,
        pacing=pacing,
        completions=CompletionKeeper(
            CompletionFiles(given.folder.completions, max_bytes=config.completions.max_bytes),
            per_step=config.completions.per_step,
            seed=config.seed,
            load_tokenizer=partial(load_tokenizer, policy),
        ),
        self_check=self_check,
        coordinator=coordinator,
    )


def _greeting(given: Materials) -> Greeting:
    policy = given.policy
    welcome = Welcome(
        run_id=given.folder.run_id,
        actor=given.config.for_actors().model_dump(mode="json"),
        model_digest=policy.files_digest,
        files=tuple(policy.files),
        manifest=policy.manifest,
    )
    return Greeting(welcome, tuple(policy.files.values()))


def _packed(trainer: Trainer, policy: Policy, memory: MemoryPool) -> Snapshot:
    trainer.ranks.order(Order.GATHER_WEIGHTS)
    with trainer.ranks.explained():
        return pack(trainer.version, policy.model, policy.specs, memory)
