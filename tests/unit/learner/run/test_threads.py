"""The table of loops and threads at the top of `learner.run.learner` is true."""

import ast
import threading
from pathlib import Path
from threading import Thread

from learner.config.file import load_config
from learner.run import learner as module
from learner.run.learner import Learner
from learner.run_folder import RunFolder

ROOT = Path(module.__file__).parent.parent.parent
STARTERS = {"Thread", "GuardedThread", "Worker"}
"""What is called to make a thread."""
SHELLS = ROOT / "learner" / "threads.py"
"""Where `GuardedThread` and `Worker` pass on the names that they are given."""


def table() -> list[dict[str, str]]:
    """The rows of the table, by the names of its columns."""
    assert module.__doc__ is not None
    lines = [line for line in module.__doc__.splitlines() if line.startswith("|")]
    names, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    return [dict(zip(names, row, strict=True)) for row in rows]


def threads() -> set[Thread]:
    """Those that run in this process; tqdm's monitor is of another kind."""
    return {thread for thread in threading.enumerate() if type(thread) is Thread}


def threads_made(package: str) -> set[str]:
    """Names of the threads that the code of a package makes."""
    names: set[str] = set()
    for path in {*(ROOT / package).rglob("*.py")} - {SHELLS}:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in STARTERS:
                [name] = [k.value for k in node.keywords if k.arg == "name"] or node.args[:1]
                assert isinstance(name, ast.Constant), f"{path}: a thread without a fixed name"
                names.add(str(name.value))
    return names


def test_the_table_has_every_thread_that_the_learner_can_start():
    made = threads_made("learner") | threads_made("transfer") | threads_made("protocol")
    assert [row["thread"] for row in table()] == list(dict.fromkeys(r["thread"] for r in table()))
    assert {row["thread"] for row in table()} == made | {"MainThread"}


def test_a_learner_that_is_ready_has_the_threads_of_the_table(recipe, tmp_path):
    config = load_config(
        recipe,
        [
            f"runs_folder={tmp_path}",
            "endpoints.bind=tcp://127.0.0.1:0",
            "endpoints.metrics_port=0",
            "training.threads=1",
        ],
    )
    before = threads()
    learner = Learner(config, RunFolder.create(config))
    try:
        started = {thread.name for thread in threads() - before}
    finally:
        learner.close()
    # Those that are missing have a checkpoint to write, a broadcast to send, or ranks to watch.
    later = {"MainThread", "checkpoint", "broadcast", "collective", "nccl-abort", "pulse"}
    assert started == {row["thread"] for row in table()} - later
    assert not {thread.name for thread in threads() - before}
