"""Completions in files: written as training goes on, bounded, and read by ``gdpo show``.

    completions.parquet/                a folder, which pandas and others read as one table
        steps-00000001.parquet          the sample of steps 1, 2, ... in files of a few MiB
        steps-00000640.parquet          the last one: written again, whole, with every addition
        _newest.parquet                 every completion of the newest step

A parquet file can be read only once its end is written. So every file is replaced as a whole, by a
rename: whoever is killed leaves the one before. Only the last file of the sample is ever written
again, so that an addition costs the same however long the run is. Readers of folders leave out what
begins with an underscore, as `_newest.parquet` does and a file that is not complete yet.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import parquet

from protocol.errors import ConfigError, brief

FILE_BYTES = 2 << 20
"""Memory of the table in a file of the sample, from which on the next file is begun."""
_SCORE = "reward/"
_FACTS = {
    "step": pa.int64(),
    "prompt_index": pa.int64(),
    "rollout": pa.int32(),
    "prompt": pa.string(),
    "completion": pa.string(),
    "tokens": pa.int64(),
    "finish": pa.string(),
    "oldest_version": pa.int64(),
    "newest_version": pa.int64(),
    "advantage": pa.float32(),
}


@dataclass(frozen=True, slots=True)
class Completion:
    """One completion that was trained on."""

    step: int
    """The policy version that its step made."""
    prompt_index: int
    """Place of its prompt in the stream of prompts."""
    rollout: int
    """Which of its group it is."""
    prompt: str
    completion: str
    tokens: int
    finish: str
    """``stop``, or ``length`` where it was cut off."""
    oldest_version: int
    """Oldest policy version that its tokens were sampled from."""
    newest_version: int
    advantage: float
    scores: dict[str, float]
    """Raw score of each reward; NaN = does not apply."""

    @property
    def is_truncated(self) -> bool:
        """Whether it was cut off at the longest completion there may be."""
        return self.finish == "length"

    @property
    def key(self) -> tuple[int, int, int]:
        """What tells it from all others."""
        return self.step, self.prompt_index, self.rollout


class CompletionFiles:
    """The writer; one thread uses it. Raises `OSError` where something cannot be written."""

    def __init__(self, folder: Path, *, max_bytes: int) -> None:
        """``max_bytes`` bounds all of the folder; nothing is written before the first addition."""
        self._folder = folder
        self._max_bytes = max_bytes
        self._open: tuple[Path, pa.Table] | None = None
        """The last file of the sample, and what is in it."""

    def forget_after(self, step: int) -> list[str]:
        """Leave out what is going to be trained again, and go on behind what stays.

        Returns a text about each damaged file, of which nothing can be kept.
        """
        damaged = []
        for path in [*_sample_files(self._folder), _newest_file(self._folder)]:
            try:
                table = _read(path)
            except ConfigError as error:
                damaged.append(str(error))
                path.unlink()
                continue
            if table is None:
                continue
            kept = table.filter(pa.compute.field("step") <= step)
            if not len(kept):
                path.unlink()
            elif path.name != _NEWEST:
                if len(kept) < len(table):
                    self._write(path, kept)
                self._open = (path, kept) if kept.nbytes < FILE_BYTES else None
        return damaged

    def add(self, sample: Sequence[Completion]) -> None:
        """Add to the sample; the oldest files go where there is no room."""
        if not (rows := self._fitting(sample)):
            return
        table = _table(rows)
        if self._open is None:
            path = self._folder / f"steps-{rows[0].step:08}.parquet"
        else:
            path, before = self._open
            table = pa.concat_tables([before, table]).combine_chunks()
        self._write(path, table)
        self._open = (path, table) if table.nbytes < FILE_BYTES else None
        self._make_room()

    def replace_newest(self, rows: Sequence[Completion]) -> None:
        """Keep all completions of a step, in place of those of the step before."""
        self._write(_newest_file(self._folder), _table(self._fitting(rows)))
        self._make_room()

    def _fitting(self, rows: Sequence[Completion]) -> list[Completion]:
        """As many of ``rows`` as take a quarter of the room, whatever they compress to."""
        kept, left = [], self._max_bytes // 4
        for row in rows:
            left -= 4 * (len(row.prompt) + len(row.completion))
            if left < 0:
                break
            kept.append(row)
        return kept

    def _write(self, path: Path, table: pa.Table) -> None:
        self._folder.mkdir(exist_ok=True)
        partial = self._folder / f"_{path.name}.partial"
        try:
            parquet.write_table(table, partial, compression="zstd")
            partial.rename(path)
        except OSError:
            with suppress(OSError):
                partial.unlink(missing_ok=True)
            raise

    def _make_room(self) -> None:
        sample, newest = _sample_files(self._folder), _newest_file(self._folder)
        sizes = {path: path.stat().st_size for path in (*sample, newest) if path.exists()}
        total = sum(sizes.values())
        for path in sample[:-1]:
            if total <= self._max_bytes:
                break
            path.unlink()
            total -= sizes[path]


def read_completions(folder: Path) -> Iterator[Completion]:
    """Every completion that is kept, once, file after file.

    Raises `ConfigError` for a folder that is not there or has none, and for a damaged file.
    """
    files = [*_sample_files(folder), _newest_file(folder)]
    seen: set[tuple[int, int, int]] = set()
    for path in files:
        table = _read(path)
        for row in _rows(path, table) if table is not None else ():
            if row.key not in seen:
                seen.add(row.key)
                yield row
    if not seen:
        raise ConfigError(
            f"there are no completions in {folder}: no step is done yet, or "
            "completions.per_step = 0"
        )


_NEWEST = "_newest.parquet"


def _newest_file(folder: Path) -> Path:
    return folder / _NEWEST


def _sample_files(folder: Path) -> list[Path]:
    """In the order of the steps."""
    return sorted(folder.glob("steps-*.parquet"))


def _read(path: Path) -> pa.Table | None:
    """What is in a file; None if there is none. Raises `ConfigError` for a damaged one."""
    try:
        with path.open("rb") as file:
            table = parquet.read_table(file)
    except FileNotFoundError:
        # The learner deletes the oldest to make room.
        return None
    except (OSError, pa.ArrowException) as error:
        raise ConfigError(_damaged(path, brief(error))) from error
    types = {field.name: field.type for field in table.schema}
    for name, kind in _FACTS.items():
        if types.get(name) != kind:
            raise ConfigError(
                _damaged(path, f"its column {name!r} is {types.get(name, 'missing')}")
            )
    return table


def _damaged(path: Path, cause: str) -> str:
    return f"{path} is damaged: {cause}; without that file the others can be read"


def _table(rows: Iterable[Completion]) -> pa.Table:
    rows = list(rows)
    columns: dict[str, Any] = {
        name: pa.array([getattr(row, name) for row in rows], kind) for name, kind in _FACTS.items()
    }
    for name in rows[0].scores if rows else ():
        scores = [row.scores[name] for row in rows]
        columns[_SCORE + name] = pa.array(
            [None if math.isnan(score) else score for score in scores], pa.float32()
        )
    return pa.table(columns)


def _rows(path: Path, table: pa.Table) -> Iterator[Completion]:
    for row in table.to_pylist():
        facts = {name: row[name] for name in _FACTS}
        if None in facts.values():
            raise ConfigError(_damaged(path, "a value is missing"))
        scores = {
            name.removeprefix(_SCORE): math.nan if score is None else float(score)
            for name, score in row.items()
            if name.startswith(_SCORE)
        }
        yield Completion(**facts, scores=scores)
