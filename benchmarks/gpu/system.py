"""The system itself on the GPU: its tests, and the loop of the demo."""

import json
import re
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

from benchmarks.gpu.report import Report, Skip

ROOT = Path(__file__).parents[2]
LOOP_NEEDS = ("zmq", "msgspec", "msgpack", "pydantic", "datasets", "transformers", "rich", "scipy")
TEST_NEEDS = ("pytest", "pytest_timeout", "pytest_asyncio", *LOOP_NEEDS)


def run_tests(row: Report, _: str, dry: bool) -> None:
    """Run tests/gpu; dry, only look what is there."""
    require(TEST_NEEDS)
    command = ["-m", "pytest", "-q", "-rs", "-m", "gpu or multi_gpu", "tests/gpu"]
    done = run([*command, "--collect-only"] if dry else command, ROOT)
    lines = done.stdout.strip().splitlines()
    for line in lines:
        if skipped := re.match(r"SKIPPED \[(\d+)\] \S+ (.*)", line):
            row(f"{skipped[1]} skipped", because=skipped[2])
    row("tests/gpu", result=lines[-1].strip("= "))
    if done.returncode not in (0, 5):
        raise RuntimeError(lines[-1])


def run_loop(row: Report, _: str, dry: bool) -> None:
    """Train the demo's recipe with the learner and two actors on the GPU."""
    require(LOOP_NEEDS)
    device = "cpu" if dry else "cuda"
    with tempfile.TemporaryDirectory() as folder:
        settings = [
            *(f"runs_folder={folder}", "name=gpu", "eval.prompts=8", "eval.num_rollouts=2"),
            *("endpoints.bind=tcp://127.0.0.1:0", "endpoints.metrics_port=0"),
            *(f"model.device={device}", f"actor.device={device}", "actor.engine=transformers"),
            f"training.steps={2 if dry else 40}",
            *(("training.batch_groups=8", "training.minibatches=2") if dry else ()),
        ]
        recipe = str(ROOT / "examples" / "tool_calling_tiny.toml")
        done = run(["-m", "deploy", "run", recipe, *settings], ROOT)
        if done.returncode:
            raise RuntimeError(done.stderr.strip().splitlines()[-1])
        summary = json.loads((Path(folder) / "gpu" / "summary.json").read_text())
    evaluations = [evaluation["sets"]["heldout"]["means"] for evaluation in summary["evaluations"]]
    before, after = evaluations[0], evaluations[-1]
    lag0 = summary["lag0_logprob_difference"]
    row(
        f"demo on {device}",
        steps=summary["steps"],
        s=f"{summary['seconds_training']:.1f}",
        tokens_trained_per_s=f"{summary['throughput']['tokens_trained_per_s']:,.0f}",
        lag0_difference="-" if lag0 is None else f"{lag0:.1e}",
        balanced=summary["books"]["groups"]["balanced"],
        digests_wrong=summary["weights"]["digest_mismatches"],
        **{name: f"{before[name]:.2f} to {after[name]:.2f}" for name in after},
    )


def require(modules: tuple[str, ...]) -> None:
    """Raise `Skip` with the names of what is not installed."""
    if missing := [name for name in modules if find_spec(name) is None]:
        raise Skip(f"{', '.join(missing)} not installed")


def run(arguments: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, capture_output=True, text=True, check=False
    )
