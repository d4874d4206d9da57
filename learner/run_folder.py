"""The run folder: configuration, a line per step, checkpoints, and the summary at the end."""

import fcntl
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, Self, TextIO

from learner.config.file import load_config
from learner.config.run import RunConfig
from protocol.errors import ConfigError, TrainingError
from protocol.keys import public_key_text

_FIXED = (
    "model.path",
    "model.dtype",
    "data",
    "seed",
    "sampling",
    "rewards",
    "buffer.durability",
    "buffer.max_uses",
)
"""What a run cannot be resumed without, as it was: its groups, prompts and batches depend on it."""


def how_to_go_on(run: Path) -> str:
    """The end of an error text about something outside of the run."""
    return f"put that right and go on with: gdpo learner --resume {run}"


class RunFolder:
    """``runs/NAME/``, new for every run: an earlier one of the same name is never touched.

    What writes raises `TrainingError` if it cannot, because the disk is full or read-only.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.is_new = False
        """Whether it was made by this object."""
        self._metrics: BinaryIO | None = None
        self._lock: TextIO | None = None

    @classmethod
    def create(cls, config: RunConfig) -> Self:
        """Make the folder; NAME-2, NAME-3 ... if NAME exists."""
        base = Path(config.runs_folder) / config.name
        for attempt in range(1, 10_000):
            path = base if attempt == 1 else base.with_name(f"{base.name}-{attempt}")
            try:
                path.mkdir(parents=True)
            except FileExistsError:
                continue
            except OSError as error:
                raise ConfigError(f"cannot write {path}: {error.strerror}") from error
            folder = cls(path)
            folder.is_new = True
            folder._write("config.toml", config.to_toml())
            folder._write_json("run.json", {"run_id": f"{path.name}/{uuid.uuid4().hex[:8]}"})
            return folder
        raise ConfigError(f"{base} and its 9,999 successors exist; choose another name")

    @classmethod
    def resume(cls, path: Path, overrides: list[str]) -> tuple[Self, RunConfig]:
        """The folder of an earlier run and its configuration; raises `ConfigError`.

        ``overrides`` may change what the groups and prompts of the run do not depend on.
        """
        folder = cls(path)
        if not (path / "run.json").is_file():
            raise ConfigError(f"{path} is no folder of a run that can be resumed")
        before = load_config(path / "config.toml")
        config = load_config(path / "config.toml", overrides)
        for key in _FIXED:
            if _at(before, key) != _at(config, key):
                raise ConfigError(f"{key} cannot change when a run is resumed; start a new one")
        folder._check_unfinished(config.training.steps)
        return folder, config

    def _check_unfinished(self, steps: int) -> None:
        with suppress(FileNotFoundError):
            try:
                summary = json.loads((self.path / "summary.json").read_text())
                trained, completed = summary["steps"], summary["completed"]
            except (ValueError, KeyError, TypeError) as error:
                raise ConfigError(f"{self.path / 'summary.json'} is damaged") from error
            if completed and trained >= steps:
                raise ConfigError(
                    f"{self.path} is complete, with {trained} steps; to train on, add "
                    f"training.steps=N with a larger N"
                )

    @property
    def run_id(self) -> str:
        """Of this run, whichever learner continues it; raises `ConfigError`."""
        try:
            return str(json.loads((self.path / "run.json").read_text())["run_id"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{self.path / 'run.json'} is missing or damaged") from error

    @property
    def journal(self) -> Path:
        return self.path / "journal.sqlite"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def checkpoint(self) -> Path:
        """The newest checkpoint's model, when the run has ended."""
        return self.path / "checkpoint"

    @property
    def learner_key(self) -> Path:
        """The learner's public key, for actors."""
        return self.path / "learner.key"

    def write_learner_key(self, public: str) -> None:
        """In the format of `protocol.keys`."""
        self.learner_key.write_text(public_key_text(public))

    def take(self) -> None:
        """Be the one learner of this folder until `close`; raises `ConfigError`."""
        try:
            self._lock = (self.path / "lock").open("w")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(f"another learner works in {self.path}") from error
        except OSError as error:
            raise ConfigError(f"cannot write {self.path}: {error.strerror}") from error
        # Of a learner that was killed.
        for name in ("endpoints.json", "control.json"):
            with self._writing(name):
                (self.path / name).unlink(missing_ok=True)

    def go_on(self, config: RunConfig) -> None:
        """From now on the run is this one: not before its learner has found nothing wrong."""
        self._write("config.toml", config.to_toml())
        with self._writing("summary.json"):
            (self.path / "summary.json").unlink(missing_ok=True)

    def discard(self) -> None:
        """Leave nothing of a run that could not begin."""
        self.close()
        shutil.rmtree(self.path, ignore_errors=True)

    def write_endpoints(self, learner: str, metrics: str) -> None:
        """Where the learner listens, for the launcher and for people."""
        self._write_json("endpoints.json", {"learner": learner, "metrics": metrics})

    def write_control(self, url: str, token: str) -> None:
        """How to command the learner, for its user only."""
        self._write_json("control.json", {"url": url, "token": token}, mode=0o600)

    def write_evaluation(self, evaluation: dict[str, Any]) -> None:
        """What the policy could before training: a resumed run cannot find out."""
        self._write_json("evaluation_before.json", evaluation)

    def read_evaluation(self) -> dict[str, Any] | None:
        try:
            return dict(json.loads((self.path / "evaluation_before.json").read_text()))
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise ConfigError(f"{self.path / 'evaluation_before.json'} is damaged") from error

    def append_step(self, line: dict[str, Any]) -> None:
        """One line of metrics.jsonl, on disk at once."""
        with self._writing("metrics.jsonl"):
            if self._metrics is None:
                self._metrics = (self.path / "metrics.jsonl").open("ab", buffering=0)
            size = self._metrics.seek(0, os.SEEK_END)
            rest = (json.dumps(line) + "\n").encode()
            try:
                while rest:
                    rest = rest[self._metrics.write(rest) :]
            except OSError:
                with suppress(OSError):
                    self._metrics.truncate(size)
                raise

    def forget_steps_after(self, step: int) -> None:
        """Leave out of metrics.jsonl what is going to be trained again."""
        path = self.path / "metrics.jsonl"
        if not path.exists():
            return
        kept = []
        for line in path.read_text().splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(f"{line}\n")
            except (ValueError, KeyError, TypeError):
                # The end of what a killed learner was writing.
                continue
        self._write("metrics.jsonl", "".join(kept))

    def show_checkpoint(self, model: Path) -> None:
        """Point ``checkpoint`` at the newest one's model."""
        with self._writing("checkpoint"):
            partial = self.path / "checkpoint.partial"
            partial.unlink(missing_ok=True)
            partial.symlink_to(os.path.relpath(model, self.path))
            partial.rename(self.checkpoint)

    def write_summary(self, summary: dict[str, Any]) -> None:
        self._write_json("summary.json", summary)

    def close(self) -> None:
        with suppress(OSError):
            (self.path / "control.json").unlink(missing_ok=True)
        if self._metrics is not None:
            self._metrics.close()
        if self._lock is not None:
            self._lock.close()

    def _write_json(self, name: str, content: dict[str, Any], mode: int = 0o644) -> None:
        self._write(name, json.dumps(content, indent=2) + "\n", mode)

    def _write(self, name: str, content: str, mode: int = 0o644) -> None:
        """Complete or not at all: readers never see half a file."""
        with self._writing(name):
            partial = self.path / f"{name}.partial"
            partial.unlink(missing_ok=True)
            partial.touch(mode=mode)
            with partial.open("w") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            partial.rename(self.path / name)

    @contextmanager
    def _writing(self, name: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise TrainingError(
                f"cannot write {self.path / name}: {error.strerror}; {how_to_go_on(self.path)}"
            ) from error


def _at(config: RunConfig, key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    if key == "rewards":
        # What a failure of theirs means has no influence on groups that came in.
        return [reward.model_copy(update={"on_failure": "error"}) for reward in value]
    return value
