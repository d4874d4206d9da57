"""``gdpo compare``: one recipe, trained with every estimator (correction, lag) for several seeds.

Every cell of the grid is a `gdpo run` in processes of its own, with its run folder below the output
folder. A cell whose run is complete and of the same configuration is not run again, so a stopped
comparison goes on where it was.
"""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Lock

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from deploy import FAILURE, INTERRUPTED
from deploy.results.compare_plot import plot_comparison
from deploy.results.compare_report import collect, print_comparison
from learner.config.file import load_config
from learner.config.run import RunConfig
from learner.run_folder import RunFolder
from protocol.errors import ConfigError

STOP_TIMEOUT_S = 20.0


@dataclass(frozen=True, slots=True)
class Cell:
    """One run of the grid."""

    estimator: str
    correction: str
    lag: int | None
    """Fixed staleness in policy versions; None leaves it to the recipe."""
    seed: int

    @property
    def name(self) -> str:
        """The name of the run, and of its folder."""
        lag = [] if self.lag is None else [f"lag{self.lag}"]
        return "-".join([self.estimator, self.correction, *lag, str(self.seed)])

    @property
    def overrides(self) -> list[str]:
        """The overrides that make this cell of the recipe."""
        lag = [f"buffer.lag={self.lag}", f"training.max_staleness={self.lag}"]
        return [
            f"algorithm.estimator={self.estimator}",
            f"algorithm.correction={self.correction}",
            *(lag if self.lag is not None else []),
            f"seed={self.seed}",
            f"name={self.name}",
        ]


@dataclass(frozen=True, slots=True)
class Comparison:
    """What to run, and where."""

    config: Path
    overrides: tuple[str, ...]
    estimators: tuple[str, ...]
    corrections: tuple[str, ...]
    lags: tuple[int | None, ...]
    num_seeds: int
    out: Path
    jobs: int
    allowed_modules: tuple[str, ...] = ()

    @property
    def cells(self) -> list[Cell]:
        """The grid, seed by seed, so that an early look at the results compares like with like."""
        seeds = range(self.num_seeds)
        grid = itertools.product(seeds, self.estimators, self.corrections, self.lags)
        return [Cell(estimator, correction, lag, seed) for seed, estimator, correction, lag in grid]

    def cell_overrides(self, cell: Cell) -> list[str]:
        """One actor a run, and any free ports: several runs share the machine."""
        return [
            "launch.actors=1",
            "training.threads=1",
            "endpoints.bind=tcp://127.0.0.1:0",
            "endpoints.metrics_port=0",
            f"runs_folder={self.out.resolve()}",
            *self.overrides,
            *cell.overrides,
        ]

    def folder(self, cell: Cell) -> RunFolder:
        """Return the run folder of a cell, which may not be there yet."""
        return RunFolder(self.out / cell.name)

    def resolved(self, cell: Cell) -> RunConfig:
        """Return the configuration of a cell; raises `ConfigError`."""
        return load_config(self.config, self.cell_overrides(cell))


def compare(comparison: Comparison) -> int:
    """Run what is missing, then write table, plots and JSON; returns the exit code."""
    configs = {cell: comparison.resolved(cell) for cell in comparison.cells}
    comparison.out.mkdir(parents=True, exist_ok=True)
    runner = _Runner(comparison, configs)
    runner.check_folders()
    interrupted = runner.run()
    done = [cell for cell in comparison.cells if runner.is_done(cell)]
    if done:
        result = collect([(asdict(cell), comparison.folder(cell)) for cell in done])
        path = comparison.out / "compare.json"
        path.write_text(json.dumps(result, indent=1) + "\n")
        print_comparison(result)
        print(path, *plot_comparison(comparison.out), sep="\n")
    if interrupted:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return INTERRUPTED
    for cell in runner.failed:
        log = comparison.out / f"{cell.name}.log"
        print(f"gdpo: error: {cell.name} failed; its output is in {log}", file=sys.stderr)
    return FAILURE if runner.failed else 0


def parse_names(text: str, known: Sequence[str], what: str) -> tuple[str, ...]:
    """A comma-separated list of names; raises `ConfigError`."""
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",")))
    for name in names:
        if name not in known:
            raise ConfigError(f"unknown {what} {name!r}; the known ones are {', '.join(known)}")
    return names


class _Runner:
    """Runs cells in parallel processes, with one progress display."""

    def __init__(self, comparison: Comparison, configs: dict[Cell, RunConfig]) -> None:
        self._comparison = comparison
        self._configs = configs
        self._lock = Lock()
        self._running: dict[Cell, subprocess.Popen[bytes]] = {}
        self._stopping = False
        self.failed: list[Cell] = []

    def is_done(self, cell: Cell) -> bool:
        """Whether the cell's run is complete and of this configuration."""
        try:
            config = self._comparison.folder(cell).read_config()
        except ConfigError:
            return False
        return self._is_complete(cell) and config == self._configs[cell]

    def check_folders(self) -> None:
        """Refuse to throw away what took long: complete runs of another configuration."""
        for cell in self._configs:
            if self._is_complete(cell) and not self.is_done(cell):
                raise ConfigError(
                    f"{self._comparison.out / cell.name} holds a complete run of another "
                    "configuration: choose another --out, or delete it"
                )

    def _is_complete(self, cell: Cell) -> bool:
        try:
            return self._comparison.folder(cell).read_summary().completed
        except ConfigError:
            return False

    def run(self) -> bool:
        """Run all cells that are not done; whether that was interrupted."""
        todo = [cell for cell in self._configs if not self.is_done(cell)]
        console = Console(stderr=True)
        progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        whole = progress.add_task("runs", total=len(self._configs))
        progress.advance(whole, len(self._configs) - len(todo))
        with progress, ThreadPoolExecutor(self._comparison.jobs) as pool:
            futures = {pool.submit(self._run_cell, cell, progress): cell for cell in todo}
            try:
                for number, future in enumerate(as_completed(futures), start=1):
                    future.result()
                    progress.advance(whole)
                    if not console.is_terminal:
                        print(f"{number}/{len(todo)} {futures[future].name}", file=sys.stderr)
            except KeyboardInterrupt:
                self._stop()
                pool.shutdown(cancel_futures=True)
        return self._stopping

    def _run_cell(self, cell: Cell, progress: Progress) -> None:
        """One run to its end; its own display goes to a log."""
        out = self._comparison.out
        # What is there is incomplete.
        shutil.rmtree(out / cell.name, ignore_errors=True)
        with self._lock, (out / f"{cell.name}.log").open("wb") as log:
            if self._stopping:
                return
            process = self._running[cell] = subprocess.Popen(
                [
                    *(sys.executable, "-P", "-m", "deploy", "run"),
                    str(self._comparison.config),
                    *self._comparison.cell_overrides(cell),
                    *(f"--allow-rewards={name}" for name in self._comparison.allowed_modules),
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                start_new_session=True,
            )
        task = progress.add_task(cell.name, total=self._configs[cell].training.steps)
        while process.poll() is None:
            try:
                process.wait(1.0)
            except subprocess.TimeoutExpired:
                progress.update(task, completed=self._comparison.folder(cell).num_steps)
        progress.remove_task(task)
        with self._lock:
            del self._running[cell]
            if process.returncode != 0 and not self._stopping:
                self.failed.append(cell)

    def _stop(self) -> None:
        """End the runs in order, then by force."""
        with self._lock:
            self._stopping = True
            running = list(self._running.values())
        for process in running:
            # Not SIGINT: while Python imports, libraries may swallow its exception, and the run
            # would go on.
            process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + STOP_TIMEOUT_S
        for process in running:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
