"""The check of every new actor: does its engine compute the policy that the learner trains?

A new actor first gets one prompt. The log-probabilities that its engine recorded are compared with
those of the learner's model, at the version of the weights that each token was sampled from
(`learner.coordinator.agreement`). Only then does it get work. Importance ratios are built from the
same two numbers, and nothing else would show a wrong temperature or attention.

    joined ──► due ──► out (a lease) ──► scoring (on a side thread) ──► passed
                ▲                           │         └──────────────► refused, with the figure
                └───────────────────────────┘ weights changed before its first token
"""

import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from learner.config.run import RunConfig
from learner.coordinator.agreement import Agreement, compare
from learner.coordinator.learner_logprobs import LearnerLogprobs
from learner.packing.forward import Way
from learner.threads import Fail, Worker
from learner.training.policy import Policy
from learner.weights.snapshots import Snapshot
from protocol.errors import ConfigError, TrainingError, brief
from protocol.groups import Group
from protocol.leases import Work

log = logging.getLogger("learner")

WITHOUT = "admission.self_check=false leaves it out"


@dataclass(frozen=True, slots=True)
class CheckResult:
    """What the comparison found."""

    num_tokens: int
    """How many were compared; 0 if all of them came from other versions."""
    mean_difference: float
    largest_difference: float
    likely_cause: str = ""
    """Why the actor does not pass; empty if it does."""
    limit: str = ""
    """Which difference is allowed, and why."""

    def __str__(self) -> str:
        found = (
            f"log-probabilities of {self.num_tokens} tokens differ from the learner's by "
            f"{self.mean_difference:.2g} on average, {self.largest_difference:.2g} at most"
        )
        return f"{found} ({self.limit})" if self.limit else found


@dataclass(frozen=True, slots=True)
class _Job:
    group: Group
    snapshot: Snapshot
    report: Callable[[CheckResult], None]
    failed: Callable[[Exception], None]
    """Takes what made the comparison impossible."""


class SelfCheck:
    """Scores sequences of actors on a thread of its own: training continues."""

    def __init__(self, policy: Policy, config: RunConfig, works: Sequence[Work], way: Way) -> None:
        """``works`` are what actors are checked with, in turn, ``way`` how the trainer computes.

        Raises `ConfigError`.
        """
        self.works = works
        self._config = config
        try:
            self._learner = LearnerLogprobs(policy, way)
        except ConfigError as error:
            raise ConfigError(f"the check of new actors: {error}; {WITHOUT}") from error
        self._waiting: deque[_Job] = deque()
        self._spot_check: _Job | None = None
        self._worker = Worker(
            "self-check",
            self._take,
            self._score,
            drains=True,
            before=self._limit_threads,
        )

    def start(self, fail: Fail) -> None:
        """Score from now on; ``fail`` gets what makes a check impossible, on the thread.

        Without the check no actor would ever get work.
        """
        self._fail = fail
        self._worker.start(fail)

    def submit(
        self, group: Group, snapshot: Snapshot, report: Callable[[CheckResult], None]
    ) -> None:
        """Compare ``group`` with its version's snapshot; ``report`` is called on the thread."""
        with self._worker.adding():
            self._waiting.append(_Job(group, snapshot, report, self._impossible))

    def spot_check(
        self, group: Group, snapshot: Snapshot, report: Callable[[CheckResult | None], None]
    ) -> None:
        """Compare likewise once no new actor waits; None is reported if that is not possible.

        One at a time.
        """

        def failed(error: Exception) -> None:
            log.warning("an actor at work could not be checked: %s", brief(error))
            report(None)

        with self._worker.adding():
            self._spot_check = _Job(group, snapshot, report, failed)

    def compare(self, group: Group, snapshot: Snapshot) -> CheckResult:
        """Compare the log-probabilities of the actor with the learner's.

        Only those of tokens that were sampled from the snapshot's version count, and of them no
        more than enough.
        """
        found = self._agreement(group, snapshot, self._config.sampling.temperature)
        if found is None:
            return CheckResult(0, 0.0, 0.0)
        return CheckResult(
            found.num_tokens,
            found.mean,
            found.largest,
            "" if found.agrees else self._likely_cause(group, snapshot, found),
            self._allowed(found),
        )

    def close(self) -> None:
        """Score what new actors wait for, and end."""
        self._worker.close()

    def _limit_threads(self) -> None:
        if self._config.training.threads:
            torch.set_num_threads(self._config.training.threads)

    def _take(self) -> _Job | None:
        """New actors first: they wait for it."""
        if self._waiting:
            return self._waiting.popleft()
        job, self._spot_check = self._spot_check, None
        return None if self._worker.closing else job

    def _score(self, job: _Job) -> None:
        try:
            result = self.compare(job.group, job.snapshot)
        except Exception as error:
            job.failed(error)
        else:
            job.report(result)

    def _impossible(self, error: Exception) -> None:
        log.error("check of a new actor", exc_info=error)
        self._fail(TrainingError(f"the check of a new actor failed: {brief(error)}; {WITHOUT}"))

    def _agreement(self, group: Group, snapshot: Snapshot, temperature: float) -> Agreement | None:
        """Compare at a temperature; None if no token is of the snapshot's version."""
        dtype = getattr(torch, self._config.for_actors().dtype)
        scores = self._learner.scores(group, snapshot, dtype, temperature)
        if len(scores.engine_N) == 0:
            return None
        return compare(scores, self._config.admission.check_limit)

    def _allowed(self, found: Agreement) -> str:
        if not found.strict:
            return f"admission.check_limit = {found.limit:g} on average"
        dtype = self._config.for_actors().dtype
        rounding = f", as rounding to {dtype} alone makes {found.rounding:.2g}"
        return (
            f"allowed are {found.limit:.2g} on average{rounding if found.rounding else ''}; "
            "admission.check_limit sets another limit"
        )

    def _likely_cause(self, group: Group, snapshot: Snapshot, found: Agreement) -> str:
        temperature = self._config.sampling.temperature
        at_one = self._agreement(group, snapshot, 1.0)
        if temperature != 1.0 and at_one is not None and at_one.agrees:
            return (
                "the engine records log-probabilities at temperature 1, not at "
                f"sampling.temperature = {temperature:g}"
            )
        if found.gain > -1 and found.gain_explains:
            return (
                f"the engine's logits are {1 + found.gain:.2g} times the learner's, as at a "
                f"temperature of {temperature / (1 + found.gain):.2g} instead of "
                f"sampling.temperature = {temperature:g}: look for a temperature, a scale or a "
                "softcap of logits that the other side does not have"
            )
        if found.leans:
            return (
                f"the engine's are {abs(found.lean):.2g} {'higher' if found.lean > 0 else 'lower'} "
                "nearly everywhere, where rounding goes both ways: look for what cuts its "
                "distribution off or changes it (top_p, top_k, penalties)"
            )
        return (
            "the engine's attention or position code, its weights or its tokens are not the "
            "learner's"
        )
