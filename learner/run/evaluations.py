"""Evaluations of the policy in training: before the first step and after the last."""

import logging
import math
import time

from learner.prompts.evaluation import Evaluation
from learner.prompts.stream import evaluation_work
from learner.records import EvaluationResult
from learner.run.parts import Parts
from learner.run.progress import STOP_CHECK_S
from learner.run.reports import evaluation_report

log = logging.getLogger("learner")


def evaluate(parts: Parts, phase: str) -> EvaluationResult | None:
    """Roll the held-out prompts out under the current version; None if stopped or no data.

    Actors get this version: it is the first one, the last one, or where a resume led to.
    Raises what made it impossible to continue.
    """
    if not parts.heldout or parts.progress.interrupted:
        return None
    parts.progress.phase = phase
    version = parts.trainer.version
    works = evaluation_work(parts.heldout, parts.config, version)
    evaluation = parts.coordinator.start_evaluation(works, version)
    if not _wait(parts, evaluation, len(works)):
        return None
    parts.coordinator.end_evaluation()
    return evaluation_report(evaluation, tuple(r.name for r in parts.config.rewards))


def _wait(parts: Parts, evaluation: Evaluation, num_prompts: int) -> bool:
    """Wait until it is done or out of time; False if the run is to stop."""
    timeout_s = parts.config.eval.timeout_s
    deadline = math.inf
    while not evaluation.done.wait(STOP_CHECK_S):
        parts.coordinator.raise_if_failed()
        parts.heartbeat.beat()
        if parts.progress.interrupted:
            return False
        # The time runs while there is somebody to evaluate.
        if not parts.coordinator.ready_actors():
            deadline = math.inf
        elif deadline == math.inf:
            deadline = time.monotonic() + timeout_s
        if time.monotonic() > deadline:
            log.warning(
                "evaluation ended after eval.timeout_s = %g with %d of %d prompts",
                timeout_s,
                evaluation.num_prompts,
                num_prompts,
            )
            break
    return True
