"""How far a run has come, for pages and reports."""

from dataclasses import dataclass, field

from learner.prompts.evaluation import Evaluation
from learner.records import EvaluationResult
from learner.training.trainer import StepResult

STOP_CHECK_S = 0.5
"""Longest wait of the main thread without a look at whether the run is to stop."""


@dataclass(slots=True)
class Progress:
    """The state of one run: the main thread writes it, any thread may read it.

    `stop` alone is called from elsewhere, by a signal handler too.
    """

    phase: str = "loading"
    """What the run is at: ``loading``, ``evaluating before``, ``training``, ``saving`` ..."""
    evaluations: list[EvaluationResult] = field(default_factory=list)
    """Those that are done, in the order in which they were due."""
    evaluating: Evaluation | None = None
    """The evaluation at hand."""
    last_step: StepResult | None = None
    """The newest training step, those that are made again after a resume included."""
    lag0_difference: float | None = None
    """The largest difference of log-probabilities, actor to learner, at the same version."""
    training_seconds: float = 0.0
    """The time spent training, by the learners before a resume too."""
    interrupted: str = ""
    """Why the run is to end early; empty while it is not."""
    completed: bool = False
    """Whether all steps are done, evaluated and saved."""

    def stop(self, cause: str) -> None:
        """End the run after the step at hand; the first cause counts."""
        self.interrupted = self.interrupted or cause

    def note(self, step: StepResult) -> None:
        """Remember a step."""
        self.last_step = step
        if step.lag0_difference is not None:
            self.lag0_difference = max(self.lag0_difference or 0.0, step.lag0_difference)
