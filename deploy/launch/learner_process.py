"""A learner as a process: with the live display, or quiet as a child of the launcher."""

from contextlib import nullcontext

from deploy import INTERRUPTED
from deploy.launch.lifeline import when_parent_dies
from deploy.results.plot import plot_run
from deploy.results.summary import print_summary
from deploy.watch.display import Display
from learner.config.run import RunConfig
from learner.run.learner import Learner
from learner.run.process import run_learner
from learner.run_folder import RunFolder
from learner.status import Status


def run_with_display(config: RunConfig, folder: RunFolder, *, resume: bool, as_child: bool) -> int:
    """Train; afterwards print the summary and draw the curves (the launcher does it itself)."""
    learners: list[Learner] = []

    def on_start(learner: Learner) -> None:
        learners.append(learner)
        if as_child:
            when_parent_dies(lambda: learner.stop("the launcher is gone"))

    def status() -> Status | None:
        return learners[0].status() if learners else None

    display = Display(status)
    with nullcontext() if as_child else display:
        summary = run_learner(config, folder, resume=resume, on_start=on_start)
    if not as_child:
        print_summary(summary, plot_run(folder) if folder.num_steps else None)
    return 0 if summary.completed else INTERRUPTED
