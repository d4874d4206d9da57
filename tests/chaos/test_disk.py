"""Full and read-only disks under a learner: a clear error, and the last good state stays readable.

The run folder, or only its checkpoints, lies on a small disk in memory, which the processes of the
test see in a mount namespace of their own.
"""

import resource
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from learner.config.file import load_config
from learner.recovery.checkpoints import newest
from learner.replay.journal_reader import JournalReader, RecordedBatch
from learner.run_folder import RunFolder
from learner.training.policy import load_policy
from tests.integration.processes import (
    QUICK,
    RECIPE,
    Process,
    System,
    assert_books_balance,
    steps,
    wait_for,
)

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(240)]

DISK_BYTES = 24 << 20
LONG = (
    "training.steps=5000",
    "checkpoints.every_steps=4",
    "deadlines.actor_timeout_s=3",
    "weights.timeout_s=2",
    "training.pause_per_step_s=0.05",
)
GO_ON = "gdpo learner --resume "


class Disk:
    """A disk in memory over a folder, for those who enter."""

    def __init__(self, path: Path) -> None:
        path.mkdir(exist_ok=True)
        self._path = path
        self._keeper = subprocess.Popen(
            ["unshare", "-Urm", "sh", "-c", "echo; exec sleep infinity"], stdout=subprocess.PIPE
        )
        ready = self._keeper.stdout is not None and self._keeper.stdout.readline()
        if not ready:
            pytest.skip("user namespaces are not allowed here")
        pid = self._keeper.pid
        self.enter = ("nsenter", f"--target={pid}", "-U", "-m", "--preserve-credentials")
        self.view = Path(f"/proc/{pid}/root{path}")
        """From outside."""
        self._run("mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(path))

    def fill(self) -> None:
        with (self.view / "filler").open("wb", buffering=0) as file:
            for size in (1 << 16, 1):
                try:
                    while True:
                        file.write(bytes(size))
                except OSError:
                    continue

    def make_room(self) -> None:
        (self.view / "filler").unlink()

    def make_read_only(self) -> None:
        self._run("mount", "-o", "remount,ro", str(self._path))

    def make_writable(self) -> None:
        self._run("mount", "-o", "remount,rw", str(self._path))

    def close(self) -> None:
        # Its end, and that of its pipe.
        with self._keeper:
            self._keeper.kill()

    def _run(self, *command: str) -> None:
        result = subprocess.run([*self.enter, *command], capture_output=True, text=True, timeout=60)
        assert result.returncode == 0, result.stderr


class OnDisk(System):
    """A run whose folder, or a part of it, is on a disk of its own."""

    def __init__(self, folder: Path, part: str = "") -> None:
        (folder / "work").mkdir()
        self.own = folder / "runs" / "tool_calling_tiny"
        overrides = [f"runs_folder={folder}/runs", *QUICK, *LONG]
        RunFolder.create(load_config(RECIPE, overrides))
        content = {path.name: path.read_bytes() for path in self.own.iterdir()}
        self.disk = Disk(self.own / part)
        for name, text in content.items():
            (self.run_folder / name).write_bytes(text)
        super().__init__(folder / "work", self.disk.enter)

    @property
    def run_folder(self) -> Path:
        """As it is seen from outside."""
        pid = self.disk.enter[1].removeprefix("--target=")
        return Path(f"/proc/{pid}/root{self.own}")

    def start(self) -> Process:
        arguments = (str(self.own / "config.toml"), "--run-folder", str(self.own))
        return self._listening("learner", *arguments)

    def resume(self) -> Process:
        return self._listening("resumed", "--resume", str(self.own))

    def lines(self) -> dict[int, dict[str, Any]]:
        return {step["step"]: step for step in steps(self)}

    def batches(self) -> list[RecordedBatch]:
        # SQLite resolves the path by itself, out of the namespace: it gets a copy.
        for path in self.run_folder.glob("journal.sqlite*"):
            shutil.copy(path, self.folder)
        return JournalReader.open(self.folder / "journal.sqlite").batches()

    def stored(self) -> set[int]:
        """Prompt indices, as far as ``gdpo journal`` can read them."""
        command = self.gdpo("journal", "journal", str(self.own))
        assert command.wait(60) == 0, command.output
        lines = [line for line in command.output.splitlines() if line.startswith("prompt ")]
        return {int(line.split()[1]) for line in lines}

    def close(self) -> None:
        super().close()
        self.disk.close()


@pytest.fixture
def run(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[OnDisk]:
    run = OnDisk(tmp_path, getattr(request, "param", ""))
    yield run
    run.close()


def error_of(process: Process) -> str:
    """The one line that says what is wrong."""
    assert process.wait(60) == 1, process.output
    assert "Traceback" not in process.output
    [line] = [line for line in process.output.splitlines() if line.startswith("gdpo: error: ")]
    return line


def assert_good_state(run: OnDisk) -> None:
    """The newest checkpoint opens."""
    checkpoint = newest(run.run_folder / "checkpoints")
    assert checkpoint is not None
    load_policy(load_config(RECIPE), checkpoint.model)


def assert_goes_on(run: OnDisk, before: dict[int, dict[str, Any]], stored: set[int]) -> None:
    """The same history, every group that was there, and books that balance."""
    run.resume()
    actor = run.start_actor("actor-2")
    run.wait_for_step(max(before) + 6, 90)
    summary = run.summary_after_stop()
    assert actor.wait(20) == 0, actor.output
    assert_books_balance(summary)
    after = run.lines()
    assert sorted(after) == list(range(1, max(after) + 1))
    for step, line in before.items():
        assert after[step]["loss"] == line["loss"]
    batches = run.batches()
    assert len({index for batch in batches for index in batch.prompt_indices}) == sum(
        len(batch.prompt_indices) for batch in batches
    )
    groups = summary["books"]["groups"]
    assert groups["accepted"] >= len(stored)
    assert groups["trained"] == 8 * summary["steps"]


def begin(run: OnDisk) -> tuple[Process, Process]:
    learner = run.start()
    actor = run.start_actor("actor")
    run.wait_for_step(9, 90)
    return learner, actor


def test_a_full_disk_ends_the_run_with_a_clear_error_and_it_goes_on_when_there_is_room(run):
    learner, actor = begin(run)
    run.disk.fill()
    error = error_of(learner)
    assert f"cannot write {run.own}" in error.replace("the journal ", "").replace(
        "the checkpoint ", ""
    )
    assert "No space left on device" in error or "disk is full" in error
    assert GO_ON + str(run.own) in error
    assert actor.wait(30) == 0, actor.output
    # Still full.
    stored, before = run.stored(), run.lines()
    assert stored
    assert_good_state(run)
    again = run.gdpo("still-full", "learner", "--resume", str(run.own))
    assert again.wait(60) in (1, 2), again.output
    assert "Traceback" not in again.output
    assert "gdpo: error: cannot write" in again.output
    run.disk.make_room()
    assert stored <= run.stored()
    assert_goes_on(run, before, stored)


@pytest.mark.parametrize("run", ["checkpoints"], indirect=True)
@pytest.mark.parametrize("how", ["full", "read-only"])
def test_checkpoints_that_cannot_be_written_end_the_run_with_the_last_good_one(run, how):
    learner, actor = begin(run)
    if how == "full":
        run.disk.fill()
    else:
        wait_for(lambda: _succeeds(run.disk.make_read_only), "a moment without a checkpoint")
    error = error_of(learner)
    assert f"cannot write the checkpoint {run.own}/checkpoints/step-" in error
    assert {"full": "No space left", "read-only": "Read-only file system"}[how] in error
    assert "the last good one: step " in error
    assert GO_ON + str(run.own) in error
    assert actor.wait(30) == 0, actor.output
    assert_good_state(run)
    stored, before = run.stored(), run.lines()
    assert run.summary["steps"] == max(before)
    run.disk.make_room() if how == "full" else run.disk.make_writable()
    assert_goes_on(run, before, stored)


def _succeeds(action) -> bool:
    try:
        action()
    except AssertionError:
        return False
    return True


def test_a_read_only_disk_refuses_a_resume_and_lets_the_journal_be_read(run):
    learner, _ = begin(run)
    learner.signal(signal.SIGKILL)
    learner.wait()
    run.disk.make_read_only()
    stored, before = run.stored(), run.lines()
    assert stored
    assert_good_state(run)
    again = run.gdpo("read-only", "learner", "--resume", str(run.own))
    assert again.wait(60) == 2, again.output
    assert f"cannot write {run.own}: Read-only file system" in again.output
    assert "Traceback" not in again.output
    run.disk.make_writable()
    assert_goes_on(run, before, stored)


def test_a_run_that_ended_in_order_can_be_read_on_a_read_only_disk(run):
    begin(run)
    run.summary_after_stop()
    run.disk.make_read_only()
    assert run.stored()


def test_guarantee_1_a_journal_that_fails_before_the_checkpoint_does_not_train_groups_twice(run):
    """The learner's files may have 3 MB each: the journal's log needs 4, a checkpoint's 2.3."""
    learner, actor = begin(run)
    resource.prlimit(learner.pid, resource.RLIMIT_FSIZE, (3 << 20, 3 << 20))
    error = error_of(learner)
    assert f"cannot write the journal {run.own}/journal.sqlite" in error
    assert GO_ON + str(run.own) in error
    assert actor.wait(30) == 0, actor.output
    assert_good_state(run)
    assert_goes_on(run, run.lines(), run.stored())
