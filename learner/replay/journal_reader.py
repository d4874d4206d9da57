"""Reading a journal, also one that a learner is writing to; see `learner.replay.journal`."""

import json
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

import msgspec
import numpy as np

from protocol.errors import ConfigError, brief
from protocol.framing import decode_to_learner
from protocol.groups import Group, GroupLimits, unpack_group
from protocol.messages import GroupHeader

FORMAT = 2
BUSY_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class RecordedBatch:
    """One training batch."""

    step: int
    prompt_indices: tuple[int, ...]
    evicted: tuple[tuple[int, str], ...]
    """(prompt_index, cause) since the batch before."""


@dataclass(frozen=True, slots=True)
class RecordedCommand:
    """A change to the rewards that came while training ran."""

    number: int
    from_step: int
    updates: Any


class JournalReader:
    """What is written in a journal, also in one that a learner is writing to."""

    def __init__(self, path: Path, database: sqlite3.Connection) -> None:
        """Read from ``database``; raises `ConfigError` if it is of another version."""
        self.path = path
        self._database = database
        found = database.execute("PRAGMA user_version").fetchone()[0]
        if found != FORMAT:
            raise ConfigError(
                f"{path} is no journal of this version (format {found}, not {FORMAT})"
            )

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open a journal for reading only; raises `ConfigError`."""
        if not path.is_file():
            raise ConfigError(f"no journal at {path}")
        try:
            return cls(path, _connect(path, ""))
        except sqlite3.Error as error:
            if _has_log(path):
                raise ConfigError(f"cannot read the journal {path}: {error}") from error
        # A reader shares files with a writer, which it cannot make on a disk that is full or
        # read-only; without a log beside the journal there is no writer to share them with.
        try:
            return cls(path, _connect(path, "&immutable=1"))
        except sqlite3.Error as error:
            raise ConfigError(f"cannot read the journal {path}: {error}") from error

    def prompt_indices(self) -> tuple[int, ...]:
        """Return the prompt indices of all groups, in order."""
        rows = self._read("SELECT prompt_index FROM groups ORDER BY prompt_index")
        return tuple(prompt_index for (prompt_index,) in rows)

    def group(self, prompt_index: int, limits: GroupLimits) -> Group:
        """Return one group.

        Raises `BadMessage` if it does not agree with ``limits``, and `ConfigError` if it is not
        there, or not any more.
        """
        found = self._frames(prompt_index)
        if found is None:
            raise ConfigError(f"{self.path} holds no group of prompt {prompt_index} (any more)")
        return unpack_group(*found, limits)

    def headers(self) -> Iterator[tuple[int, GroupHeader, list[memoryview]]]:
        """Yield (prompt_index, header, payload frames) of all groups, in the order of prompts."""
        # One by one: while a query goes on, the writer's log grows.
        for prompt_index in self.prompt_indices():
            if found := self._frames(prompt_index):
                yield (prompt_index, *found)

    def batches(self) -> list[RecordedBatch]:
        """Return all batches, in order."""
        rows = self._read("SELECT step, prompt_indices, evicted FROM cuts ORDER BY step")
        return [
            RecordedBatch(
                step,
                tuple(np.frombuffer(prompt_indices, dtype="<i8").tolist()),
                tuple((prompt_index, cause) for prompt_index, cause in json.loads(evicted)),
            )
            for step, prompt_indices, evicted in rows
        ]

    def commands(self) -> list[RecordedCommand]:
        """Return all changes to the rewards, in order."""
        rows = self._read("SELECT number, from_step, updates FROM commands ORDER BY number")
        return [RecordedCommand(number, step, json.loads(text)) for number, step, text in rows]

    def close(self) -> None:
        """Close the file."""
        self._database.close()

    def _frames(self, prompt_index: int) -> tuple[GroupHeader, list[memoryview]] | None:
        """A stored group as it came from the network."""
        rows = self._read("SELECT header, payload FROM groups WHERE prompt_index = ?", prompt_index)
        if not rows:
            return None
        [(header, payload)] = rows
        try:
            sizes = msgspec.msgpack.decode(header)["sizes"]
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{self.path}, prompt {prompt_index}, is damaged: {brief(error)}"
            ) from error
        stops = np.cumsum([0, *sizes]).tolist()
        frames = [payload[start:stop] for start, stop in pairwise(stops)]
        message, payloads = decode_to_learner([header, *frames])
        assert isinstance(message, GroupHeader)
        return message, payloads

    def _read(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        try:
            return self._database.execute(query, values).fetchall()
        except sqlite3.Error as error:
            raise ConfigError(f"cannot read the journal {self.path}: {error}") from error


def _connect(path: Path, options: str) -> sqlite3.Connection:
    uri = f"{path.absolute().as_uri()}?mode=ro{options}"
    return sqlite3.connect(uri, uri=True, timeout=BUSY_TIMEOUT_S)


def _has_log(path: Path) -> bool:
    """Whether something is written that is not in the file itself yet."""
    log_path = path.with_name(f"{path.name}-wal")
    return log_path.exists() and log_path.stat().st_size > 0
