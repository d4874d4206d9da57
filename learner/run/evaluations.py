"""When the policy is evaluated: before the first step, every few steps, and after the last.

before, after   the main thread waits: there is nothing else to do
in between      training goes on; the main thread looks now and then whether it is done

There is one at a time. One that is due meanwhile begins when the one at hand has ended.
"""

import logging

from learner.prompts.stream import evaluation_work
from learner.run.parts import Parts
from learner.run.progress import STOP_CHECK_S
from learner.run.reports import evaluation_report

log = logging.getLogger("learner")


class Evaluations:
    """The evaluations of a run; the main thread calls every method.

    They raise what made it impossible to continue.
    """

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._every = parts.config.eval.every_steps
        self._due: int | None = None
        """The step whose evaluation waits for the one at hand."""

    def before(self) -> None:
        """Evaluate the policy that training begins with, unless that is done or too late."""
        if self._parts.trainer.version == 0:
            self._evaluate(0, "evaluating before")

    def after(self) -> None:
        """Evaluate the policy that training ended with."""
        self._due = None
        if self._parts.progress.evaluating is not None:
            self._parts.progress.phase = "evaluating"
            self._wait()
        self._evaluate(self._parts.trainer.version, "evaluating after")

    def resume(self) -> None:
        """Begin what was due when the learner before ended."""
        if self._every and (due := self._parts.trainer.version // self._every * self._every):
            self._is_due(due)

    def step_done(self, version: int) -> None:
        """Begin an evaluation of what step ``version`` made, if one is due."""
        if (
            self._every
            and version % self._every == 0
            and version < self._parts.config.training.steps
        ):
            self._is_due(version)

    def look(self) -> None:
        """Take the result of the evaluation at hand, if there is one, and begin the next."""
        evaluation = self._parts.progress.evaluating
        if evaluation is not None and evaluation.done.is_set():
            self._record()
        if self._parts.progress.evaluating is None and self._due is not None:
            due, self._due = self._due, None
            self._begin(due)

    def _is_due(self, due: int) -> None:
        if not self._parts.heldout or self._is_done(due):
            return
        if self._due is not None:
            log.warning(
                "there is no evaluation of step %d: evaluations take longer than "
                "eval.every_steps = %d steps",
                self._due,
                self._every,
            )
        self._due = due
        self.look()

    def _is_done(self, due: int) -> bool:
        return any(evaluation.due >= due for evaluation in self._parts.progress.evaluations)

    def _evaluate(self, due: int, phase: str) -> None:
        """Evaluate and wait for the result."""
        if self._parts.heldout and not self._is_done(due) and not self._parts.progress.interrupted:
            self._parts.progress.phase = phase
            self._begin(due)
            self._wait()

    def _begin(self, due: int) -> None:
        parts = self._parts
        works = evaluation_work(parts.heldout, parts.config, due)
        parts.progress.evaluating = parts.coordinator.start_evaluation(works, due)

    def _wait(self) -> None:
        """Wait until the evaluation at hand is done, or the run is to stop."""
        parts = self._parts
        while (evaluation := parts.progress.evaluating) and not parts.progress.interrupted:
            if evaluation.done.wait(STOP_CHECK_S):
                self._record()
            parts.coordinator.raise_if_failed()
            parts.heartbeat.beat()

    def _record(self) -> None:
        progress = self._parts.progress
        assert progress.evaluating is not None
        result = evaluation_report(progress.evaluating, self._parts.config)
        progress.evaluating = None
        self._parts.folder.append_evaluation(result)
        progress.evaluations.append(result)
        for name, found in result.sets.items():
            figures = ", ".join(
                f"{what} {'-' if value is None else f'{value:.3f}'}"
                for what, value in found.figures.items()
            )
            missing = found.failed_prompts + found.missing_prompts
            log.info(
                "version %d on %s: %s; %d prompts%s, %.1f s",
                result.version,
                name,
                figures,
                found.prompts,
                f", {missing} left out" if missing else "",
                result.seconds,
            )
            if found.missing_prompts:
                log.warning(
                    "evaluation of version %d ended after eval.timeout_s = %g with %d of %d "
                    "prompts of %s",
                    result.version,
                    self._parts.config.eval.timeout_s,
                    found.prompts,
                    found.prompts + missing,
                    name,
                )
