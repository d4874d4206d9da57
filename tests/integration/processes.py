"""Real processes of the system for tests: started, watched over HTTP, and never left behind."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from prometheus_client.parser import text_string_to_metric_families

from learner.replay.journal_reader import JournalReader

ROOT = Path(__file__).parent.parent.parent
RECIPE = ROOT / "examples" / "tool_calling_tiny.toml"
PATIENCE_S = 90.0
"""How long a test waits for what comes within seconds on a quiet machine: each process imports
torch and loads a model first. A whole run has 240 s, so that this, which says what was missing,
comes first."""

QUICK = (
    "endpoints.bind=tcp://127.0.0.1:0",
    "endpoints.metrics_port=0",
    "training.threads=1",
    "training.batch_groups=8",
    "training.minibatches=2",
    "eval.prompts=8",
    "eval.num_rollouts=2",
    "actor.max_leases=8",
    "actor.status_interval_s=0.1",
)
"""Small batches, free ports, one thread each."""


class Process:
    """A `gdpo` command; its output is in ``log``."""

    def __init__(
        self,
        folder: Path,
        name: str,
        *arguments: str,
        within: tuple[str, ...] = (),
        module: str = "deploy",
    ) -> None:
        """``within`` is a command that runs it, in a namespace for example.

        ``module`` is run instead of the product itself, with the same arguments.
        """
        self.log = folder / f"{name}.log"
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        with self.log.open("wb") as output:
            self.popen = subprocess.Popen(
                [*within, sys.executable, "-m", module, *arguments],
                cwd=folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self.popen.pid

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def wait(self, timeout_s: float = 30.0) -> int:
        return self.popen.wait(timeout_s)

    def signal(self, signum: int) -> None:
        self.popen.send_signal(signum)

    def end(self) -> None:
        """Kill whatever is left; a stopped process is continued by it."""
        if self.popen.poll() is None:
            self.popen.kill()
            self.popen.wait()


class System:
    """One learner started by hand and its actors, in a folder of their own."""

    def __init__(self, folder: Path, within: tuple[str, ...] = ()) -> None:
        """``within`` is a command that runs each process, in a namespace for example."""
        self.folder = folder
        self._within = within
        self._processes: list[Process] = []

    def gdpo(self, name: str, *arguments: str, module: str = "deploy") -> Process:
        process = Process(self.folder, name, *arguments, within=self._within, module=module)
        self._processes.append(process)
        return process

    def start_learner(self, *overrides: str) -> Process:
        """A learner that listens."""
        return self._listening("learner", str(RECIPE), *QUICK, *overrides)

    def resume_learner(self, *overrides: str) -> Process:
        """The learner again, after it ended or was killed."""
        return self._listening("resumed", "--resume", str(self.run_folder), *overrides)

    def _listening(self, name: str, *arguments: str) -> Process:
        (self.run_folder / "endpoints.json").unlink(missing_ok=True)
        self.learner = self.gdpo(name, "learner", *arguments)
        self.wait_until_it_listens(self.learner)
        return self.learner

    def wait_until_it_listens(self, process: Process, timeout_s: float = PATIENCE_S) -> None:
        """``process`` is a learner, or a launcher that starts one."""
        path = self.run_folder / "endpoints.json"
        wait_for(
            lambda: path.exists() or process.popen.poll() is not None, "the learner", timeout_s
        )
        assert path.exists(), process.output
        endpoints = json.loads(path.read_text())
        self.url, self.metrics_url = endpoints["learner"], endpoints["metrics"]

    def start_actor(self, name: str, *arguments: str) -> Process:
        return self.gdpo(name, "actor", "--learner", self.url, *arguments)

    @property
    def run_folder(self) -> Path:
        return self.folder / "runs" / "tool_calling_tiny"

    @property
    def summary(self) -> dict[str, Any]:
        summary: dict[str, Any] = json.loads((self.run_folder / "summary.json").read_text())
        return summary

    def summary_after_stop(self) -> dict[str, Any]:
        """Stop the learner in order; what it then reports."""
        self.learner.signal(signal.SIGTERM)
        assert self.learner.wait(20) == 130, self.learner.output
        return self.summary

    def status(self) -> dict[str, Any]:
        status: dict[str, Any] = json.loads(self.get("/status"))
        return status

    def get(self, path: str) -> str:
        return http_get(self.metrics_url.removesuffix("/metrics") + path)

    def actor(self, pid: int) -> dict[str, Any] | None:
        """The learner's view of the actor with this process id."""
        return next((a for a in self.status()["actors"] if a["pid"] == pid), None)

    def wait_for_step(self, step: int, timeout_s: float = PATIENCE_S) -> None:
        wait_for(lambda: self.status()["step"] >= step, f"step {step}", timeout_s)

    def wait_for_groups(
        self, process: Process, more: int = 1, timeout_s: float = PATIENCE_S
    ) -> None:
        """Until so many more groups of an actor were accepted since it is connected."""

        def groups() -> int:
            return int((self.actor(process.pid) or {}).get("groups", 0))

        before = groups()
        wait_for(
            lambda: groups() >= before + more, f"{more} groups of {process.log.stem}", timeout_s
        )

    def close(self) -> None:
        for process in self._processes:
            process.end()


def start_run(system: System, *overrides: str) -> Process:
    """A run under the launcher; its learner's addresses as soon as they are known."""
    run = system.gdpo("run", "run", str(RECIPE), *QUICK, *overrides)
    system.wait_until_it_listens(run)
    return run


def steps(system: System) -> list[dict[str, Any]]:
    """What the run wrote of each step, in order."""
    lines = (system.run_folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def metrics(text: str) -> dict[str, float]:
    """Sample values of a page for Prometheus by name, summed over labels."""
    values: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            values[sample.name] = values.get(sample.name, 0.0) + sample.value
    return values


def free_port() -> int:
    """A port that nobody listens on, for a learner that is to have it again when it is resumed."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def http_get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=5.0) as response:
        text: str = response.read().decode()
        return text


def wait_for(condition: Callable[[], object], what: str, timeout_s: float = PATIENCE_S) -> None:
    """Until ``condition`` holds; fails with ``what`` after ``timeout_s``."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout_s:.0f} s in vain for {what}"
        time.sleep(0.05)


def is_alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def children_of(pid: int) -> list[int]:
    """Process ids of the direct children."""
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(child) for child in text.split()]


def ancestors(pid: int) -> list[int]:
    """Process ids from the parent up."""
    found = []
    while pid > 1:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        pid = int(fields[1])
        found.append(pid)
    return found


def listening_addresses(pid: int) -> set[str]:
    """IP addresses on which a process accepts TCP connections."""
    targets = {str(fd.readlink()) for fd in Path(f"/proc/{pid}/fd").iterdir() if fd.is_symlink()}
    found = set()
    for family, table in ((socket.AF_INET, "tcp"), (socket.AF_INET6, "tcp6")):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            address, state, inode = fields[1].partition(":")[0], fields[3], fields[9]
            if state == "0A" and f"socket:[{inode}]" in targets:
                words = [bytes.fromhex(address[i : i + 8])[::-1] for i in range(0, len(address), 8)]
                found.add(socket.inet_ntop(family, b"".join(words)))
    return found


def resident_bytes(pid: int) -> int:
    """Memory of a process that is in RAM."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def versions_sampled_from(run_folder: Path) -> set[int]:
    """Of all tokens in the journal."""
    journal = JournalReader.open(run_folder / "journal.sqlite")
    found: set[int] = set()
    for _, _, (_, _, _, _, spans, _) in journal.headers():
        found |= set(np.frombuffer(spans, "<i4").reshape(-1, 3)[:, 2].tolist())
    journal.close()
    return found


def assert_books_balance(summary: dict[str, Any]) -> None:
    """leased = received + failed + outstanding; accepted = trained + evicted + buffered."""
    for lease in summary["books"]["leases"].values():
        failed = sum(lease["failed"].values())
        assert lease["leased"] == lease["received"] + failed + lease["outstanding"]
    groups = summary["books"]["groups"]
    evicted = sum(groups["evicted"].values())
    assert groups["accepted"] == groups["trained"] + evicted + groups["buffered"]
    assert groups["accepted"] == summary["books"]["leases"]["train"]["received"]
