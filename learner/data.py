"""Prompts: loading a data set, and the endless seeded stream of work made from it."""

import logging
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from learner.config import RunConfig
from protocol.errors import ConfigError, brief
from protocol.leases import Work

_EMPTY = "is empty: there is nothing to train on"
_MAX_ROW_BYTES = 1 << 20
_FILE_TYPES = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}

Row = dict[str, Any]


def check_rows(source: str, split: str) -> None:
    """Raises what `load_rows` does about a file; the hub is not asked."""
    if Path(source).suffix in _FILE_TYPES:
        load_rows(source, split)


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


class PromptStream:
    """Every row once an epoch, in an order that depends on seed and epoch only.

    A place in the stream is a ticket: 0, 1, 2, ... without end.
    """

    def __init__(self, rows: list[Row], config: RunConfig) -> None:
        if not rows:
            raise ConfigError("the training data is empty")
        self.rows = rows
        self.next_ticket = 0
        self._config = config
        self._epoch = -1
        self._order: list[int] = []

    def next(self) -> Work:
        self.next_ticket += 1
        return self.work(self.next_ticket - 1)

    def work(self, ticket: int) -> Work:
        """What is at one place."""
        epoch, place = divmod(ticket, len(self.rows))
        if epoch != self._epoch:
            random = np.random.default_rng([self._config.seed, epoch])
            self._epoch, self._order = epoch, random.permutation(len(self.rows)).tolist()
        index = self._order[place]
        return Work(
            prompt_id=f"train/{epoch}/{index}",
            row=self.rows[index],
            seed=_seed(self._config.seed, 0, epoch, index),
            num_rollouts=self._config.sampling.num_rollouts,
            temperature=self._config.sampling.temperature,
            max_tokens=self._config.sampling.max_tokens,
            ticket=ticket,
        )


def evaluation_work(rows: list[Row], config: RunConfig, version: int) -> list[Work]:
    """The held-out prompts, with seeds that are the same at every evaluation."""
    return [
        Work(
            prompt_id=f"heldout/{version}/{index}",
            row=row,
            seed=_seed(config.seed, 1, 0, index),
            num_rollouts=config.eval.num_rollouts,
            temperature=config.eval.temperature,
            max_tokens=config.sampling.max_tokens,
            purpose="eval",
        )
        for index, row in enumerate(rows[: config.eval.prompts])
    ]


def check_work(row: Row, config: RunConfig) -> Work:
    """A few short sequences, to see whether an actor computes what the learner does."""
    return Work(
        prompt_id="check",
        row=row,
        seed=_seed(config.seed, 2),
        num_rollouts=min(4, config.sampling.num_rollouts),
        temperature=config.sampling.temperature,
        max_tokens=min(64, config.sampling.max_tokens),
        purpose="check",
    )


def _seed(*parts: int) -> int:
    """A 63-bit seed; neighbours in any part give unrelated streams."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> np.uint64(1))
