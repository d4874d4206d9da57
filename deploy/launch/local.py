"""``gdpo run``: a learner and its actors on this machine, watched until the run is over.

Children get their own sessions, so that one Ctrl-C reaches the launcher alone, which ends them in
order: the learner first, which saves and lets its actors go. A dead actor is started again.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any

from deploy import INTERRUPTED, USER_ERROR
from deploy.results.plot import plot_run
from deploy.results.summary import print_summary
from deploy.watch.display import Display
from deploy.watch.status import fetch_status
from learner.config.run import RunConfig
from learner.records import Endpoints
from learner.run_folder import RunFolder
from learner.status import Status
from protocol.errors import ConfigError, ProtocolError, TrainingError

_ERROR = "gdpo: error: "
STOP_TIMEOUT_S = 5.0
"""Time from the request to stop until an actor that has not ended is killed."""
GRACE_S = 2.0
"""Least time that an actor has, when the learner took long over its last step."""
RESTART_DELAY_S = 1.0


@dataclass(slots=True, eq=False)
class _Child:
    name: str
    process: subprocess.Popen[bytes]
    log: Path
    log_start: int
    """Size of the log when this process began: an earlier one wrote what is before."""

    def how_it_ended(self) -> str:
        """Describe its exit code or signal, and the error line that it ended with, if any."""
        code = self.process.returncode
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        lines = self.log.read_bytes()[self.log_start :].decode(errors="replace").splitlines()
        words = [line for line in lines if line.startswith(_ERROR)]
        return f"{how}: {words[-1].removeprefix(_ERROR)}" if words else how


def launch(
    config: RunConfig,
    folder: RunFolder,
    cwd: Path,
    allowed_modules: Sequence[str] = (),
    *,
    resume_with: Sequence[str] | None = None,
) -> int:
    """Run to the end; returns the exit code. Raises `TrainingError` if the run fails.

    ``resume_with`` continues the run of ``folder``, with these overrides.
    """
    # Of a learner before: it is not the one that this one starts.
    folder.forget_last_learner()
    launcher = Launcher(config, folder, cwd, allowed_modules, resume_with)
    with Display(launcher.status):
        launcher.run()
    if not folder.has_summary:
        if launcher.stop_requested:
            return INTERRUPTED
        raise TrainingError(launcher.failure or "the learner ended without a summary")
    summary = folder.read_summary()
    print_summary(summary, plot_run(folder) if folder.num_steps else None)
    if launcher.failure:
        raise TrainingError(launcher.failure)
    return 0 if summary.completed else INTERRUPTED


def require_actor_key(config: RunConfig) -> None:
    """Check that actors started here could connect; raises `ConfigError` where they could not."""
    if config.load_keys() is not None and config.keys.actor is None:
        raise ConfigError(
            "keys.secret is set: then the actors that gdpo run starts need a key too; set "
            "keys.actor to a .key_secret file, whose .key file is in keys.allowed"
        )


class Launcher:
    """Starts, restarts and stops the processes of one run."""

    def __init__(
        self,
        config: RunConfig,
        folder: RunFolder,
        cwd: Path,
        allowed_modules: Sequence[str],
        resume_with: Sequence[str] | None = None,
    ) -> None:
        self._resume_with = resume_with
        self._allowed_modules = allowed_modules
        self._config = config
        self._folder = folder
        self._cwd = cwd
        self._exits: SimpleQueue[_Child] = SimpleQueue()
        self._learner: _Child | None = None
        self._actors: dict[str, _Child] = {}
        self._restarts = 0
        self._stop_requested_at: float | None = None
        self._metrics_url = ""
        self.failure = ""

    def run(self) -> None:
        """Run until the learner has ended and every child is gone."""
        self._say(f"run folder: {self._folder.path}")
        # Before there is any child that could be left behind.
        previous = {
            signum: signal.signal(signum, self._on_signal)
            for signum in (signal.SIGINT, signal.SIGTERM)
        }
        try:
            learner = self._start("learner", self._learner_command(), self._learner_threads())
            self._learner = learner
            if self.stop_requested:
                # The signal came before it was there.
                self._signal(learner, signal.SIGTERM)
            endpoints = self._wait_for_endpoints(learner)
            if endpoints is not None:
                self._metrics_url = endpoints.metrics
                for index in range(self._config.launch.actors):
                    self._start_actor(f"actor-{index}", endpoints.learner)
                self._supervise(learner, endpoints.learner)
        finally:
            self._stop_children()
            for signum, handler in previous.items():
                signal.signal(signum, handler)

    @property
    def stop_requested(self) -> bool:
        """Whether a signal asked this launcher to stop."""
        return self._stop_requested_at is not None

    def status(self) -> Status | None:
        """The learner's live status; None while it does not answer."""
        learner = self._learner
        if not self._metrics_url or learner is None or learner.process.poll() is not None:
            return None
        try:
            return fetch_status(self._metrics_url.removesuffix("/metrics"))
        except ProtocolError:
            return None

    # --- supervision ----------------------------------------------------------------------------

    def _wait_for_endpoints(self, learner: _Child) -> Endpoints | None:
        """Where the learner listens; None if it ended before it did."""
        limit_s = self._config.launch.start_timeout_s
        deadline = time.monotonic() + limit_s
        while time.monotonic() < deadline:
            try:
                self._exits.get(timeout=0.1)
            except Empty:
                if self._folder.has_endpoints:
                    return self._folder.read_endpoints()
            else:
                if not self.stop_requested:
                    self._fail_with(learner)
                return None
        self.failure = f"the learner did not start within launch.start_timeout_s = {limit_s:.0f}"
        return None

    def _supervise(self, learner: _Child, url: str) -> None:
        """React to children that end, until the learner does."""
        while True:
            child = self._exits.get()
            code = child.process.returncode
            if child is learner:
                if code not in (0, INTERRUPTED):
                    self._fail_with(child)
                return
            if self._actors.get(child.name) is not child:
                continue
            del self._actors[child.name]
            if code == 0 or self.stop_requested:
                continue
            if code == USER_ERROR or self._restarts >= self._config.launch.max_restarts:
                # It would fail in the same way again, or does so all the time.
                self._fail_with(child)
                self._signal(learner, signal.SIGTERM)
                continue
            self._restarts += 1
            self._say(f"{child.name} died ({child.how_it_ended()}); starting it again")
            time.sleep(RESTART_DELAY_S)
            self._start_actor(child.name, url)

    def _fail_with(self, child: _Child) -> None:
        self.failure = self.failure or f"{child.name}: {child.how_it_ended()} (log: {child.log})"

    def _on_signal(self, signum: int, _: Any) -> None:
        if self.stop_requested:
            self._say("stopping at once")
            for child in self._children():
                self._signal(child, signal.SIGKILL)
            return
        self._stop_requested_at = time.monotonic()
        self._say("stopping: a learner in training finishes its step and saves; once more kills it")
        if self._learner is not None:
            self._signal(self._learner, signal.SIGTERM)

    def _children(self) -> list[_Child]:
        learner = [self._learner] if self._learner is not None else []
        return [*learner, *self._actors.values()]

    def _stop_children(self) -> None:
        """End every child, by force where time is up."""
        children = self._children()
        now = time.monotonic()
        since = now if self._stop_requested_at is None else self._stop_requested_at
        deadline = max(since + STOP_TIMEOUT_S, now + GRACE_S)
        for child in children:
            self._signal(child, signal.SIGTERM)
        for child in children:
            try:
                child.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                self._say(f"{child.name} does not end; killed")
                self._signal(child, signal.SIGKILL)
                child.process.wait()

    # --- processes ------------------------------------------------------------------------------

    def _start(self, name: str, command: list[str], threads: int) -> _Child:
        log = self._folder.log(name)
        log.parent.mkdir(exist_ok=True)
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
        with log.open("ab") as output:
            log_start = output.tell()
            process = subprocess.Popen(
                # -P: a folder of the user's that is named like one of our packages stays out.
                [sys.executable, "-P", "-m", "deploy", *command, "--exit-with-parent"],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                env=environment,
                cwd=self._cwd,
                start_new_session=True,
            )
        child = _Child(name, process, log, log_start)

        def wait() -> None:
            process.wait()
            self._exits.put(child)

        Thread(target=wait, name=f"wait-{name}", daemon=True).start()
        return child

    def _start_actor(self, name: str, url: str) -> None:
        threads = self._config.launch.actor_threads
        command = ["actor", "--learner", url, "--threads", str(threads)]
        if self._config.keys.actor is not None:
            command += ["--key", str(Path(self._config.keys.actor).resolve())]
            command += ["--learner-key", str(self._folder.learner_key.resolve())]
        for module in self._allowed_modules:
            command += ["--allow-rewards", module]
        self._actors[name] = self._start(name, command, threads)

    def _learner_command(self) -> list[str]:
        folder = self._folder.path.resolve()
        if self._resume_with is not None:
            return ["learner", "--resume", str(folder), *self._resume_with]
        return ["learner", str(self._folder.config_file.resolve()), "--run-folder", str(folder)]

    def _learner_threads(self) -> int:
        """Count the CPU threads that actors leave, unless the configuration sets the number."""
        config = self._config
        used = config.launch.actors * config.launch.actor_threads
        return config.training.threads or max(1, (os.cpu_count() or 1) - used)

    def _signal(self, child: _Child, signum: int) -> None:
        if child.process.poll() is None:
            child.process.send_signal(signum)

    def _say(self, text: str) -> None:
        print(f"gdpo: {text}", file=sys.stderr)
