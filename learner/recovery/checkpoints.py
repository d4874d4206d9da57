"""Checkpoints: written aside and renamed, with a manifest of digests, while training continues.

    checkpoints/step-00000025/
        model/          Hugging Face form: opens with AutoModelForCausalLM.from_pretrained
        trainer/        optimiser and random generator, by torch.distributed.checkpoint
        state.json      `learner.state.RunState`
        manifest.json   size and XXH3-128 digest of every other file

Training waits only while weights and optimiser are copied to CPU memory; a thread writes the copy.
Everything is safetensors and JSON: nothing is unpickled, not even by torch.distributed.checkpoint,
which would pickle its metadata in its own format.

The digests guard against accidents: a disk that lies, a copy that broke off. Against forgery no
digest would that lies beside the files: whoever can write those can write it too. So it is one that
is faster than disks are, because 84 GB are read for it when they are written and at every resume.
"""

import hashlib
import json
import logging
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

import msgspec
import torch
import torch.distributed.checkpoint as dcp
import xxhash
from torch.distributed.checkpoint import (  # type: ignore[attr-defined]
    CheckpointException,
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)

from learner.run_folder import how_to_go_on
from learner.state import RunState
from learner.threads import Worker
from learner.training.policy import Policy
from learner.training.shards import gathered
from protocol.errors import AsyncGdpoError, ConfigError, TrainingError, brief

log = logging.getLogger("learner")

_NAME = re.compile(r"step-(\d{8})")
_PARTIAL = ".partial"
_DAMAGED = ".damaged"

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A complete checkpoint."""

    path: Path
    version: int
    state: RunState

    @property
    def model(self) -> Path:
        """Folder of the model in Hugging Face form."""
        return self.path / "model"


@dataclass(frozen=True, slots=True, eq=False)
class _Contents:
    state: RunState
    model: Tensors
    trainer: Tensors


class Checkpoints:
    """Writes the checkpoints of one run, one at a time, and keeps the newest."""

    def __init__(
        self,
        folder: Path,
        policy: Policy,
        *,
        keep: int,
        on_written: Callable[[], None] = lambda: None,
    ) -> None:
        """``on_written`` is called on the writer's thread. Raises `ConfigError`."""
        self.folder = folder
        self._policy = policy
        self._keep = keep
        self._on_written = on_written
        self._waiting: _Contents | None = None
        self._idle = Event()
        self._idle.set()
        self._worker = Worker("checkpoint", self._take, self._write, drains=True)
        """One for all of them: with a new one each time, the memory that writing takes would stay
        with another of the allocator's arenas each time."""
        self._started = False
        self._failure: AsyncGdpoError | None = None
        try:
            folder.mkdir(exist_ok=True)
            for leftover in folder.glob(f"*{_PARTIAL}"):
                shutil.rmtree(leftover)
        except OSError as error:
            raise ConfigError(f"cannot write {folder}: {error.strerror}") from error

    @property
    def versions(self) -> list[int]:
        """Versions of the complete ones, oldest first."""
        return sorted(version for version, _ in _complete(self.folder))

    def put_aside_after(self, version: int) -> None:
        """Rename what is newer: it is damaged, or the run would not continue from ``version``.

        It must not count as one to continue from. Raises `ConfigError`.
        """
        for found, path in list(_complete(self.folder)):
            if found > version:
                aside = path.with_name(f"{path.name}{_DAMAGED}")
                try:
                    shutil.rmtree(aside, ignore_errors=True)
                    path.rename(aside)
                except OSError as error:
                    raise ConfigError(f"cannot rename {path}: {error.strerror}") from error

    def path(self, version: int) -> Path:
        """Folder of the checkpoint of a version, whether it exists or not."""
        return self.folder / f"step-{version:08}"

    @property
    def is_writing(self) -> bool:
        """Whether one has begun that is not complete."""
        return not self._idle.is_set()

    def begin(self, state: RunState, trainer: Tensors) -> None:
        """Copy everything now and write it on a thread; waits for the one before.

        Of a model that is shared out, all ranks take part (`learner.training.shards.gathered`).

        Raises `TrainingError` if that one could not be written.
        """
        self.finish()
        model = self._policy.model.state_dict()
        contents = _Contents(state, gathered(model, keep=True), gathered(trainer, keep=True))
        with self._worker.adding():
            self._idle.clear()
            self._waiting = contents
        if not self._started:
            self._started = True
            self._worker.start(self._fail)

    def finish(self) -> None:
        """Wait for the one that is being written; raises `TrainingError` if it could not be."""
        self._idle.wait()
        self.raise_if_failed()

    def close(self) -> None:
        """End the thread after the last one, which has begun; does not wait for it."""
        self._worker.close(timeout_s=0.0)

    def raise_if_failed(self) -> None:
        """Raise the `TrainingError` because of which a checkpoint could not be written, if any."""
        if self._failure is not None:
            raise self._failure

    def _take(self) -> _Contents | None:
        contents, self._waiting = self._waiting, None
        if contents is None:
            # Here, where nothing refers to the last copy any more: the next one is made then.
            self._idle.set()
        return contents

    def _fail(self, error: AsyncGdpoError) -> None:
        """Give the error to whoever waits for a checkpoint; on the thread, which has ended."""
        self._failure = error
        self._idle.set()

    def _write(self, contents: _Contents) -> None:
        target = self.path(contents.state.version)
        partial = target.with_name(target.name + _PARTIAL)
        try:
            partial.mkdir()
            self._policy.save(partial / "model", contents.model)
            _save_tensors(partial / "trainer", contents.trainer)
            (partial / "state.json").write_bytes(msgspec.json.encode(contents.state))
            _write_manifest(partial)
            partial.rename(target)
            _flush(self.folder)
            for version in self.versions[: -self._keep]:
                _remove(self.path(version))
        except Exception as error:
            # Disks and serialisers fail in many ways; none of them may pass for a checkpoint.
            shutil.rmtree(partial, ignore_errors=True)
            last = f"step {self.versions[-1]}" if self.versions else "none"
            raise TrainingError(
                f"cannot write the checkpoint {target}: {_reason(error)}; the last good one: "
                f"{last}; {how_to_go_on(self.folder.parent)}"
            ) from None
        self._on_written()


def newest(folder: Path) -> Checkpoint | None:
    """The newest checkpoint that is complete and undamaged; None if there is none.

    A damaged one is named in the log and passed over. Raises `ConfigError` if all are damaged.
    """
    problems = []
    for _, path in sorted(_complete(folder), reverse=True):
        try:
            return _opened(path)
        except ConfigError as error:
            problems.append(str(error))
            log.warning("%s; passed over", error)
    if problems:
        raise ConfigError(f"every checkpoint in {folder} is damaged: {'; '.join(problems)}")
    return None


def oldest(folder: Path) -> Checkpoint | None:
    """The oldest checkpoint; None if there is none. Raises `ConfigError` if it is damaged."""
    found = sorted(_complete(folder))
    return _opened(found[0][1]) if found else None


def verified(path: Path) -> Checkpoint:
    """The checkpoint in a folder that another process has found undamaged."""
    state = msgspec.json.decode((path / "state.json").read_bytes(), type=RunState)
    return Checkpoint(path, state.version, state)


def _opened(path: Path) -> Checkpoint:
    try:
        _verify(path)
        checkpoint = verified(path)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"checkpoint {path.name} is damaged: {brief(error)}") from error
    return checkpoint


def load_tensors(checkpoint: Checkpoint, tensors: Tensors) -> None:
    """Fill ``tensors`` in place with what `Checkpoints.begin` was given for the trainer."""
    with _alone(), _plain_errors():
        dcp.load(  # type: ignore[attr-defined]
            dict(tensors),
            storage_reader=HuggingFaceStorageReader(str(checkpoint.path / "trainer")),
            no_dist=True,
        )


def _save_tensors(folder: Path, tensors: Tensors) -> None:
    with _alone(), _plain_errors():
        writer = HuggingFaceStorageWriter(str(folder))
        dcp.save(dict(tensors), storage_writer=writer, no_dist=True)  # type: ignore[attr-defined]


@contextmanager
def _plain_errors() -> Iterator[None]:
    """torch.distributed.checkpoint wraps whatever happens into something that is no Exception."""
    try:
        yield
    except CheckpointException as error:
        raise next(iter(error.failures.values()))[0] from error


@contextmanager
def _alone() -> Iterator[None]:
    """torch.distributed.checkpoint warns of a single process, which is what we are."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _complete(folder: Path) -> Iterator[tuple[int, Path]]:
    for path in folder.iterdir() if folder.is_dir() else ():
        if match := _NAME.fullmatch(path.name):
            yield int(match[1]), path


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.name != "manifest.json")


def _remove(folder: Path) -> None:
    """Remove a checkpoint: at once, as seen by code that looks for complete ones."""
    partial = folder.with_name(folder.name + _PARTIAL)
    folder.rename(partial)
    shutil.rmtree(partial)


def _write_manifest(folder: Path) -> None:
    entries = {}
    for path in _files(folder):
        _flush(path)
        entries[str(path.relative_to(folder))] = _describe(path)
    manifest = folder / "manifest.json"
    manifest.write_text(json.dumps({"files": entries}, indent=1))
    _flush(manifest)
    for path in (*folder.rglob("*/"), folder):
        _flush(path)


def _verify(folder: Path) -> None:
    """Raise ValueError unless all files are there and are what the manifest says."""
    expected = json.loads((folder / "manifest.json").read_text())["files"]
    for name, entry in expected.items():
        path = folder / name
        if not path.is_file():
            raise ValueError(f"{name} is missing")
        if _describe(path) != entry:
            raise ValueError(f"{name} is not what was written")


def _describe(path: Path) -> dict[str, Any]:
    with path.open("rb", buffering=0) as file:
        digest = hashlib.file_digest(file, xxhash.xxh3_128)
    return {"bytes": path.stat().st_size, "xxh3_128": digest.hexdigest()}


def _flush(path: Path) -> None:
    """Put a file on disk, not only into the system's cache; of a folder, its list of names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or brief(error)
