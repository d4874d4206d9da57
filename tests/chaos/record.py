"""The flight recorder: what really happened, written down by each process where it happens.

It does not trust the product's own counters: `tests.chaos.audit` compares the two. All processes
append to one file; a line is one write, which the kernel does not mix with others. Times are of
the machine's monotonic clock, so they compare between processes.
"""

import json
import os
import time
from pathlib import Path
from typing import Any

import torch
import xxhash

from tests.chaos.points import wrap

Event = dict[str, Any]


class Record:
    """Appends events."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def write(self, event: str, **fields: Any) -> None:
        line = {"event": event, "at": time.monotonic(), "pid": os.getpid(), **fields}
        os.write(self._file, json.dumps(line).encode() + b"\n")


class Tail:
    """What is appended to a record from now on; reading all of it again takes ever longer."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0

    def read(self) -> list[Event]:
        """Complete lines since the last call; the last line may be of a process that died while it
        wrote."""
        if not self._path.exists():
            return []
        with self._path.open("rb") as file:
            file.seek(self._offset)
            lines = file.read()
        lines = lines[: lines.rfind(b"\n") + 1]
        self._offset += len(lines)
        return [json.loads(line) for line in lines.splitlines()]


def read(path: Path) -> list[Event]:
    """All complete lines."""
    return Tail(path).read()


def record_actor(record: Record) -> None:
    """Write down what an actor in this process is told of its groups."""

    def received(_: tuple[Any, ...], message: Any) -> None:
        header, _payloads = message
        if type(header).__name__ == "Ack":
            record.write("acked", lease=header.lease, verdict=header.verdict)

    def confirms(arguments: tuple[Any, ...]) -> None:
        message = arguments[1]
        if type(message).__name__ == "WeightsReady":
            record.write(
                "confirmed", version=message.version, digest=message.digest, route=message.route
            )

    wrap("actors.link:LearnerLink.receive", after=received)
    wrap("actors.link:LearnerLink.send", before=confirms)


def record_learner(record: Record) -> None:
    """Write down leases, batches, steps, weights and actors of a learner in this process."""

    def leased(arguments: tuple[Any, ...], lease: Any) -> None:
        _, work, holder, *_ = arguments
        record.write(
            "leased",
            lease=lease.lease,
            prompt=work.prompt_id,
            purpose=work.purpose,
            prompt_index=work.prompt_index,
            seed=work.seed,
            session=holder,
        )

    def taken(arguments: tuple[Any, ...], batch: Any) -> None:
        if batch is not None:
            record.write(
                "trained",
                version=arguments[2],
                leases=[group.lease for group in batch.groups],
                prompt_indices=batch.prompt_indices,
                oldest=[group.oldest_version for group in batch.groups],
            )

    wrap("protocol.leases:LeaseBook.issue", after=leased)
    wrap(
        "protocol.leases:LeaseBook.receive",
        before=lambda a: record.write("received", lease=a[1].number, session=a[1].holder),
    )
    wrap(
        "protocol.leases:LeaseBook.fail",
        before=lambda a: record.write("failed", lease=a[1].number, cause=a[2]),
    )

    def added(arguments: tuple[Any, ...]) -> None:
        group = arguments[1]
        record.write("added", lease=group.lease, versions=sorted(group.versions))

    def published(arguments: tuple[Any, ...]) -> None:
        snapshot = arguments[1]
        record.write(
            "published",
            version=snapshot.version,
            digest=snapshot.digest,
            content=content(snapshot.packed),
        )

    def retaken(arguments: tuple[Any, ...], batch: Any) -> None:
        record.write("trained_again", version=arguments[3], prompt_indices=batch.prompt_indices)

    wrap("learner.replay.buffer:ReplayBuffer.take", after=taken)
    wrap("learner.replay.buffer:ReplayBuffer.retake", after=retaken)
    wrap("learner.replay.buffer:ReplayBuffer.add", before=added)
    wrap("learner.weights.snapshots:SnapshotStore.publish", before=published)
    wrap(
        "learner.coordinator.admission:Admission.hello",
        after=lambda a, _: record.write("joined", session=a[1], actor_pid=a[2].pid),
    )
    wrap(
        "learner.registry:Registry.forget",
        before=lambda a: record.write("left", session=a[1].session, actor_pid=a[1].hello.pid),
    )
    _record_steps(record)
    _record_pushes(record)


def _record_steps(record: Record) -> None:
    """When the trainer computes, and when it is held up to give its weights away."""
    wrap(
        "learner.training.trainer:Trainer.step",
        before=lambda a: record.write("step", version=a[0].version + 1),
        after=lambda _, step: record.write("stepped", version=step.version, tokens=step.num_tokens),
    )
    wrap(
        "learner.run.loop:TrainingLoop._publish",
        before=lambda _: record.write("packing"),
        after=lambda *_: record.write("packed"),
    )


def _record_pushes(record: Record) -> None:
    """When each push begins and ends, to whom, and in which epoch."""
    wrap(
        "learner.weights.publisher:Publisher._push",
        before=lambda a: record.write(
            "push", version=a[1].version, sessions=[actor.session for actor in a[2]]
        ),
        after=lambda a, _: record.write("pushed", version=a[1].version),
    )
    wrap(
        "learner.weights.epochs:Epochs.broadcast",
        before=lambda a: record.write("broadcast", epoch=a[0].number, version=a[1].version),
    )


def content(packed: torch.Tensor) -> str:
    """A digest of packed weights as a whole: not by tensors, as the product's own digests are."""
    return xxhash.xxh3_128_hexdigest(packed.numpy().data)
