"""The learner's part in broadcasts: epochs of fixed members, on a side thread.

    members as before ─► stay in the epoch ─────────────┐
    others            ─► next epoch: new name, meet ────┴─► broadcast ─► ... ─► end, for a cause

A broadcast cannot be interrupted. One that is given up goes on until its deadline in its thread,
which changes nothing any more: the next epoch has another name, and another process group.
"""

import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from threading import Thread

import msgspec
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from learner.weights.snapshots import Snapshot
from protocol.errors import CollectiveError, brief
from protocol.messages import Weights
from transfer.collective import BUCKETS_BEGUN, Backend, BroadcastGroup, host_store

log = logging.getLogger("learner")

EPOCHS_REMEMBERED = 20


@dataclass(slots=True)
class EpochRecord:
    """One row of the table of epochs."""

    epoch: int
    backend: str
    members: list[int]
    """Numbers of the actors."""
    first_version: int
    pushes: int = 0
    form_seconds: float = 0.0
    ended: str = ""
    """Why; empty while it lasts."""


@dataclass(slots=True, eq=False)
class Broadcast:
    """One broadcast, as far as it has got."""

    done: bool = False
    error: str = ""
    missing: tuple[str, ...] = ()
    """Members that did not come, as far as that is known."""
    join_seconds: float = 0.0
    """0 until all have met."""


@dataclass(slots=True, eq=False)
class _Epoch:
    members: dict[str, int]
    """Actors' numbers by session, in the order of ranks from 1."""
    record: EpochRecord
    process_group: BroadcastGroup | None = None
    """One of `torch.distributed`; it has nothing to do with groups of rollouts."""
    over: bool = False


class Epochs:
    """One epoch at a time, or none; all methods are for the publisher's thread."""

    def __init__(
        self, backend: Backend, address: str, *, timeout_s: float, bucket_bytes: int
    ) -> None:
        self._backend = backend
        self._timeout_s = timeout_s
        self._bucket_bytes = bucket_bytes
        self._store: TCPStore
        self._store, self._port = host_store(address, timeout_s)
        self._epoch: _Epoch | None = None
        self._number = 0
        self.records: deque[EpochRecord] = deque(maxlen=EPOCHS_REMEMBERED)
        """The newest last."""

    @property
    def number(self) -> int:
        """Number of the current epoch, or of the last one."""
        return self._number

    @property
    def lasts(self) -> bool:
        """Whether there is an epoch now."""
        return self._epoch is not None

    def enter(self, members: dict[str, int], version: int) -> tuple[str, ...]:
        """Enter an epoch of exactly these; returns those that were not in the one before.

        Numbers decide it: an actor that said hello again has left, and kept its session.
        """
        before = self._epoch.members if self._epoch else {}
        if self._epoch is not None and members == before:
            return ()
        self.end(_change(before, members))
        if members:
            self._number += 1
            record = EpochRecord(self._number, self._backend.name, list(members.values()), version)
            self._epoch = _Epoch(members, record)
            self.records.append(record)
        return tuple(session for session, n in members.items() if before.get(session) != n)

    def offers(self, snapshot: Snapshot) -> dict[str, Weights]:
        """What each member is told."""
        assert self._epoch is not None
        members = self._epoch.members
        return {
            session: msgspec.structs.replace(
                snapshot.announcement("collective"),
                epoch=self._number,
                backend=self._backend.name,
                rank=rank,
                world_size=len(members) + 1,
                store_port=self._port,
                bucket_bytes=self._bucket_bytes,
                timeout_s=self._timeout_s,
            )
            for rank, session in enumerate(members, start=1)
        }

    def broadcast(self, snapshot: Snapshot, changed: Callable[[], None]) -> Broadcast:
        """Begin to send a snapshot; ``changed`` is called on another thread when it is done."""
        assert self._epoch is not None
        result, epoch = Broadcast(), self._epoch

        def run() -> None:
            try:
                self._send(epoch, snapshot, result)
            except CollectiveError as error:
                result.error = brief(error)
                result.missing = tuple(
                    session
                    for rank, session in enumerate(epoch.members, start=1)
                    if rank in error.missing
                )
            except Exception as error:
                log.exception("broadcast")
                result.error = brief(error)
            result.done = True
            changed()

        Thread(target=run, name="broadcast", daemon=True).start()
        return result

    def end(self, cause: str) -> None:
        """End the epoch; what still happens in it is given up."""
        epoch, self._epoch = self._epoch, None
        if epoch is None:
            return
        epoch.record.ended, epoch.over = cause, True
        if epoch.process_group is not None:
            epoch.process_group.abort()

    def ended(self, cause: str) -> None:
        """Correct the cause for which the last epoch ended: the real one came out later."""
        self.records[-1].ended = cause

    def _send(self, epoch: _Epoch, snapshot: Snapshot, result: Broadcast) -> None:
        """Meet and send, on the side thread."""
        started = time.monotonic()
        process_group = self._meet(epoch)
        result.join_seconds = time.monotonic() - started
        pending: deque[Callable[[], None]] = deque()
        for bucket in snapshot.packed.split(self._bucket_bytes):
            if len(pending) == BUCKETS_BEGUN:
                pending.popleft()()
            if epoch.over:
                break
            with self._backend.copy_context():
                sent = bucket.to(self._backend.device)
            pending.append(process_group.begin(sent))
        for wait in pending:
            wait()
        if not epoch.over:
            epoch.record.pushes += 1

    def _meet(self, epoch: _Epoch) -> BroadcastGroup:
        """Return the process group of an epoch, whose members meet when it is first used."""
        if epoch.process_group is None:
            started = time.monotonic()
            epoch.process_group = self._backend.meet(
                self._store, epoch.record.epoch, 0, len(epoch.members) + 1, self._timeout_s
            )
            epoch.record.form_seconds = time.monotonic() - started
        return epoch.process_group


def _change(before: dict[str, int], after: dict[str, int]) -> str:
    """What changed the members."""
    left = [f"actor {number} left" for s, number in before.items() if after.get(s) != number]
    joined = [f"actor {number} joined" for s, number in after.items() if before.get(s) != number]
    return ", ".join(left + joined)
