"""Records in files: written whole or not at all, and read with one clear error."""

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, TypeVar

from pydantic import ValidationError

from learner.records import Record, first_problem
from protocol.errors import ConfigError

R = TypeVar("R", bound=Record)


def write_whole(path: Path, content: str, mode: int = 0o644) -> None:
    """Replace a file, complete or not at all: readers never see half of it."""
    partial = path.with_name(f"{path.name}.partial")
    partial.unlink(missing_ok=True)
    partial.touch(mode=mode)
    with partial.open("w") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)


def as_text(record: Record) -> str:
    """Return a record as the content of a file, for people too."""
    return json.dumps(record.model_dump(), indent=2) + "\n"


def append_record(file: BinaryIO, record: Record) -> None:
    """Add a line to an unbuffered file, which stays as it was if there is no room for all of it."""
    size = file.seek(0, os.SEEK_END)
    rest = (json.dumps(record.model_dump()) + "\n").encode()
    try:
        while rest:
            rest = rest[file.write(rest) :]
    except OSError:
        with suppress(OSError):
            file.truncate(size)
        raise


def read_record(path: Path, kind: type[R], hint: str = "") -> R:
    """Return what is in a file; raises `ConfigError`, with ``hint`` if it cannot be read."""
    return _decode(str(path), kind, _read(path, hint))


def read_lines(path: Path, kind: type[R], hint: str = "") -> list[R]:
    """Return the records of the lines of a file, likewise."""
    lines = _read(path, hint).splitlines()
    return [_decode(f"line {n} of {path}", kind, line) for n, line in enumerate(lines, start=1)]


def _read(path: Path, hint: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}{hint}") from error


def _decode(what: str, kind: type[R], content: bytes) -> R:
    try:
        return kind.model_validate_json(content)
    except ValidationError as error:
        raise ConfigError(f"{what} is damaged: {first_problem(error)}") from error
