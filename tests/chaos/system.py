"""The language of the chaos tests: a system to which things happen, and what must be seen then.

chaos.start_learner().start_toys(3)
victim = chaos.start_toy("victim", crash=At("upload", call=20, do="kill"))
incident = chaos.expect_crash(victim)
incident.is_noticed_within(3.0)
incident.work_is_leased_again_within(3.0)
chaos.audit()
"""

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from tests.chaos.audit import audit
from tests.chaos.incidents import Incident
from tests.chaos.nursery import Nursery
from tests.chaos.points import Deed
from tests.chaos.proxy import Proxy
from tests.chaos.record import read
from tests.integration.processes import QUICK, RECIPE, ROOT, Process, System, is_alive, wait_for

ACTOR_TIMEOUT_S = 2.0
LEASE_TIMEOUT_S = 8.0
MARGIN_S = 1.5
"""On top of what is configured: the learner's tick, a status interval, a busy machine."""

CHAOS = (
    *QUICK,
    "training.steps=100000",
    "admission.self_check=false",
    f"deadlines.actor_timeout_s={ACTOR_TIMEOUT_S}",
    f"deadlines.lease_timeout_s={LEASE_TIMEOUT_S}",
    "training.max_staleness=8",
    "weights.timeout_s=2",
    "sampling.num_rollouts=2",
    "sampling.max_tokens=16",
    # Toys do not sample from the policy: no ratio means anything, but weights are to change.
    'algorithm.correction="none"',
    "rewards.format.function=chaos_rewards:one",
    "rewards.correctness.function=chaos_rewards:two",
    "eval.prompts=2",
)

REWARDS = '''
"""Rewards that differ; a file named hang or hold takes the next caller prisoner."""
import ctypes, os, time
from pathlib import Path

def _claim(name):
    try:
        Path(name).rename(f"{name}.{os.getpid()}.{time.monotonic()}")
    except FileNotFoundError:
        return False
    return True

def one(prompts, completions, completion_ids, **columns):
    if _claim("hang"):
        time.sleep(100_000)
    if _claim("hold"):
        # PyDLL, unlike CDLL, keeps the lock of the interpreter.
        ctypes.PyDLL(None).sleep(100_000)
    return [float(sum(ids) % 7) for ids in completion_ids]

def two(prompts, completions, completion_ids, **columns):
    return [float(sum(ids) % 5) for ids in completion_ids]
'''


@dataclass(frozen=True, slots=True)
class At:
    """A crash point, and what happens there."""

    point: str
    call: int
    do: Deed = "kill"


class Chaos(System):
    """A learner, its actors and a proxy between them, all written down as they go."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.record = folder / "record.jsonl"
        self.temporary = folder / "tmp"
        self.temporary.mkdir()
        self.mark = uuid.uuid4().hex
        """In the environment of every process, so that orphans are found."""
        self.proxy: Proxy | None = None
        self.nursery: Nursery | None = None
        self.toys: list[Process] = []
        (folder / "chaos_rewards.py").write_text(REWARDS)

    # --- beginnings -----------------------------------------------------------------------------

    def start_learner(self, *overrides: str, crash: At | None = None) -> Process:  # type: ignore[override]
        self.begin_learner(*overrides, crash=crash)
        self.wait_until_it_listens(self.learner)
        return self.learner

    def begin_learner(self, *overrides: str, crash: At | None = None) -> Process:
        """Start it without waiting for it to listen."""
        self.learner = self.entry(
            "learner", "learner", str(RECIPE), *CHAOS, *overrides, crash=crash
        )
        return self.learner

    def resume_learner(self, *overrides: str) -> Process:
        """The learner again, after it ended or was killed, with the same address."""
        (self.run_folder / "endpoints.json").unlink(missing_ok=True)
        self.learner = self.entry(
            "resumed", "learner", "--resume", str(self.run_folder), *overrides
        )
        self.wait_until_it_listens(self.learner)
        return self.learner

    def wait_until_it_listens(self, process: Process) -> None:
        """``process`` is a learner, or a launcher that starts one."""
        path = self.run_folder / "endpoints.json"
        wait_for(lambda: path.exists() or process.popen.poll() is not None, "the learner")
        assert path.exists(), process.output
        endpoints = json.loads(path.read_text())
        self.url, self.metrics_url = endpoints["learner"], endpoints["metrics"]

    def through_a_proxy(self) -> Proxy:
        """Actors that start from now on connect through it."""
        self.proxy = Proxy(self.url)
        return self.proxy

    def open_nursery(self) -> None:
        """Actors that start from now on are there at once."""
        self.nursery = Nursery(self.folder, self.environment)

    def start_toys(self, count: int, *, group_s: float = 0.4) -> Self:
        """So many toy actors, all at work."""
        for _ in range(count):
            self.toys.append(self.start_toy(f"toy-{len(self.toys)}", group_s=group_s))
        for toy in self.toys:
            self.wait_for_groups(toy)
        return self

    def start_toy(
        self,
        name: str,
        *options: str,
        group_s: float = 0.4,
        start_s: float = 0.0,
        crash: At | None = None,
        url: str = "",
    ) -> Process:
        url = url or (self.proxy.url if self.proxy else self.url)
        toy = ("--toy", "--group-s", str(group_s), "--start-s", str(start_s))
        return self.entry(name, "actor", "--learner", url, *options, crash=crash, test=toy)

    def start_actor(self, name: str, *arguments: str) -> Process:
        """A real one."""
        return self.entry(name, "actor", "--learner", self.url, *arguments)

    def entry(
        self, name: str, *command: str, crash: At | None = None, test: tuple[str, ...] = ()
    ) -> Process:
        """A `gdpo` command by way of `tests.chaos.entry`."""
        arguments = ["--record", str(self.record), *test]
        if crash is not None:
            mark = str(self.mark_of(name))
            arguments += ["--at", f"{crash.point}:{crash.call}", "--do", crash.do, "--mark", mark]
        arguments += ["--", *command]
        if self.nursery is None or command[0] != "actor":
            return self.python(name, "-m", "tests.chaos.entry", *arguments)
        process = self.nursery.start(name, arguments)
        self._processes.append(process)
        return process

    def python(self, name: str, *arguments: str) -> Process:
        process = _Python(self.folder, name, self.environment, arguments)
        self._processes.append(process)
        return process

    @property
    def environment(self) -> dict[str, str]:
        return {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
            "PYTHONUNBUFFERED": "1",
            "TMPDIR": str(self.temporary),
            "GDPO_CHAOS": self.mark,
        }

    def mark_of(self, name: str) -> Path:
        return self.folder / f"{name}.mark"

    # --- what is seen ---------------------------------------------------------------------------

    def events(self, *kinds: str, since: float = 0.0) -> list[dict[str, Any]]:
        return [e for e in read(self.record) if e["event"] in kinds and e["at"] >= since]

    def wait_for_groups(self, process: Process, more: int = 1, timeout_s: float = 40.0) -> None:
        """Until so many more groups of an actor were accepted since it is connected."""
        before = (self.actor(process.pid) or {}).get("groups", 0)
        wait_for(
            lambda: (self.actor(process.pid) or {}).get("groups", 0) >= before + more,
            f"{more} groups of {process.log.stem}",
            timeout_s,
        )

    def groups_received(self, since: float, until: float, *, without: int = -1) -> list[float]:
        """When groups came in, but for those of the actor with process id ``without``."""
        sessions = self.sessions(without)
        return [
            e["at"]
            for e in self.events("received", since=since)
            if e["at"] < until and e["session"] not in sessions
        ]

    def first_group_after_s(self, process: Process, since: float) -> float | None:
        """When the first group of an actor was accepted; None if there was none."""
        sessions = self.sessions(process.pid)
        received = self.events("received", since=since)
        return next((e["at"] - since for e in received if e["session"] in sessions), None)

    def sessions(self, pid: int) -> set[str]:
        """Under which the actor with this process id has joined: one at a time."""
        return {e["session"] for e in self.events("joined") if e["actor_pid"] == pid}

    def holders_of(self, version: int) -> set[int]:
        """Process ids of the toys that have loaded it, or a later one."""
        return {e["pid"] for e in self.events("loaded") if e["version"] >= version}

    def expect_crash(self, process: Process, timeout_s: float = 60.0) -> Incident:
        """Wait until a process has reached its crash point."""
        mark = self.mark_of(process.log.stem)
        wait_for(mark.exists, f"{process.log.stem} to reach its crash point", timeout_s)
        return Incident(self, process, json.loads(mark.read_text())["at"])

    def strike(self, process: Process, signum: int) -> Incident:
        """Send a signal now."""
        at = time.monotonic()
        process.signal(signum)
        return Incident(self, process, at)

    # --- endings --------------------------------------------------------------------------------

    def audit(self) -> dict[str, Any]:
        """Stop the learner in order, and check everything that must hold."""
        summary = self.summary_after_stop()
        return audit(read(self.record), summary)

    def processes_left(self) -> list[int]:
        """Processes that any process of this test started and that still run."""
        needle = f"GDPO_CHAOS={self.mark}".encode()
        found = []
        for folder in Path("/proc").iterdir():
            if folder.name.isdigit() and is_alive(int(folder.name)):
                try:
                    environment = (folder / "environ").read_bytes()
                except OSError:
                    continue
                if needle in environment.split(b"\0"):
                    found.append(int(folder.name))
        return found

    def files_left(self) -> list[str]:
        """What processes of this test left in the folder for temporary files."""
        return sorted(path.name for path in self.temporary.iterdir())

    def close(self) -> None:
        if self.proxy is not None:
            self.proxy.close()
        super().close()
        if self.nursery is not None:
            self.nursery.close()
        for pid in self.processes_left():
            os.kill(pid, signal.SIGKILL)


class _Python(Process):
    """A Python process of a test, in an environment that says which test."""

    def __init__(
        self, folder: Path, name: str, environment: dict[str, str], arguments: tuple[str, ...]
    ) -> None:
        self.log = folder / f"{name}.log"
        with self.log.open("ab") as output:
            self.popen = subprocess.Popen(
                [sys.executable, *arguments],
                cwd=folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
