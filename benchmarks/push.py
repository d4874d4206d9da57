"""A push of weights, against a bare broadcast and a copy in memory of the same bytes.

    python -m benchmarks.push [--params 10 100 500] [--actors 1 2 4 8] [--repeats 5]

A real learner (nothing trains, but a tenth of all weights change in their last bit before each
push), real `gdpo actor` processes with the transformers engine, all on this machine with one thread
each. The actors have nothing to do at first, and then generate all the time: each two groups of two
rollouts, of a few words and up to 32 tokens.

The bare broadcast is gloo's, between as many processes of its own, in buckets of the same size, and
nothing else: no announcement, no digests, no model. It takes turns with the pushes, so that both
find the same machine: while the actors generate, they do so beside the bare broadcast too.

A row is the median of the repeats; behind a ratio of medians stands, in brackets, that of the best.
"push" is the time from the announcement to the last confirmation, by which an actor says that its
engine computes with weights whose digests are right; "join" is how long the members of the epoch
took to meet, once; "receive" the longest of the actors'. GB/s are bytes of the weights in the time,
whatever the number of actors. "send/bare" compares the broadcast inside of the push with the bare
one, "push/bare" the whole push. "stall" is the longest time that an actor's generation stood still,
and its share of the push: an actor that generates computes the tokens in flight with the new
weights while it goes on, and then those sampled meanwhile. The first pushes, in which memory is
written for the first time, are not counted.
"""

import argparse
import gc
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Before anything brings torch.
os.environ["OMP_NUM_THREADS"] = "1"

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, Qwen2Config
from transformers.utils.logging import disable_progress_bar

from learner.config.run import RunConfig
from learner.run.learner import Learner
from learner.run_folder import RunFolder
from learner.weights.pack import MemoryPool, pack
from learner.weights.push import PushReport
from learner.weights.snapshots import STILL_PULLED_S

ROOT = Path(__file__).parent.parent
BASE = ROOT / "examples" / "tool_calling_tiny" / "base"
SHAPES = {
    10: {"vocab_size": 8192, "hidden_size": 256, "intermediate_size": 1024, "layers": 8},
    100: {"vocab_size": 32768, "hidden_size": 640, "intermediate_size": 2560, "layers": 13},
    # Qwen2.5-0.5B.
    500: {"vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864, "layers": 24},
}
"""By millions of parameters."""
ENGINES = ("idle", "generate")
LEASES, ROLLOUTS, PROMPT_TOKENS, NEW_TOKENS = 2, 2, 32, 32
WARM_UP = 3
"""Pushes and bare broadcasts: an actor has two buffers, the learner up to three."""
PROCESS_BYTES = 450e6
"""Of an actor, without weights."""
BARE_PROCESS_BYTES = 250e6
START_TIMEOUT_S = 300.0
COLUMNS = (
    ("actors", "right"),
    ("engines", "left"),
    ("pack s", "right"),
    ("join s", "right"),
    ("send s", "right"),
    ("confirm s", "right"),
    ("push s", "right"),
    ("receive s", "right"),
    ("push GB/s", "right"),
    ("bare GB/s", "right"),
    ("copy GB/s", "right"),
    ("send/bare", "right"),
    ("push/bare", "right"),
    ("stall s", "right"),
    ("of push", "right"),
)


# --- the processes ------------------------------------------------------------------------------


class Process:
    """A child; nothing of it is left when the benchmark ends."""

    def __init__(self, log: Path, module: str, *arguments: str) -> None:
        self.log = log
        environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(ROOT)}
        with log.open("wb") as errors:
            self.popen = subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )

    def raise_if_ended(self) -> None:
        if self.popen.poll() is not None:
            raise RuntimeError(f"a process ended: {self.log.read_text()[-2000:]}")

    def stop(self) -> None:
        self.popen.send_signal(signal.SIGTERM)

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, *_: object) -> None:
        self.popen.kill()
        self.popen.communicate()


class BareBroadcast:
    """So many processes of `benchmarks.bare_broadcast`."""

    def __init__(self, folder: Path, stack: ExitStack, world_size: int) -> None:
        # A file that others have met by leads them astray.
        self._folder = Path(tempfile.mkdtemp(dir=folder))
        self._processes = [
            stack.enter_context(
                Process(folder / f"bare-{rank}.log", "benchmarks.bare_broadcast", str(rank))
            )
            for rank in range(world_size)
        ]
        self._groups = 0

    def meet(self, num_receivers: int, num_bytes: int, bucket_bytes: int) -> Callable[[], float]:
        """Returns what measures one broadcast in seconds."""
        self._groups += 1
        path = self._folder / f"store-{self._groups}"
        members = self._processes[: num_receivers + 1]

        def measure() -> float:
            for process in members:
                process.raise_if_ended()
                assert process.popen.stdin is not None
                line = f"{path} {len(members)} {num_bytes} {bucket_bytes}\n"
                process.popen.stdin.write(line)
                process.popen.stdin.flush()
            assert members[0].popen.stdout is not None
            if not (seconds := members[0].popen.stdout.readline()):
                members[0].popen.wait()
                members[0].raise_if_ended()
            return float(seconds)

        return measure


class Cluster:
    """A learner that does not train, and its actors."""

    def __init__(self, folder: Path, stack: ExitStack, config: RunConfig) -> None:
        self._folder = folder
        self._stack = stack
        self._learner = learner = Learner(config, RunFolder.create(config))
        stack.callback(learner.close)
        stack.callback(self._drain)
        self._actors: list[Process] = []
        self._version = 0
        self._phases: dict[str, float] = {}
        """The longest of each phase since the last push began, as actors reported."""
        # Histograms and means do not keep it.
        learner.parts.phases.actor = self._note_phase  # type: ignore[method-assign]
        self._model, self._specs = learner.parts.policy.model, learner.parts.policy.specs
        self.num_bytes = sum(spec.num_bytes for spec in self._specs)
        self._pool = MemoryPool(self.num_bytes)
        self._copy = torch.ones(self.num_bytes, dtype=torch.uint8)

    def have_actors(self, count: int) -> None:
        """Start actors, or let some go, and wait until so many have the newest version."""
        while len(self._actors) < count:
            log = self._folder / f"actor-{len(self._actors)}.log"
            actor = Process(log, "deploy", "actor", "--learner", self._learner.connections.url)
            self._actors.append(self._stack.enter_context(actor))
        for actor in self._actors[count:]:
            actor.stop()
        del self._actors[count:]
        coordinator = self._learner.parts.coordinator
        self._wait_until(
            lambda: (
                coordinator.num_live == count
                and len(coordinator.ready_actors(self._version)) == count
            ),
            f"{count} actors",
        )

    @property
    def form_seconds(self) -> float:
        """In which the members of the last epoch met; 0 without one."""
        epochs = self._learner.connections.publisher.epochs
        return epochs[-1].form_seconds if epochs else 0.0

    def settle(self) -> None:
        """The learner computes differences for newcomers, for so long after their last pull."""
        time.sleep(STILL_PULLED_S)

    @contextmanager
    def generating(self) -> Iterator[None]:
        """Meanwhile every actor has always something to do."""
        coordinator = self._learner.parts.coordinator
        coordinator.open_training()
        generated = self._tokens()
        self._wait_until(lambda: self._tokens() > generated, "the first tokens")
        yield
        coordinator.close_training()
        self._wait_until(lambda: not coordinator.leases.outstanding("train"), "the last tokens")

    def _tokens(self) -> int:
        return self._learner.parts.throughput.tokens_generated

    def push(self) -> tuple[PushReport, dict[str, float]]:
        """A version that differs in a tenth of all weights.

        Returns also the longest phases of the actors and of a copy, in seconds.
        """
        self._version += 1
        learner = self._learner
        for parameter in self._model.parameters():
            parameter.data.view(torch.int16).view(-1)[self._version % 10 :: 10] ^= 1
        coordinator, publisher = learner.parts.coordinator, learner.connections.publisher
        self._phases.clear()
        started = time.monotonic()
        snapshot = pack(self._version, self._model, self._specs, self._pool)
        pack_seconds = time.monotonic() - started
        coordinator.advance(self._version)
        publisher.publish(snapshot, pack_seconds)
        history = publisher.history
        self._wait_until(
            lambda: bool(history) and history[-1].version == self._version, "the report of a push"
        )
        report = history[-1]
        if report.behind or sum(report.routes.values()) != len(self._actors):
            raise RuntimeError(f"a push did not reach everybody: {report}")
        phases = dict(self._phases)
        started = time.monotonic()
        self._copy.copy_(snapshot.packed)
        phases["copy"] = time.monotonic() - started
        return report, phases

    def _note_phase(self, phase: str, seconds: float) -> None:
        self._phases[phase] = max(self._phases.get(phase, 0.0), seconds)

    def _wait_until(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not condition():
            for actor in self._actors:
                actor.raise_if_ended()
            self._learner.parts.coordinator.raise_if_failed()
            if time.monotonic() > deadline:
                raise TimeoutError(what)
            time.sleep(0.005)

    def _drain(self) -> None:
        self._learner.parts.coordinator.drain("the benchmark is over")
        self._learner.parts.coordinator.wait_until_empty(10.0)


@contextmanager
def cluster(folder: Path, millions: int, backend: str, bucket_bytes: int) -> Iterator[Cluster]:
    """With a random model of so many parameters."""
    model_folder = folder / f"model-{millions}"
    make_model(model_folder, millions)
    rows = folder / "rows.jsonl"
    rows.write_text('{"prompt": "weather paris =>", "ground_truth": ""}\n')
    config = make_config(folder, model_folder, rows, backend, bucket_bytes)
    with ExitStack() as stack:
        yield Cluster(folder, stack, config)
    # Its threads and callbacks refer to each other.
    gc.collect()
    shutil.rmtree(model_folder)


def make_model(folder: Path, millions: int) -> None:
    shape: dict[str, Any] = dict(SHAPES[millions])
    config = Qwen2Config(
        num_hidden_layers=shape.pop("layers"),
        num_attention_heads=shape["hidden_size"] // 64,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        eos_token_id=0,
        **shape,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    for path in BASE.glob("tokenizer*"):
        shutil.copy(path, folder)


def make_config(
    folder: Path, model: Path, rows: Path, backend: str, bucket_bytes: int
) -> RunConfig:
    return RunConfig.model_validate(
        {
            "name": "push",
            "runs_folder": str(folder / "runs"),
            "model": {"path": str(model), "dtype": "bfloat16", "device": "cpu"},
            "data": {"train": str(rows)},
            "rewards": [{"name": "format", "function": "actors.tasks.tool_calling:format_reward"}],
            "sampling": {
                "num_rollouts": ROLLOUTS,
                "max_prompt_tokens": PROMPT_TOKENS,
                "max_tokens": NEW_TOKENS,
            },
            # Nobody trains, so that groups are only ever added.
            "training": {"steps": 1_000_000, "max_staleness": 1_000_000, "threads": 1},
            "endpoints": {"bind": "tcp://127.0.0.1:0", "metrics_port": 0},
            "deadlines": {"lease_timeout_s": 3600.0, "actor_timeout_s": 60.0},
            "admission": {"self_check": False},
            "buffer": {"durability": "memory", "max_groups": 1_000_000},
            "weights": {
                "backend": backend,
                "bucket_bytes": bucket_bytes,
                "timeout_s": 60.0,
                "push_timeout_s": 300.0,
            },
            "actor": {
                "engine": "transformers",
                "device": "cpu",
                "max_leases": LEASES,
                "reward_processes": 1,
            },
        }
    )


# --- the measurement ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """One push, the bare broadcast before it, and a copy after it; all in seconds."""

    report: PushReport
    receive: float
    stall: float
    bare: float
    copy: float


@dataclass(frozen=True)
class Cell:
    """Pushes to so many actors."""

    num_bytes: int
    join: float
    samples: Sequence[Sample]

    def row(self) -> tuple[str, ...]:
        reports = [sample.report for sample in self.samples]
        push = [report.seconds for report in reports]
        bare = [sample.bare for sample in self.samples]
        send = [report.phases.get("broadcast", 0.0) for report in reports]
        stall = [sample.stall for sample in self.samples]
        return (
            _seconds([report.phases["pack"] for report in reports]),
            _seconds([self.join]),
            _seconds(send),
            _seconds([report.phases["confirm"] for report in reports]),
            _seconds(push),
            _seconds([sample.receive for sample in self.samples]),
            *(
                f"{self.num_bytes / statistics.median(seconds) / 1e9:.2f}"
                for seconds in (push, bare, [sample.copy for sample in self.samples])
            ),
            _ratio(bare, send) if any(send) else "-",
            _ratio(bare, push),
            _seconds(stall),
            _ratio(stall, push),
        )


def _seconds(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.3f}"


def _ratio(values: Sequence[float], of: Sequence[float]) -> str:
    median = statistics.median(values) / statistics.median(of)
    return f"{median:.0%} ({min(values) / min(of):.0%})"


def measure(cluster: Cluster, bare: Callable[[], float], repeats: int) -> Cell:
    for _ in range(WARM_UP):
        bare()
        cluster.push()
    samples = []
    for _ in range(repeats):
        bare_seconds = bare()
        report, phases = cluster.push()
        samples.append(
            Sample(
                report=report,
                receive=phases["weights_receive"],
                stall=phases["weights_load"],
                bare=bare_seconds,
                copy=phases["copy"],
            )
        )
    return Cell(cluster.num_bytes, cluster.form_seconds, samples)


def needed_bytes(num_bytes: float, actors: int) -> float:
    """Memory that a size takes.

    An actor computes in one of two buffers, the learner has its model, up to three snapshots and
    the copy, a process of the bare broadcast has what it sends or receives.
    """
    return (
        actors * (2 * num_bytes + PROCESS_BYTES)
        + 5 * num_bytes
        + PROCESS_BYTES
        + (actors + 1) * (num_bytes + BARE_PROCESS_BYTES)
    )


def available_bytes() -> float:
    lines = Path("/proc/meminfo").read_text().splitlines()
    [line] = [line for line in lines if line.startswith("MemAvailable")]
    return 1024 * int(line.split()[1])


def run_size(millions: int, options: argparse.Namespace, folder: Path, console: Console) -> None:
    bucket_bytes = options.bucket << 20
    available = available_bytes()
    needed = {actors: needed_bytes(2e6 * millions, actors) for actors in sorted(options.actors)}
    counts = [actors for actors in needed if needed[actors] <= available]
    cells: dict[tuple[str, int], Cell] = {}
    if counts:
        with ExitStack() as stack:
            bare = BareBroadcast(folder, stack, counts[-1] + 1)
            running = stack.enter_context(cluster(folder, millions, options.backend, bucket_bytes))
            running.have_actors(counts[-1])
            running.settle()
            # Downwards, so that every actor is started only once.
            for actors in reversed(counts):
                running.have_actors(actors)
                meeting = bare.meet(actors, running.num_bytes, bucket_bytes)
                for engines in options.engines:
                    with running.generating() if engines == "generate" else nullcontext():
                        cells[engines, actors] = measure(running, meeting, options.repeats)
    num_bytes = next(iter(cells.values())).num_bytes if cells else 2e6 * millions
    table = Table(title=f"{num_bytes / 2e6:.1f} M parameters, {num_bytes / 1e6:,.1f} MB")
    for name, justify in COLUMNS:
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for actors, size in needed.items():
        for engines in options.engines:
            if cell := cells.get((engines, actors)):
                table.add_row(str(actors), engines, *cell.row())
            else:
                table.add_row(str(actors), engines, f"not run: needs {size / 1e9:.0f} GB of memory")
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--params", type=int, nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--actors", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--backend", choices=("gloo", "shared", "stream"), default="gloo")
    parser.add_argument("--bucket", type=int, default=4, help="MiB")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    options = parser.parse_args()
    torch.set_num_threads(1)
    disable_progress_bar()
    console = Console(width=176, highlight=False)
    console.print(
        f"{options.backend}, buckets of {options.bucket} MiB, {os.cpu_count()} cores, "
        f"torch {torch.__version__}, Python {platform.python_version()}; {options.repeats} repeats"
    )
    with tempfile.TemporaryDirectory() as name:
        for millions in options.params:
            run_size(millions, options, Path(name), console)


if __name__ == "__main__":
    main()
