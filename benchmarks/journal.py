"""What it costs that a group is on disk before it is acknowledged.

    python -m benchmarks.journal [--folder .] [--seconds 4]

Groups arrive at the real coordinator, so many outstanding at once, and are put into the replay
buffer and acknowledged: at once (memory), by the journal (SQLite, WAL, full synchronisation), or by
a store of the same duties and the same batching made with LMDB (synchronised at every commit). All
take turns in one run; the yardstick is a write and fsync of the bytes of one group, alone, on the
same disk: on a busy machine the ratio says more than the time. ``--folder`` chooses the disk.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from threading import Condition, Event, Thread
from typing import Any, cast

import lmdb
import msgspec
import numpy as np
import torch
from prometheus_client import CollectorRegistry
from rich.console import Console
from rich.table import Table

from learner.config.run import RunConfig
from learner.coordinator.admission import Greeting
from learner.coordinator.coordinator import Coordinator
from learner.pacing import Pacing
from learner.phases import Phases
from learner.prompts.stream import PromptStream
from learner.prompts.work_queue import WorkQueue
from learner.registry import Outbox, Outgoing
from learner.replay.buffer import ReplayBuffer
from learner.replay.journal import Journal, ReceivedGroup
from learner.weights.pack import MemoryPool, pack
from learner.weights.snapshots import SnapshotStore
from protocol.framing import Buffer, decode_to_learner, encode
from protocol.groups import Group, Rollout, pack_group
from protocol.messages import (
    PROTOCOL_VERSION,
    Ack,
    GroupHeader,
    Hello,
    Lease,
    Status,
    WeightsReady,
    Welcome,
)
from protocol.weights import layout, total_bytes

SIZES = ((4, 25), (16, 1024))
OUTSTANDING = (16, 256)
VOCAB = 1000
BATCH_GROUPS = 16
MAX_BYTES = 1 << 30
MAP_BYTES = 8 << 30
WARM_UP_S = 0.3


class LmdbStore:
    """The duties of `learner.replay.journal.Journal` towards the coordinator, on LMDB."""

    def __init__(self, path: Path) -> None:
        self._environment = lmdb.open(str(path), map_size=MAP_BYTES, subdir=False, sync=True)
        self._changed = Condition()
        self._waiting: list[tuple[ReceivedGroup | None, bytes, bytes | None]] = []
        self._closing = False

    def start(self, on_stored: Callable[[Sequence[ReceivedGroup]], None]) -> None:
        self._on_stored = on_stored
        self._thread = Thread(target=self._run, daemon=True)
        self._thread.start()

    def append(
        self, received: ReceivedGroup, header: GroupHeader, payloads: Sequence[Buffer]
    ) -> None:
        encoded, *frames = encode(header, payloads)
        value = len(encoded).to_bytes(4, "little") + encoded + b"".join(frames)
        self._add((received, _key(received.lease.work.prompt_index), value))

    def prune(self, prompt_indices: Sequence[int]) -> None:
        self._add(*((None, _key(prompt_index), None) for prompt_index in prompt_indices))

    def close(self) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()
        self._environment.close()

    def _add(self, *entries: tuple[ReceivedGroup | None, bytes, bytes | None]) -> None:
        with self._changed:
            self._waiting += entries
            self._changed.notify_all()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closing)
                entries, self._waiting = self._waiting, []
            if not entries:
                return
            with self._environment.begin(write=True) as transaction:
                for _, key, value in entries:
                    if value is None:
                        transaction.delete(key)
                    else:
                        transaction.put(key, value)
            self._on_stored([received for received, _, _ in entries if received])


def _key(prompt_index: int) -> bytes:
    return prompt_index.to_bytes(8, "big")


class _Window:
    """In the place of `learner.pacing.Pacing`: so many groups are out, or being stored."""

    def __init__(self, outstanding: int) -> None:
        self._outstanding = outstanding

    def allowed(self, *, outstanding: int, **_: int) -> int:
        return max(0, self._outstanding - outstanding)


class _Outbox(Outbox):
    """Measures when an acknowledgement is made, not when the benchmark comes to look for it."""

    def __init__(self, arrived: dict[int, float], waits: list[float]) -> None:
        super().__init__()
        self._arrived, self._waits = arrived, waits

    def put(self, message: Outgoing) -> None:
        if isinstance(message.header, Ack):
            self._waits.append(time.perf_counter() - self._arrived.pop(message.header.lease))
        super().put(message)


class Bench:
    """One actor with so many leases at once, which delivers its groups without generating them."""

    def __init__(self, size: tuple[int, int], outstanding: int, store: Any) -> None:
        rollouts, tokens = size
        config = _config(rollouts, tokens, outstanding)
        self._config = config
        self._store = store
        model, specs = _model()
        snapshots = SnapshotStore(pack(0, model, specs, MemoryPool(total_bytes(specs))))
        self._buffer = ReplayBuffer.of(config)
        self._coordinator = Coordinator(
            config,
            greeting=Greeting(
                Welcome(run_id="bench", actor={}, model_digest="", files=(), manifest=()), ()
            ),
            work=WorkQueue(PromptStream([{"prompt": "p"}] * 100, config)),
            buffer=self._buffer,
            pacing=cast(Pacing, _Window(outstanding)),
            snapshots=snapshots,
            vocab_size=VOCAB,
            journal=store,
            phases=Phases(CollectorRegistry()),
            clock=time.monotonic,
            on_pull=lambda session, pull: None,
        )
        self._frames = _frames(rollouts, tokens)
        self.waits: list[float] = []
        """Seconds from arrival to acknowledgement."""
        self._arrived: dict[int, float] = {}
        self._coordinator._registry.outbox = self._outbox = _Outbox(self._arrived, self.waits)
        self._acknowledged = Event()
        if isinstance(store, Journal):
            store.start(self._stored, self._coordinator.fail)
        elif store is not None:
            store.start(self._stored)
        hello = Hello(protocol=PROTOCOL_VERSION, session="a")
        self._coordinator.handle("a", hello, [])
        digest = snapshots.latest.digest
        ready = WeightsReady(
            version=0, digest=digest, route="stream", receive_seconds=0.0, load_seconds=0.0
        )
        self._coordinator.handle("a", ready, [])
        self._coordinator.open_training()
        self._coordinator.handle("a", _status(outstanding), [])

    def run(self, seconds: float) -> float:
        """Groups a second."""
        self._go(WARM_UP_S)
        self.waits.clear()
        started = time.perf_counter()
        self._go(seconds)
        return len(self.waits) / (time.perf_counter() - started)

    def _go(self, seconds: float) -> None:
        deadline = time.perf_counter() + seconds
        while time.perf_counter() < deadline:
            self._acknowledged.clear()
            leases = self._take_messages()
            for lease in leases:
                self._arrived[lease] = time.perf_counter()
                header, payloads = self._frames
                frames = encode(msgspec.structs.replace(header, lease=lease), payloads)
                self._coordinator.handle("a", *decode_to_learner(frames))
            self._train()
            if not leases:
                self._acknowledged.wait(1.0)

    def _take_messages(self) -> list[int]:
        leases = []
        while self._outbox:
            message = self._outbox.pop().header
            if isinstance(message, Lease):
                leases.append(message.lease)
        return leases

    def _train(self) -> None:
        """As a learner that is never behind: what is trained leaves the store too."""
        while batch := self._buffer.take(BATCH_GROUPS, 0, 0.0):
            self._buffer.step_done()
            if isinstance(self._store, Journal):
                self._store.prune(batch.finished, -1)
            elif self._store is not None:
                self._store.prune(batch.finished)

    def _stored(self, arrivals: Sequence[ReceivedGroup]) -> None:
        self._coordinator.stored(arrivals)
        self._acknowledged.set()


def fsync_seconds(folder: Path, num_bytes: int, repeats: int = 200) -> tuple[float, float]:
    """Median and 99th percentile of one write and fsync, appended to a file."""
    content = os.urandom(num_bytes)
    taken = []
    with (folder / "yardstick").open("wb", buffering=0) as file:
        for _ in range(repeats):
            started = time.perf_counter()
            file.write(content)
            os.fsync(file.fileno())
            taken.append(time.perf_counter() - started)
    return statistics.median(taken), float(np.percentile(taken, 99))


def _config(rollouts: int, tokens: int, outstanding: int) -> RunConfig:
    return RunConfig.model_validate(
        {
            "name": "bench",
            "model": {"path": "nowhere"},
            "data": {"train": "nowhere"},
            "rewards": [{"name": "right", "function": "tasks:right"}],
            "sampling": {
                "num_rollouts": rollouts,
                "max_tokens": tokens,
                "max_prompt_tokens": 64,
            },
            "training": {"batch_groups": BATCH_GROUPS, "minibatches": 1},
            "admission": {"self_check": False},
            "buffer": {"max_bytes": MAX_BYTES},
        }
    )


def _model() -> tuple[Any, Any]:
    model = torch.nn.Linear(3, 2)
    return model, layout((n, "float32", tuple(p.shape)) for n, p in model.named_parameters())


def _status(capacity: int) -> Status:
    return Status(
        sequence=1,
        capacity=capacity,
        version=0,
        loading=-1,
        leases=(),
        heard=-1,
        tokens_generated=0,
        groups_generated=0,
        idle_seconds=0.0,
        stall_seconds=0.0,
        uptime_seconds=0.0,
    )


def _frames(rollouts: int, tokens: int) -> tuple[GroupHeader, list[Buffer]]:
    random = np.random.default_rng(0)
    return pack_group(
        Group(
            lease=0,
            prompt_tokens=random.integers(VOCAB, size=32, dtype=np.int32),
            rollouts=tuple(
                Rollout(
                    tokens=random.integers(VOCAB, size=tokens, dtype=np.int32),
                    logprobs=-random.random(tokens, dtype=np.float32),
                    spans=((0, 0),),
                    finish="length",
                )
                for _ in range(rollouts)
            ),
            reward_names=("right",),
            scores=random.random((rollouts, 1), dtype=np.float32),
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path())
    parser.add_argument("--seconds", type=float, default=4.0)
    options = parser.parse_args()
    table = Table(title="groups acknowledged; times in milliseconds")
    for column in ("group", "out", "store", "groups/s", "of memory", "p50", "p99", "/fsync"):
        table.add_column(column, justify="left" if column == "store" else "right")
    for size in SIZES:
        header, payloads = _frames(*size)
        num_bytes = sum(memoryview(frame).nbytes for frame in encode(header, payloads))
        for outstanding in OUTSTANDING:
            memory_rate = 0.0
            with tempfile.TemporaryDirectory(dir=options.folder) as name:
                folder = Path(name)
                fsync_s, fsync_p99_s = fsync_seconds(folder, num_bytes)
                table.add_row(
                    f"{size[0]} x {size[1]}: {num_bytes / 1000:.1f} kB",
                    str(outstanding),
                    "write + fsync",
                    f"{1 / fsync_s:,.0f}",
                    "",
                    f"{1000 * fsync_s:.2f}",
                    f"{1000 * fsync_p99_s:.2f}",
                    "1.0",
                )
                for kind, make in (
                    ("memory", lambda: None),
                    ("SQLite", lambda f=folder: Journal(f / "journal.sqlite", MAX_BYTES)),  # type: ignore[misc]
                    ("LMDB", lambda f=folder: LmdbStore(f / "journal.lmdb")),  # type: ignore[misc]
                ):
                    store = make()
                    bench = Bench(size, outstanding, store)
                    rate = bench.run(options.seconds)
                    memory_rate = memory_rate or rate
                    p50_s, p99_s = np.percentile(bench.waits, [50, 99])
                    table.add_row(
                        "",
                        "",
                        kind,
                        f"{rate:,.0f}",
                        f"{rate / memory_rate:.2f}",
                        f"{1000 * p50_s:.2f}",
                        f"{1000 * p99_s:.2f}",
                        f"{p50_s / fsync_s:.1f}",
                    )
                    if store is not None:
                        store.close()
            table.add_section()
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
