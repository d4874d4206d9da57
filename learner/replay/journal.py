"""The journal: what a learner that is killed must not lose, on disk before anybody is told.

    group arrives ──► append ─┐                       ┌─► replay buffer, acknowledgement
    batch is cut  ──► batch ──┼─► one transaction ────┼─► version may be published
    rewards set   ──► command ┘   (writer thread)     └─► the user is answered

It is one SQLite file in WAL mode with full synchronisation. The writer takes everything that waits
into one transaction, so that one flush of the disk serves many groups. With a checkpoint and what
was written since, the same batches are cut and trained on again, in the same order: see
`learner.recovery.resume`. What the oldest checkpoint that is kept has trained on is deleted.
"""

import json
import logging
import sqlite3
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from learner.replay.buffer import TrainingBatch
from learner.replay.journal_reader import BUSY_TIMEOUT_S, FORMAT, JournalReader
from learner.run_folder import how_to_go_on
from learner.threads import Worker
from protocol.errors import AsyncGdpoError, ConfigError, TrainingError, brief
from protocol.framing import Buffer, encode
from protocol.groups import Group
from protocol.leases import OutstandingLease
from protocol.messages import GroupHeader

log = logging.getLogger("learner")

_SCHEMA = """
CREATE TABLE IF NOT EXISTS groups (
    prompt_index INTEGER PRIMARY KEY, lease INTEGER NOT NULL,
    header BLOB NOT NULL, payload BLOB NOT NULL
);
CREATE TABLE IF NOT EXISTS cuts (
    step INTEGER PRIMARY KEY, prompt_indices BLOB NOT NULL, evicted TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS commands (
    number INTEGER PRIMARY KEY, from_step INTEGER NOT NULL, updates TEXT NOT NULL
);
"""


@dataclass(frozen=True, slots=True)
class ReceivedGroup:
    """A valid group and the lease that it fulfils."""

    lease: OutstandingLease
    group: Group


def wait_until_stored(stored: Future[None], timeout_s: float) -> None:
    """Wait for what a method of `Journal` returned.

    Raises `TrainingError` if it cannot be written, or not in time.
    """
    try:
        stored.result(timeout_s)
    except TimeoutError as error:
        raise TrainingError(f"the journal has not written for {timeout_s:.0f} s") from error


@dataclass(frozen=True, slots=True)
class _Entry:
    statements: Sequence[tuple[str, tuple[Any, ...]]]
    received: ReceivedGroup | None
    stored: Future[None]


class Journal(JournalReader):
    """The writing end; read what is there before you `start` it."""

    def __init__(self, path: Path, max_bytes: int) -> None:
        """Create the file or open it again; raises `ConfigError`."""
        self._max_bytes = max_bytes
        try:
            database = sqlite3.connect(
                path, isolation_level=None, check_same_thread=False, timeout=BUSY_TIMEOUT_S
            )
            database.execute("PRAGMA journal_mode = WAL")
            # A commit is on disk when it returns, not only handed to the operating system.
            database.execute("PRAGMA synchronous = FULL")
            if database.execute("PRAGMA user_version").fetchone()[0] == 0:
                database.executescript(_SCHEMA)
                database.execute(f"PRAGMA user_version = {FORMAT}")
            super().__init__(path, database)
            self.size_bytes = self._measure()
            """How much it holds; what is deleted leaves room in the file."""
        except sqlite3.Error as error:
            raise ConfigError(f"cannot write the journal {path}: {error}") from error
        self._waiting: list[_Entry] = []
        self._failure: AsyncGdpoError | None = None
        self._worker = Worker("journal", self._take, self._store, drains=True)

    @property
    def is_full(self) -> bool:
        """Whether it is time for a checkpoint, after which there is something to delete."""
        return self.size_bytes > self._max_bytes

    def start(
        self,
        on_stored: Callable[[Sequence[ReceivedGroup]], None],
        on_failure: Callable[[AsyncGdpoError], None],
    ) -> None:
        """Write from now on; both functions are called on the writer's thread."""
        self._on_stored, self._on_failure = on_stored, on_failure
        self._worker.start(self._fail)

    def append(
        self, received: ReceivedGroup, header: GroupHeader, payloads: Sequence[Buffer]
    ) -> None:
        """Store a group; ``on_stored`` is told of it when that is done."""
        encoded, *frames = encode(header, payloads)
        values = (received.lease.work.prompt_index, header.lease, encoded, b"".join(frames))
        self._add(("INSERT INTO groups VALUES (?, ?, ?, ?)", values), received=received)

    def batch(self, step: int, batch: TrainingBatch) -> Future[None]:
        """Store which groups a batch consists of."""
        prompt_indices = np.array(batch.prompt_indices, dtype="<i8").tobytes()
        values = (step, prompt_indices, json.dumps(batch.evicted))
        return self._add(("INSERT INTO cuts VALUES (?, ?, ?)", values))

    def command(self, from_step: int, updates: Any) -> Future[None]:
        """Store a change to the rewards."""
        values = (from_step, json.dumps(updates))
        return self._add(("INSERT INTO commands (from_step, updates) VALUES (?, ?)", values))

    def prune(self, finished: Iterable[int], batches_up_to: int) -> Future[None]:
        """Delete the groups of these prompts, and the batches up to a step."""
        return self._add(
            *(
                ("DELETE FROM groups WHERE prompt_index = ?", (prompt_index,))
                for prompt_index in finished
            ),
            ("DELETE FROM cuts WHERE step <= ?", (batches_up_to,)),
        )

    def close(self) -> None:
        """Write what waits, and end."""
        self._worker.close()
        self._database.close()

    def _add(
        self, *statements: tuple[str, tuple[Any, ...]], received: ReceivedGroup | None = None
    ) -> Future[None]:
        stored: Future[None] = Future()
        with self._worker.adding():
            if self._failure is not None:
                stored.set_exception(self._failure)
            elif self._worker.closing:
                stored.set_exception(TrainingError(f"the journal {self.path} is closed"))
            else:
                self._waiting.append(_Entry(statements, received, stored))
        return stored

    def _take(self) -> list[_Entry] | None:
        """Return everything that waits: one flush of the disk serves it all."""
        entries, self._waiting = self._waiting, []
        return entries or None

    def _store(self, entries: list[_Entry]) -> None:
        """Write, and report what is stored; raises `TrainingError` if that is not possible."""
        try:
            self._write(entries)
            if received := [entry.received for entry in entries if entry.received]:
                self._on_stored(received)
        except Exception as error:
            if not isinstance(error, sqlite3.Error):
                log.exception("the journal's thread died")
            # Without this thread nothing is acknowledged and nothing trained.
            failure = TrainingError(
                f"cannot write the journal {self.path}: {brief(error)}. Nothing that was "
                f"acknowledged is lost: {how_to_go_on(self.path.parent)}"
            )
            _refuse(entries, failure)
            raise failure from error
        for entry in entries:
            entry.stored.set_result(None)

    def _write(self, entries: list[_Entry]) -> None:
        """Write all of them or none."""
        self._database.execute("BEGIN IMMEDIATE")
        for entry in entries:
            for statement, values in entry.statements:
                self._database.execute(statement, values)
        self._database.execute("COMMIT")
        self.size_bytes = self._measure()

    def _fail(self, error: AsyncGdpoError) -> None:
        """Refuse what waits and what is still to come; on the thread, which has ended."""
        with self._worker.adding():
            self._failure = error
            waiting, self._waiting = self._waiting, []
        _refuse(waiting, error)
        self._on_failure(error)

    def _measure(self) -> int:
        pages, free, size = (
            self._database.execute(f"PRAGMA {name}").fetchone()[0]
            for name in ("page_count", "freelist_count", "page_size")
        )
        return int((pages - free) * size)


def _refuse(entries: Iterable[_Entry], error: AsyncGdpoError) -> None:
    for entry in entries:
        entry.stored.set_exception(error)
