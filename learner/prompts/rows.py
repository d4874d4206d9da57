"""The rows of a data set."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from learner.config.data import HeldoutSet
from protocol.errors import ConfigError, brief

_EMPTY = "is empty: there is nothing to train on"
_MAX_ROW_BYTES = 1 << 20
_FILE_TYPES = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}

Row = dict[str, Any]


def check_rows(source: str, split: str) -> None:
    """Check a file, and raise what `load_rows` does; the hub is not asked."""
    if Path(source).suffix in _FILE_TYPES:
        load_rows(source, split)


def load_heldout(sets: Sequence[HeldoutSet]) -> list[list[Row]]:
    """Rows of each set, those of the same source once; raises `ConfigError`."""
    loaded: dict[tuple[str, str], list[Row]] = {}
    for heldout in sets:
        where = (heldout.source, heldout.split)
        if where not in loaded:
            loaded[where] = load_rows(*where)
    return [loaded[heldout.source, heldout.split] for heldout in sets]


def load_rows(source: str, split: str) -> list[Row]:
    """Rows of a file or hub data set as plain values; raises `ConfigError`.

    Every row has a ``prompt``: a string, or a list of chat messages.
    """
    # Importing `datasets` takes a second, which commands that load no data need not wait.
    import datasets

    # What it logs of a broken file comes in our own error, and its bars would tear our display.
    datasets.logging.set_verbosity(logging.CRITICAL)
    datasets.disable_progress_bars()
    try:
        file_type = _FILE_TYPES.get(Path(source).suffix)
        if file_type and not Path(source).is_file():
            raise ConfigError(f"no such data file: {Path(source).absolute()}")
        if file_type and Path(source).stat().st_size == 0:
            raise ConfigError(f"{source} {_EMPTY}")
        if file_type:
            data = datasets.load_dataset(file_type, data_files=source, split="train")
        else:
            data = datasets.load_dataset(source, split=split)
    except ConfigError:
        raise
    except Exception as error:
        # A file with columns but without rows is an error to `datasets`, of no type of its own.
        if "corresponds to no data" in str(error):
            raise ConfigError(f"{source} {_EMPTY}") from error
        raise ConfigError(
            f"cannot load data {source!r}: {brief(error.__cause__ or error)}; give a hub name or "
            f"a file of type {', '.join(_FILE_TYPES)}"
        ) from error
    if "prompt" not in data.column_names:
        raise ConfigError(f"{source}: no column 'prompt' among {', '.join(data.column_names)}")
    rows: list[Row] = [_plain(source, index, row) for index, row in enumerate(data)]
    if not rows:
        raise ConfigError(f"{source} {_EMPTY}")
    return rows


def _plain(source: str, index: int, row: Row) -> Row:
    if not isinstance(row["prompt"], (str, list)):
        raise ConfigError(
            f"{source}, row {index}: prompt is a {type(row['prompt']).__name__}, "
            "not a string or a list of messages"
        )
    try:
        plain = dict(msgspec.to_builtins(row))
    except TypeError as error:
        raise ConfigError(f"{source}, row {index}: {error}") from error
    size = len(msgspec.msgpack.encode(plain))
    if size > _MAX_ROW_BYTES:
        raise ConfigError(
            f"{source}, row {index}: {size} bytes; a row has {_MAX_ROW_BYTES} at most"
        )
    return plain
