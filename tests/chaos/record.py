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

from tests.chaos.points import wrap


class Record:
    """Appends events."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def write(self, event: str, **fields: Any) -> None:
        line = {"event": event, "at": time.monotonic(), "pid": os.getpid(), **fields}
        os.write(self._file, json.dumps(line).encode() + b"\n")


def read(path: Path) -> list[dict[str, Any]]:
    """All complete lines; the last one may be of a process that died while it wrote."""
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")[:-1]
    return [json.loads(line) for line in lines]


def record_actor(record: Record) -> None:
    """Write down what an actor in this process is told of its groups."""

    def received(_: tuple[Any, ...], message: Any) -> None:
        header, _payloads = message
        if type(header).__name__ == "Ack":
            record.write("acked", lease=header.lease, verdict=header.verdict)

    wrap("actors.link:LearnerLink.receive", after=received)


def record_learner(record: Record) -> None:
    """Write down leases, batches, weights and actors of a learner in this process."""

    def leased(arguments: tuple[Any, ...], lease: Any) -> None:
        _, work, holder, *_ = arguments
        record.write(
            "leased",
            lease=lease.lease,
            prompt=work.prompt_id,
            purpose=work.purpose,
            ticket=work.ticket,
            seed=work.seed,
            session=holder,
        )

    def taken(arguments: tuple[Any, ...], cut: Any) -> None:
        if cut is not None:
            record.write(
                "trained",
                version=arguments[2],
                leases=[group.lease for group in cut.groups],
                tickets=cut.tickets,
                oldest=[group.oldest_version for group in cut.groups],
            )

    wrap("protocol.leases:LeaseBook.issue", after=leased)
    wrap(
        "protocol.leases:LeaseBook.receive",
        before=lambda a: record.write("received", lease=a[1].lease, session=a[1].holder),
    )
    wrap(
        "protocol.leases:LeaseBook.fail",
        before=lambda a: record.write("failed", lease=a[1].lease, cause=a[2]),
    )

    def retaken(arguments: tuple[Any, ...], cut: Any) -> None:
        record.write("trained_again", version=arguments[3], tickets=cut.tickets)

    wrap("learner.buffer:ReplayBuffer.take", after=taken)
    wrap("learner.buffer:ReplayBuffer.retake", after=retaken)
    wrap(
        "learner.snapshots:SnapshotStore.publish",
        before=lambda a: record.write("published", version=a[1].version, digest=a[1].digest),
    )
    wrap(
        "learner.newcomers:Newcomers.hello",
        after=lambda a, _: record.write("joined", session=a[1], actor_pid=a[2].pid),
    )
    wrap(
        "learner.roster:Roster.forget",
        before=lambda a: record.write("left", session=a[1].session, actor_pid=a[1].hello.pid),
    )
