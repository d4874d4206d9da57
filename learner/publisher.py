"""The sending end of weights: one push at a time on a side thread, while training goes on.

    publish(v) ─► newest wins ─► announce to the ready actors ─► gloo broadcast ─► confirmations
                                        │                             │ any failure, any deadline
                                        └──── everybody pulls v ◄─────┘ ends the epoch

An epoch is a gloo group with fixed members. The same members as last time: the same epoch;
otherwise a new one under a new name. Actors that joined since the push began pull their weights
by themselves. A push never waits longer than its deadlines, and training never waits for a push:
actors whose weights are too old just get no leases.
"""

import logging
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from threading import Condition, Thread

import msgspec
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import ProcessGroupGloo

from learner.config import WeightsConfig
from learner.coordinator import Coordinator
from learner.snapshots import Snapshot, SnapshotStore
from protocol.errors import TrainingError, brief
from protocol.messages import Weights
from protocol.weights import chunks

log = logging.getLogger("learner")

CLOSE_TIMEOUT_S = 1.0


@dataclass(frozen=True, slots=True)
class PushReport:
    """How one push went."""

    version: int
    epoch: int
    members: int
    by_collective: bool
    join_seconds: float
    broadcast_seconds: float
    confirm_seconds: float
    behind: int
    """Members that had not confirmed the version at the deadline."""


class Publisher:
    """Pushes the newest snapshot to every ready actor.

    By collective on ``address``; None: nothing listens there, and everybody pulls every version.
    """

    def __init__(
        self,
        coordinator: Coordinator,
        snapshots: SnapshotStore,
        config: WeightsConfig,
        address: str | None,
        wake_intake: Callable[[], None],
    ) -> None:
        self._coordinator = coordinator
        self._snapshots = snapshots
        self._config = config
        self._wake_intake = wake_intake
        self._collective = (
            _Collective(address, timedelta(seconds=config.timeout_s)) if address else None
        )
        self._changed = Condition()
        self._pending: Snapshot | None = None
        self._pushed = snapshots.latest.version
        """Version of the last push."""
        self._closing = False
        self.reports: list[PushReport] = []
        """Of the pushes since they were last taken."""
        self._thread = Thread(target=self._run, name="publisher", daemon=True)
        self._thread.start()

    def publish(self, snapshot: Snapshot) -> None:
        """Push ``snapshot``; one that still waits for an earlier push is replaced by it."""
        self._snapshots.publish(snapshot)
        with self._changed:
            self._pending = snapshot
            self._changed.notify_all()

    def take_reports(self) -> list[PushReport]:
        with self._changed:
            reports, self.reports = self.reports, []
            return reports

    def close(self) -> None:
        """End after the push at hand, or without it when it takes long.

        A collective with a hung actor cannot be interrupted: it lasts until its deadline, longer
        than whoever stops a learner waits. Its thread changes nothing any more and ends by itself,
        with the process at the latest.
        """
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(CLOSE_TIMEOUT_S)

    def _run(self) -> None:
        try:
            self._serve()
        except Exception as error:
            log.exception("publisher died")
            self._coordinator.fail(TrainingError(f"publisher died: {error}"))

    def _serve(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._pending is not None or self._closing)
                snapshot, self._pending = self._pending, None
            if snapshot is None or self._closing:
                return
            report = self._push(snapshot)
            self._pushed = snapshot.version
            if report:
                with self._changed:
                    self.reports.append(report)

    def _push(self, snapshot: Snapshot) -> PushReport | None:
        # Only those that kept up: an actor that is behind pulls until it has caught up, so a slow
        # or broken one costs one push its deadlines, not every push.
        members = self._coordinator.ready_sessions(self._pushed)
        if not members:
            return None
        started = joined = broadcast = time.monotonic()
        by_collective = False
        if self._collective is None:
            self._announce_stream(members, snapshot)
        else:
            by_collective, joined = self._broadcast(self._collective, members, snapshot)
            broadcast = time.monotonic()
        behind = self._coordinator.wait_for_version(
            members, snapshot.version, self._config.timeout_s
        )
        if behind:
            log.warning("%d actors are late with version %d", len(behind), snapshot.version)
            if self._collective is not None:
                self._collective.end()
                self._announce_stream(behind, snapshot)
        return PushReport(
            version=snapshot.version,
            epoch=self._collective.epoch if self._collective else 0,
            members=len(members),
            by_collective=by_collective,
            join_seconds=joined - started,
            broadcast_seconds=broadcast - joined,
            confirm_seconds=time.monotonic() - broadcast,
            behind=len(behind),
        )

    def _broadcast(
        self, collective: "_Collective", members: tuple[str, ...], snapshot: Snapshot
    ) -> tuple[bool, float]:
        """Whether it went well, and when all had joined; else the members are told to pull."""
        collective.begin(members)
        for rank, session in enumerate(members, start=1):
            offer = self._offer(collective, snapshot, rank, len(members) + 1)
            self._coordinator.announce(session, offer)
        self._wake_intake()
        try:
            collective.join()
            joined = time.monotonic()
            collective.broadcast(snapshot, self._config.bucket_bytes)
        except RuntimeError as error:
            log.warning(
                "push of version %d by collective failed, because an actor left or was late; the "
                "others pull it",
                snapshot.version,
            )
            log.debug("%s", brief(error))
            collective.end()
            self._announce_stream(members, snapshot)
            return False, time.monotonic()
        return True, joined

    def _offer(
        self, collective: "_Collective", snapshot: Snapshot, rank: int, world_size: int
    ) -> Weights:
        return msgspec.structs.replace(
            snapshot.announcement(),
            epoch=collective.epoch,
            rank=rank,
            world_size=world_size,
            store_port=collective.store_port,
            bucket_bytes=self._config.bucket_bytes,
            timeout_s=self._config.timeout_s,
        )

    def _announce_stream(self, members: tuple[str, ...], snapshot: Snapshot) -> None:
        for session in members:
            self._coordinator.announce(session, snapshot.announcement())
        self._wake_intake()


class _Collective:
    """The gloo group of the current epoch; the learner is rank 0."""

    def __init__(self, address: str, timeout: timedelta) -> None:
        self._timeout = timeout
        self._address = address
        # TCPStore alone would listen on every interface, whatever address it is given.
        with socket.create_server((address, 0)) as listener:
            self.store_port: int = listener.getsockname()[1]
            self._store = TCPStore(
                address,
                self.store_port,
                is_master=True,
                timeout=timeout,
                wait_for_workers=False,
                master_listen_fd=listener.detach(),
            )
        self.epoch = 0
        self._members: tuple[str, ...] = ()
        self._group: ProcessGroupGloo | None = None

    def begin(self, members: tuple[str, ...]) -> None:
        """Stay in the epoch if its members are the same, else begin the next."""
        if self._group is None or members != self._members:
            self.end()
            self.epoch += 1
            self._members = members

    def join(self) -> None:
        """Meet the members; RuntimeError if one of them does not come in time."""
        if self._group is None:
            options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
            options._timeout = self._timeout
            options._devices = [ProcessGroupGloo.create_device(hostname=self._address)]
            store = PrefixStore(f"weights/{self.epoch}", self._store)
            self._group = ProcessGroupGloo(store, 0, len(self._members) + 1, options)

    def broadcast(self, snapshot: Snapshot, bucket_bytes: int) -> None:
        """Send all buckets; RuntimeError if a member is gone or late."""
        assert self._group is not None
        for offset, num_bytes in chunks(len(snapshot.packed), bucket_bytes):
            bucket = snapshot.packed[offset : offset + num_bytes]
            self._group.broadcast(bucket, 0, self._timeout).wait(self._timeout)  # type: ignore[attr-defined]

    def end(self) -> None:
        """The epoch is over; the next push begins a new one."""
        self._group = None
