"""The run folder: configuration, a line per step, checkpoints, and the summary at the end."""

import fcntl
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, Self, TextIO, TypeVar

from pydantic import ValidationError

from learner.config.file import load_config
from learner.config.resume import check_resumable
from learner.config.run import RunConfig
from learner.record_files import append_record, as_text, read_lines, read_record, write_whole
from learner.records import (
    Control,
    Endpoints,
    EvaluationResult,
    Record,
    RunIdentity,
    Step,
    Summary,
)
from protocol.errors import ConfigError, TrainingError
from protocol.keys import public_key_text

R = TypeVar("R", bound=Record)


def how_to_go_on(run: Path) -> str:
    """Return the end of an error text about something outside of the run."""
    return f"put that right and continue with: gdpo learner --resume {run}"


class RunFolder:
    """``runs/NAME/``, new for every run: an earlier one of the same name is never touched.

    It alone knows the names of the files. What writes raises `TrainingError` if it cannot, because
    the disk is full or read-only; what reads raises `ConfigError` if a file is missing or damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config_file = path / "config.toml"
        """The resolved configuration."""
        self.is_new = False
        """Whether it was made by this object."""
        self._run, self._endpoints = path / "run.json", path / "endpoints.json"
        self._control, self._summary = path / "control.json", path / "summary.json"
        self._evaluations = path / "evaluations.jsonl"
        self._steps = path / "metrics.jsonl"
        self._steps_file: BinaryIO | None = None
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
            folder._write(folder.config_file, config.to_toml())
            run_id = f"{path.name}/{uuid.uuid4().hex[:8]}"
            folder._write_record(folder._run, RunIdentity(run_id=run_id))
            return folder
        raise ConfigError(f"{base} and its 9,999 successors exist; choose another name")

    @classmethod
    def resume(cls, path: Path, overrides: list[str]) -> tuple[Self, RunConfig]:
        """Return the folder of an earlier run and its configuration; raises `ConfigError`.

        ``overrides`` may change what the groups and prompts of the run do not depend on.
        """
        folder = cls(path)
        if not folder._run.is_file():
            raise ConfigError(f"{path} is no folder of a run that can be resumed")
        config = load_config(folder.config_file, overrides)
        check_resumable(folder.read_config(), config)
        summary = folder.read_summary() if folder.has_summary else None
        if summary and summary.completed and summary.steps >= config.training.steps:
            raise ConfigError(
                f"{path} is complete, with {summary.steps} steps; to train on, add "
                f"training.steps=N with a larger N"
            )
        return folder, config

    # --- who works in it --------------------------------------------------------------------------

    def claim(self) -> None:
        """Be the one learner of this folder until `close`; raises `ConfigError`."""
        try:
            self._lock = (self.path / "lock").open("w")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            # `close` is for the learner that has the folder.
            assert self._lock is not None
            self._lock.close()
            raise ConfigError(f"another learner works in {self.path}") from error
        except OSError as error:
            raise ConfigError(f"cannot write {self.path}: {error.strerror}") from error
        # Left by a learner that was killed.
        self._remove(self._endpoints)
        self._remove(self._control)

    def go_on(self, config: RunConfig) -> None:
        """Become this run, once its learner has found nothing wrong."""
        self._write(self.config_file, config.to_toml())
        self._remove(self._summary)

    def forget_last_learner(self) -> None:
        """Leave nothing that could be taken for the learner that is going to be started."""
        self._remove(self._endpoints)
        self._remove(self._summary)

    def discard(self) -> None:
        """Leave nothing of a run that could not begin."""
        self.close()
        shutil.rmtree(self.path, ignore_errors=True)

    def close(self) -> None:
        """Let the next learner in; callable more than once."""
        with suppress(OSError):
            self._control.unlink(missing_ok=True)
        if self._steps_file is not None:
            self._steps_file.close()
        if self._lock is not None:
            self._lock.close()

    # --- paths of what others write ---------------------------------------------------------------

    @property
    def journal(self) -> Path:
        """The database of groups that came in and of the batches made of them."""
        return self.path / "journal.sqlite"

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return self.path / "checkpoints"

    @property
    def checkpoint(self) -> Path:
        """The newest checkpoint's model, when the run has ended."""
        return self.path / "checkpoint"

    @property
    def completions(self) -> Path:
        """The folder of completions to read; see `learner.completions.files`."""
        return self.path / "completions.parquet"

    @property
    def learner_key(self) -> Path:
        """The learner's public key, for actors."""
        return self.path / "learner.key"

    @property
    def curves(self) -> Path:
        """The picture of the run."""
        return self.path / "plots" / "curves.png"

    def log(self, process: str) -> Path:
        """Return the path of the output of a process that the launcher started."""
        return self.path / "logs" / f"{process}.log"

    # --- writing ----------------------------------------------------------------------------------

    def write_learner_key(self, public: str) -> None:
        """Write `learner_key` in the format of `protocol.keys`."""
        self.learner_key.write_text(public_key_text(public))

    def write_endpoints(self, endpoints: Endpoints) -> None:
        """Write where the learner listens."""
        self._write_record(self._endpoints, endpoints)

    def write_control(self, control: Control) -> None:
        """Write how to command the learner, for its user only."""
        self._write_record(self._control, control, mode=0o600)

    def append_evaluation(self, evaluation: EvaluationResult) -> None:
        """Add one line of evaluations: a resumed run cannot find out what an older policy could."""
        with self._writing(self._evaluations), self._evaluations.open("ab", buffering=0) as file:
            append_record(file, evaluation)

    def write_summary(self, summary: Summary) -> None:
        """Write what the run achieved."""
        self._write_record(self._summary, summary)

    def append_step(self, step: Step) -> None:
        """Add one line of metrics, on disk at once."""
        with self._writing(self._steps):
            if self._steps_file is None:
                self._steps_file = self._steps.open("ab", buffering=0)
            append_record(self._steps_file, step)

    def forget_steps_after(self, step: int) -> None:
        """Leave out the metrics of what is going to be trained again."""
        self._keep(self._steps, Step, lambda line: line.step <= step)

    def forget_evaluations_after(self, version: int) -> None:
        """Leave out the evaluations of versions that are going to be made again, as others."""
        self._keep(self._evaluations, EvaluationResult, lambda line: line.version <= version)

    def show_checkpoint(self, model: Path) -> None:
        """Point `checkpoint` at the newest one's model."""
        with self._writing(self.checkpoint):
            partial = self.path / "checkpoint.partial"
            partial.unlink(missing_ok=True)
            partial.symlink_to(os.path.relpath(model, self.path))
            partial.rename(self.checkpoint)

    # --- reading ----------------------------------------------------------------------------------

    @property
    def run_id(self) -> str:
        """The run's own id, whichever learner continues it; raises `ConfigError`."""
        return read_record(self._run, RunIdentity).run_id

    def read_config(self) -> RunConfig:
        """Return the resolved configuration."""
        return load_config(self.config_file)

    @property
    def has_endpoints(self) -> bool:
        """Whether a learner has said where it listens."""
        return self._endpoints.exists()

    def read_endpoints(self) -> Endpoints:
        """Return where the learner listens."""
        return read_record(self._endpoints, Endpoints, "; is it a run folder, and its learner up?")

    def read_control(self) -> Control:
        """Return how to command the learner; nobody can once its run is over."""
        if not self._control.exists():
            raise ConfigError(
                f"no learner to command in {self.path}, or its run is over: there is no "
                f"{self._control}"
            )
        return read_record(self._control, Control)

    def read_evaluations(self) -> list[EvaluationResult]:
        """Return the evaluations in the order in which they were due; empty without any."""
        if not self._evaluations.exists():
            return []
        return read_lines(self._evaluations, EvaluationResult)

    @property
    def has_summary(self) -> bool:
        """Whether the run has ended, completed or not."""
        return self._summary.exists()

    def read_summary(self) -> Summary:
        """Return what the run achieved."""
        return read_record(self._summary, Summary)

    @property
    def num_steps(self) -> int:
        """Number of steps with metrics; 0 too where they cannot be read."""
        try:
            with self._steps.open("rb") as lines:
                return sum(1 for _ in lines)
        except OSError:
            return 0

    def read_steps(self) -> list[Step]:
        """Return the steps with metrics in their order, one at least."""
        steps = read_lines(self._steps, Step, "; is it a run folder?")
        if not steps:
            raise ConfigError(f"{self._steps} holds no step yet")
        return steps

    # --- how --------------------------------------------------------------------------------------

    def _keep(self, path: Path, kind: type[R], wanted: Callable[[R], bool]) -> None:
        """Leave those lines in a file that are whole, and wanted."""
        if not path.exists():
            return
        kept = []
        for line in path.read_text(errors="replace").splitlines():
            try:
                if wanted(kind.model_validate_json(line)):
                    kept.append(f"{line}\n")
            except ValidationError:
                # The end of what a killed learner was writing, or damage: nobody could read it.
                continue
        self._write(path, "".join(kept))

    def _write_record(self, path: Path, record: Record, mode: int = 0o644) -> None:
        self._write(path, as_text(record), mode)

    def _write(self, path: Path, content: str, mode: int = 0o644) -> None:
        with self._writing(path):
            write_whole(path, content, mode)

    def _remove(self, path: Path) -> None:
        with self._writing(path):
            path.unlink(missing_ok=True)

    @contextmanager
    def _writing(self, path: Path) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise TrainingError(
                f"cannot write {path}: {error.strerror}; {how_to_go_on(self.path)}"
            ) from error
