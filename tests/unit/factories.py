"""Tiny groups, configurations and models, and a learner without sockets, for the unit tests."""

from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from prometheus_client import CollectorRegistry

from learner.config.run import RunConfig
from learner.coordinator.admission import Greeting
from learner.coordinator.coordinator import Coordinator
from learner.phases import Phases
from learner.prompts.stream import PromptStream
from learner.prompts.work_queue import WorkQueue
from learner.replay.buffer import ReplayBuffer
from learner.replay.journal import Journal
from learner.weights.chunks import ChunkSource
from learner.weights.pack import MemoryPool, pack
from learner.weights.snapshots import Snapshot, SnapshotStore
from protocol.errors import BadMessage
from protocol.framing import Buffer, decode_to_learner, encode
from protocol.groups import Group, Rollout, pack_group
from protocol.leases import Work
from protocol.messages import (
    PROTOCOL_VERSION,
    Ack,
    GroupHeader,
    Header,
    Hello,
    Lease,
    Status,
    ToLearner,
    WeightsPull,
    WeightsReady,
    Welcome,
)
from protocol.weights import TensorSpec, layout, total_bytes

REWARDS = ("format", "correctness")
VOCAB = 50
HeaderT = TypeVar("HeaderT", bound=Header)


class FakeClock:
    """Time that passes only when the test says so."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


def make_config(**sections: dict[str, Any]) -> RunConfig:
    """Ten steps of two groups of two rollouts each, at most one version stale."""
    tree: dict[str, Any] = {
        "name": "test",
        "model": {"path": "nowhere"},
        "data": {"train": "nowhere.jsonl"},
        "rewards": [{"name": name, "function": f"tasks:{name}"} for name in REWARDS],
        "sampling": {"num_rollouts": 2, "max_tokens": 8, "max_prompt_tokens": 8},
        "training": {"steps": 10, "batch_groups": 2, "minibatches": 1, "max_staleness": 1},
        "deadlines": {
            "lease_timeout_s": 60,
            "actor_timeout_s": 10,
            "join_timeout_s": 100,
            "wait_for_actors_s": 200,
        },
        "admission": {"self_check": False},
    }
    for name, section in sections.items():
        tree[name] = {**tree.get(name, {}), **section}
    return RunConfig.model_validate(tree)


def make_rollout(length: int = 3, spans: Sequence[tuple[int, int]] = ((0, 0),)) -> Rollout:
    return Rollout(
        tokens=np.arange(length, dtype=np.int32) % VOCAB,
        logprobs=np.full(length, -0.5, dtype=np.float32),
        spans=tuple(spans),
        finish="stop",
    )


def make_group(
    lease: int = 1,
    *,
    version: int = 0,
    lengths: Sequence[int] = (3, 2),
    scores: Sequence[Sequence[float]] | None = None,
) -> Group:
    """A group of ``len(lengths)`` rollouts, all sampled from ``version``."""
    if scores is None:
        scores = [[float(g), 1.0] for g in range(len(lengths))]
    return Group(
        lease=lease,
        prompt_tokens=np.array([7, 8], dtype=np.int32),
        rollouts=tuple(make_rollout(length, [(0, version)]) for length in lengths),
        reward_names=REWARDS,
        scores=np.array(scores, dtype=np.float32),
    )


def make_work(name: str = "row", purpose: Any = "train") -> Work:
    return Work(
        prompt_id=name,
        row={"prompt": name},
        seed=1,
        num_rollouts=2,
        temperature=1.0,
        max_tokens=8,
        purpose=purpose,
    )


def make_status(**changes: Any) -> Status:
    values = {
        "sequence": 1,
        "capacity": 4,
        "version": 0,
        "loading": -1,
        "leases": (),
        "heard": -1,
        "tokens_generated": 0,
        "groups_generated": 0,
        "idle_seconds": 0.0,
        "stall_seconds": 0.0,
        "uptime_seconds": 0.0,
    }
    return Status(**{**values, **changes})


def make_model(value: float = 0.0) -> tuple[torch.nn.Module, list[TensorSpec]]:
    """A model of eight float32 numbers and its layout."""
    model = torch.nn.Linear(3, 2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)
    return model, layout((n, "float32", tuple(p.shape)) for n, p in model.named_parameters())


def make_snapshot(version: int) -> Snapshot:
    return pack_alone(version, *make_model(float(version)))


def pack_alone(version: int, model: torch.nn.Module, specs: list[TensorSpec]) -> Snapshot:
    """A snapshot whose memory nobody uses again."""
    return pack(version, model, specs, MemoryPool(total_bytes(specs)))


class Cluster:
    """A real coordinator between fake actors, which speak to it in encoded messages."""

    def __init__(
        self,
        config: RunConfig | None = None,
        num_rows: int = 6,
        journal: Journal | None = None,
        self_check: Any = None,
        clock: Any = None,
    ) -> None:
        self.config = config or make_config()
        self.clock = clock or FakeClock()
        self.buffer = ReplayBuffer.of(self.config)
        self.snapshots = SnapshotStore(make_snapshot(0), self.clock)
        self.chunks = ChunkSource(self.snapshots, width=4)
        rows = [{"prompt": f"p{i}"} for i in range(num_rows)]
        self.stream = PromptStream(rows, self.config)
        self.work = WorkQueue(self.stream)
        self.pacing = self.config.pacing()
        self.phases = Phases(CollectorRegistry())
        self.coordinator = Coordinator(
            self.config,
            greeting=Greeting(
                Welcome(
                    run_id="test/1",
                    actor={},
                    model_digest="m1",
                    files=("tokenizer.json",),
                    manifest=(),
                ),
                (b"{}",),
            ),
            work=self.work,
            buffer=self.buffer,
            pacing=self.pacing,
            snapshots=self.snapshots,
            vocab_size=VOCAB,
            phases=self.phases,
            clock=self.clock,
            journal=journal,
            on_pull=self.answer,
            self_check=self_check,
        )
        self.version = 0
        self._inboxes: dict[str, list[tuple[Header, tuple[Buffer, ...]]]] = {}

    # --- what actors do -------------------------------------------------------------------------

    def say(self, session: str, message: ToLearner, payloads: Sequence[Buffer] = ()) -> None:
        self.coordinator.handle(session, *decode_to_learner(encode(message, payloads)))

    def receive(self, session: str, frames: Sequence[Buffer]) -> None:
        """Any frames at all, as `learner.coordinator.intake` takes them."""
        try:
            message, payloads = decode_to_learner(frames)
        except BadMessage as error:
            self.coordinator.bad_message(session, error)
            return
        self.coordinator.handle(session, message, payloads)

    def heard(self, session: str, kind: type[HeaderT]) -> list[HeaderT]:
        """Messages of one kind to an actor since this was last asked."""
        return [header for header, _ in self.heard_with_payloads(session, kind)]

    def heard_with_payloads(
        self, session: str, kind: type[HeaderT]
    ) -> list[tuple[HeaderT, tuple[Buffer, ...]]]:
        # As intake does before it sends.
        self.coordinator.issue()
        while self.coordinator.outbox:
            message = self.coordinator.outbox.pop()
            self._inboxes.setdefault(message.session, []).append((message.header, message.payloads))
        inbox = self._inboxes.get(session, [])
        found = [(header, payloads) for header, payloads in inbox if isinstance(header, kind)]
        self._inboxes[session] = [item for item in inbox if not isinstance(item[0], kind)]
        return found

    def forget_messages(self) -> None:
        """Drop all that actors were told."""
        while self.coordinator.outbox:
            self.coordinator.outbox.pop()
        self._inboxes.clear()

    def hello(self, session: str, /, **changes: Any) -> None:
        values = {"protocol": PROTOCOL_VERSION, "session": session}
        self.say(session, Hello(**{**values, **changes}))

    def status(self, session: str, capacity: int = 4, **changes: Any) -> None:
        self.say(session, make_status(capacity=capacity, **changes))

    def weights_ready(
        self, session: str, version: int = 0, digest: str | None = None, route: Any = "stream"
    ) -> None:
        snapshot = make_snapshot(version)
        message = WeightsReady(
            version=version,
            digest=snapshot.digest if digest is None else digest,
            route=route,
            receive_seconds=0,
            load_seconds=0,
        )
        self.say(session, message, [snapshot.digests])

    def join(self, session: str, capacity: int = 4) -> None:
        """Hello, the current weights, and room for ``capacity`` leases."""
        self.hello(session)
        self.weights_ready(session, self.version)
        self.status(session, capacity)

    def leases(self, session: str) -> list[int]:
        """Numbers of the leases that came since this was last asked."""
        return [lease.lease for lease in self.heard(session, Lease)]

    def finish(self, session: str, lease: int, **group: Any) -> Ack:
        """Send a group for a lease; returns its acknowledgement."""
        self.say(session, *self.group_message(lease, **group))
        [ack] = self.heard(session, Ack)
        return ack

    def group_message(self, lease: int, **group: Any) -> tuple[GroupHeader, list[Buffer]]:
        return pack_group(make_group(lease, **{"version": self.version, **group}))

    # --- what the learner does ------------------------------------------------------------------

    def answer(self, session: str, pull: WeightsPull) -> None:
        """At once; a real learner has a thread for it."""
        self.coordinator.answer_pull(session, self.chunks.answer(pull))

    def ready(self, version: int = 0) -> list[str]:
        """Sessions that may get work and sample from ``version`` or later."""
        return [actor.session for actor in self.coordinator.ready_actors(version)]

    def open_training(self) -> None:
        self.coordinator.open_training()
        self.coordinator.tick()

    def pass_time(self, seconds: float) -> None:
        self.clock.advance(seconds)
        self.coordinator.tick()

    def train(self) -> bool:
        """One training step, if there is a batch."""
        batch = self.buffer.take(self.config.training.batch_groups, self.version, timeout_s=0)
        if batch is None:
            return False
        self.version += 1
        self.coordinator.advance(self.version)
        if self.pacing.is_pushed(self.version):
            self.snapshots.publish(make_snapshot(self.version))
        return True


def joined(
    *sessions: str, capacity: int = 4, clock: Any = None, **sections: dict[str, Any]
) -> Cluster:
    """Training is open, and these actors have joined."""
    cluster = Cluster(make_config(**sections), clock=clock)
    for session in sessions:
        cluster.join(session, capacity)
    cluster.open_training()
    return cluster
