"""The journal: what a learner that is killed must not lose, on disk before anybody is told.

    group arrives ──► append ─┐                       ┌─► replay buffer, acknowledgement
    batch is cut  ──► cut ────┼─► one transaction ────┼─► version may be published
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
from dataclasses import dataclass
from pathlib import Path
from threading import Condition, Event, Thread
from typing import Any

import numpy as np

from learner.replay.buffer import TrainingBatch
from learner.replay.journal_reader import BUSY_TIMEOUT_S, FORMAT, JournalReader
from learner.run_folder import how_to_go_on
from protocol.errors import ConfigError, TrainingError, brief
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

    held: OutstandingLease
    group: Group


class Stored:
    """Whether something is on disk yet."""

    def __init__(self) -> None:
        self._done = Event()
        self._error: TrainingError | None = None

    def settle(self, error: TrainingError | None) -> None:
        self._error = error
        self._done.set()

    def wait(self, timeout_s: float) -> None:
        """Raises `TrainingError` if it cannot be written, or not in time."""
        if not self._done.wait(timeout_s):
            raise TrainingError(f"the journal has not written for {timeout_s:.0f} s")
        if self._error is not None:
            raise self._error


@dataclass(frozen=True, slots=True)
class _Entry:
    statements: Sequence[tuple[str, tuple[Any, ...]]]
    arrival: ReceivedGroup | None
    stored: Stored


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
            """Of what it holds; what is deleted leaves room in the file."""
        except sqlite3.Error as error:
            raise ConfigError(f"cannot write the journal {path}: {error}") from error
        self._changed = Condition()
        self._waiting: list[_Entry] = []
        self._closing = False
        self._failure: TrainingError | None = None
        self._thread: Thread | None = None

    @property
    def is_full(self) -> bool:
        """Whether it is time for a checkpoint, after which there is something to delete."""
        return self.size_bytes > self._max_bytes

    def start(
        self,
        on_stored: Callable[[Sequence[ReceivedGroup]], None],
        on_failure: Callable[[TrainingError], None],
    ) -> None:
        """Write from now on; both functions are called on the writer's thread."""
        self._on_stored, self._on_failure = on_stored, on_failure
        self._thread = Thread(target=self._run, name="journal", daemon=True)
        self._thread.start()

    def append(
        self, arrival: ReceivedGroup, header: GroupHeader, payloads: Sequence[Buffer]
    ) -> None:
        """Store a group; it is told to ``on_stored`` when that is done."""
        encoded, *frames = encode(header, payloads)
        values = (arrival.held.work.prompt_index, header.lease, encoded, b"".join(frames))
        self._add(("INSERT INTO groups VALUES (?, ?, ?, ?)", values), arrival=arrival)

    def cut(self, step: int, cut: TrainingBatch) -> Stored:
        """Store which groups a batch consists of."""
        prompt_indices = np.array(cut.prompt_indices, dtype="<i8").tobytes()
        values = (step, prompt_indices, json.dumps(cut.evicted))
        return self._add(("INSERT INTO cuts VALUES (?, ?, ?)", values))

    def command(self, from_step: int, updates: Any) -> Stored:
        """Store a change to the rewards."""
        values = (from_step, json.dumps(updates))
        return self._add(("INSERT INTO commands (from_step, updates) VALUES (?, ?)", values))

    def prune(self, finished: Iterable[int], cuts_up_to: int) -> Stored:
        """Delete the groups of these prompts, and the cuts up to a step."""
        return self._add(
            *(
                ("DELETE FROM groups WHERE prompt_index = ?", (prompt_index,))
                for prompt_index in finished
            ),
            ("DELETE FROM cuts WHERE step <= ?", (cuts_up_to,)),
        )

    def close(self) -> None:
        """Write what waits, and end."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()
        self._database.close()

    def _add(
        self, *statements: tuple[str, tuple[Any, ...]], arrival: ReceivedGroup | None = None
    ) -> Stored:
        stored = Stored()
        with self._changed:
            if self._failure is not None:
                stored.settle(self._failure)
            elif self._closing:
                stored.settle(TrainingError(f"the journal {self.path} is closed"))
            else:
                self._waiting.append(_Entry(statements, arrival, stored))
                self._changed.notify_all()
        return stored

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closing)
                entries, self._waiting = self._waiting, []
            if not entries or not self._store(entries):
                return

    def _store(self, entries: list[_Entry]) -> bool:
        """Write and tell; False if that is not possible."""
        try:
            self._write(entries)
            if arrivals := [entry.arrival for entry in entries if entry.arrival]:
                self._on_stored(arrivals)
        except sqlite3.Error as error:
            self._fail(entries, str(error))
            return False
        except Exception as error:
            # Without this thread nothing is acknowledged and nothing trained.
            log.exception("the journal's thread died")
            self._fail(entries, brief(error))
            return False
        for entry in entries:
            entry.stored.settle(None)
        return True

    def _write(self, entries: list[_Entry]) -> None:
        """All of them or none."""
        self._database.execute("BEGIN IMMEDIATE")
        for entry in entries:
            for statement, values in entry.statements:
                self._database.execute(statement, values)
        self._database.execute("COMMIT")
        self.size_bytes = self._measure()

    def _fail(self, entries: list[_Entry], problem: str) -> None:
        failure = TrainingError(
            f"cannot write the journal {self.path}: {problem}. Nothing that was acknowledged is "
            f"lost: {how_to_go_on(self.path.parent)}"
        )
        with self._changed:
            self._failure = failure
            entries += self._waiting
            self._waiting = []
        for entry in entries:
            entry.stored.settle(failure)
        self._on_failure(failure)

    def _measure(self) -> int:
        pages, free, size = (
            self._database.execute(f"PRAGMA {name}").fetchone()[0]
            for name in ("page_count", "freelist_count", "page_size")
        )
        return int((pages - free) * size)
