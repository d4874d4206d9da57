"""The run folder: configuration, a line per step, checkpoints, and the summary at the end."""

import fcntl
import json
import os
import uuid
from pathlib import Path
from typing import Any, Self, TextIO

from learner.config import RunConfig
from learner.config_file import load_config
from protocol.errors import ConfigError
from protocol.keys import public_key_text

_FIXED = ("model.path", "model.dtype", "data", "seed", "sampling", "rewards", "buffer.durability")
"""What a run cannot be resumed without, as it was: groups and prompts depend on it."""


class RunFolder:
    """``runs/NAME/``, new for every run: an earlier one of the same name is never touched."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._metrics: TextIO | None = None
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
            (path / "config.toml").write_text(config.to_toml())
            folder._write("run.json", {"run_id": f"{path.name}/{uuid.uuid4().hex[:8]}"})
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
        return folder, config

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

    def take(self, config: RunConfig) -> None:
        """Be the one learner of this folder until `close`; raises `ConfigError`."""
        try:
            self._lock = (self.path / "lock").open("w")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(f"another learner works in {self.path}") from error
        except OSError as error:
            raise ConfigError(f"cannot write {self.path}: {error.strerror}") from error
        # Of a learner that was killed.
        for name in ("endpoints.json", "control.json", "summary.json"):
            (self.path / name).unlink(missing_ok=True)
        (self.path / "config.toml").write_text(config.to_toml())

    def write_endpoints(self, learner: str, metrics: str) -> None:
        """Where the learner listens, for the launcher and for people."""
        self._write("endpoints.json", {"learner": learner, "metrics": metrics})

    def write_control(self, url: str, token: str) -> None:
        """How to command the learner, for its user only."""
        self._write("control.json", {"url": url, "token": token}, mode=0o600)

    def write_evaluation(self, evaluation: dict[str, Any]) -> None:
        """What the policy could before training: a resumed run cannot find out."""
        self._write("evaluation_before.json", evaluation)

    def read_evaluation(self) -> dict[str, Any] | None:
        try:
            return dict(json.loads((self.path / "evaluation_before.json").read_text()))
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise ConfigError(f"{self.path / 'evaluation_before.json'} is damaged") from error

    def append_step(self, line: dict[str, Any]) -> None:
        """One line of metrics.jsonl, on disk at once."""
        if self._metrics is None:
            self._metrics = (self.path / "metrics.jsonl").open("a")
        self._metrics.write(json.dumps(line) + "\n")
        self._metrics.flush()

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
        partial = path.with_name("metrics.jsonl.partial")
        partial.write_text("".join(kept))
        partial.rename(path)

    def show_checkpoint(self, model: Path) -> None:
        """Point ``checkpoint`` at the newest one's model."""
        partial = self.path / "checkpoint.partial"
        partial.unlink(missing_ok=True)
        partial.symlink_to(os.path.relpath(model, self.path))
        partial.rename(self.checkpoint)

    def write_summary(self, summary: dict[str, Any]) -> None:
        self._write("summary.json", summary)

    def close(self) -> None:
        (self.path / "control.json").unlink(missing_ok=True)
        if self._metrics is not None:
            self._metrics.close()
        if self._lock is not None:
            self._lock.close()

    def _write(self, name: str, content: dict[str, Any], mode: int = 0o644) -> None:
        """Complete or not at all: readers never see half a file."""
        partial = self.path / f"{name}.partial"
        partial.unlink(missing_ok=True)
        partial.touch(mode=mode)
        with partial.open("w") as file:
            json.dump(content, file, indent=2)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        partial.rename(self.path / name)


def _at(config: RunConfig, key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    if key == "rewards":
        # Their weights and conditions may change while a run goes on anyway.
        return [(reward.name, reward.function) for reward in value]
    return value
