"""The run folder: resolved configuration, a line per step, and the summary at the end."""

import json
import os
from pathlib import Path
from typing import Any, Self, TextIO

from learner.config import RunConfig
from protocol.errors import ConfigError
from protocol.keys import public_key_text


class RunFolder:
    """``runs/NAME/``, new for every run: an earlier one of the same name is never touched."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._metrics: TextIO | None = None

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
            return folder
        raise ConfigError(f"{base} and its 9,999 successors exist; choose another name")

    @property
    def checkpoint(self) -> Path:
        return self.path / "checkpoint"

    @property
    def learner_key(self) -> Path:
        """The learner's public key, for actors."""
        return self.path / "learner.key"

    def write_learner_key(self, public: str) -> None:
        """In the format of `protocol.keys`."""
        self.learner_key.write_text(public_key_text(public))

    def write_endpoints(self, learner: str, metrics: str) -> None:
        """Where the learner listens, for the launcher and for people."""
        self._write("endpoints.json", {"learner": learner, "metrics": metrics})

    def write_control(self, url: str, token: str) -> None:
        """How to command the learner, for its user only."""
        self._write("control.json", {"url": url, "token": token}, mode=0o600)

    def append_step(self, line: dict[str, Any]) -> None:
        """One line of metrics.jsonl, on disk at once."""
        if self._metrics is None:
            self._metrics = (self.path / "metrics.jsonl").open("a")
        self._metrics.write(json.dumps(line) + "\n")
        self._metrics.flush()

    def write_summary(self, summary: dict[str, Any]) -> None:
        self._write("summary.json", summary)

    def close(self) -> None:
        (self.path / "control.json").unlink(missing_ok=True)
        if self._metrics is not None:
            self._metrics.close()

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
