"""A learner as a process: with the live display, or quiet as a child of the launcher."""

import json
from contextlib import nullcontext
from pathlib import Path

from deploy import INTERRUPTED
from deploy.display import Display
from deploy.lifeline import when_parent_dies
from deploy.plot import plot_run
from deploy.report import print_summary
from deploy.status import Status, read_status
from learner.app import Learner
from learner.config import RunConfig
from learner.main import run_learner
from learner.report import status_report
from learner.runlog import RunFolder


def run_with_display(config: RunConfig, folder: RunFolder, *, resume: bool, as_child: bool) -> int:
    """Train; afterwards print the summary and draw the curves (the launcher does it itself)."""
    learners: list[Learner] = []

    def on_start(learner: Learner) -> None:
        learners.append(learner)
        if as_child:
            when_parent_dies(lambda: learner.stop("the launcher is gone"))

    def status() -> Status | None:
        # By way of JSON, as for everybody else: it makes lists of tuples and words of keys.
        return read_status(json.loads(json.dumps(status_report(learners[0])))) if learners else None

    display = Display(status)
    with nullcontext() if as_child else display:
        summary = run_learner(config, folder, resume=resume, on_start=on_start)
    if not as_child:
        print_summary(summary, _plot(folder.path))
    return 0 if summary["completed"] else INTERRUPTED


def _plot(folder: Path) -> Path | None:
    """The curves, if there was a step to draw."""
    return plot_run(folder) if (folder / "metrics.jsonl").exists() else None
