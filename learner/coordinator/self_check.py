"""The check of every new actor: does its engine compute the policy that the learner trains?

A new actor first gets one prompt. The log-probabilities that its engine recorded are compared with
those of the learner's model, at the version of the weights that each token was sampled from. Only
then does it get work. Importance ratios are built from the same two numbers, and nothing else would
show a wrong temperature or attention.

    joined ──► due ──► out (a lease) ──► scoring (on a side thread) ──► passed
                ▲                           │         └──────────────► refused, with the figure
                └───────────────────────────┘ weights changed before its first token
"""

import copy
import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM

import gdpo
from learner.config.run import RunConfig
from learner.threads import Fail, Worker
from learner.training.collate import PaddedBatch, collate
from learner.training.policy import Policy
from learner.weights.snapshots import Snapshot
from protocol.errors import ConfigError, TrainingError, brief
from protocol.groups import Group
from protocol.leases import Work
from transfer.views import view

log = logging.getLogger("learner")

LIMITS = {"float32": 1e-3, "bfloat16": 5e-2, "float16": 5e-2}
"""Mean absolute difference of log-probabilities, by the less precise of both sides' types."""
WITHOUT = "admission.self_check=false leaves it out"
LARGEST = 50.0
"""The largest difference may be this many times the limit of the mean."""


@dataclass(frozen=True, slots=True)
class CheckResult:
    """What the comparison found."""

    num_tokens: int
    """How many were compared; 0 if all of them came from other versions."""
    mean_difference: float
    largest_difference: float
    likely_cause: str = ""
    """Why the difference is above the limit; empty if it is not."""

    def __str__(self) -> str:
        return (
            f"log-probabilities of {self.num_tokens} tokens differ from the learner's by "
            f"{self.mean_difference:.2g} on average, {self.largest_difference:.2g} at most"
        )


@dataclass(frozen=True, slots=True)
class _Job:
    group: Group
    snapshot: Snapshot
    report: Callable[[CheckResult], None]


class SelfCheck:
    """Scores sequences of new actors on a thread of its own: training continues."""

    def __init__(self, policy: Policy, config: RunConfig, works: Sequence[Work]) -> None:
        """``works`` are what actors are checked with, in turn. Raises `ConfigError`."""
        self.works = works
        self._config = config
        self._learner = LearnerLogprobs(policy)
        self._waiting: deque[_Job] = deque()
        self._worker = Worker(
            "self-check",
            lambda: self._waiting.popleft() if self._waiting else None,
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
            self._waiting.append(_Job(group, snapshot, report))

    def compare(self, group: Group, snapshot: Snapshot) -> CheckResult:
        """Compare the log-probabilities of the actor with the learner's.

        Only those of tokens that were sampled from the snapshot's version count.
        """
        temperature = self._config.sampling.temperature
        here = self._differences(group, snapshot, temperature)
        if len(here) == 0:
            return CheckResult(0, 0.0, 0.0)
        result = CheckResult(len(here), here.mean().item(), here.max().item())
        if self._agrees(here):
            return result
        at_one = self._differences(group, snapshot, 1.0)
        return CheckResult(
            result.num_tokens,
            result.mean_difference,
            result.largest_difference,
            self._likely_cause(wrong_temperature=self._agrees(at_one)),
        )

    @property
    def limit(self) -> float:
        """The largest mean difference with which an actor passes."""
        both = (self._config.model.dtype, self._config.for_actors().dtype)
        return self._config.admission.check_limit or max(LIMITS[dtype] for dtype in both)

    def close(self) -> None:
        """Score what waits, and end."""
        self._worker.close()

    def _limit_threads(self) -> None:
        if self._config.training.threads:
            torch.set_num_threads(self._config.training.threads)

    def _score(self, job: _Job) -> None:
        try:
            result = self.compare(job.group, job.snapshot)
        except Exception as error:
            log.exception("check of a new actor")
            self._fail(TrainingError(f"the check of a new actor failed: {brief(error)}; {WITHOUT}"))
        else:
            job.report(result)

    def _differences(self, group: Group, snapshot: Snapshot, temperature: float) -> torch.Tensor:
        """Absolute differences [N] of the tokens that were sampled from the snapshot."""
        batch = collate([group], torch.device("cpu"))
        chosen_BT = batch.mask_BT & (batch.versions_BT == snapshot.version)
        if not chosen_BT.any():
            return torch.empty(0)
        logprobs_BT = self._learner.logprobs(snapshot, batch, temperature)
        return (logprobs_BT - batch.behaviour_BT)[chosen_BT].abs()

    def _agrees(self, differences: torch.Tensor) -> bool:
        # Not "is above": a NaN is no agreement.
        return bool(differences.mean() <= self.limit and differences.max() <= LARGEST * self.limit)

    def _likely_cause(self, *, wrong_temperature: bool) -> str:
        model, actors = self._config.model.dtype, self._config.for_actors().dtype
        if wrong_temperature and self._config.sampling.temperature != 1.0:
            return (
                "the engine records log-probabilities at temperature 1, not at "
                f"sampling.temperature = {self._config.sampling.temperature:g}"
            )
        if model != actors:
            return f"the learner computes in {model}, the actors in {actors}: set actor.dtype"
        return (
            "the engine's attention or position code, its weights or its tokens are not the "
            "learner's; a difference of this size that is harmless can be allowed by "
            "admission.check_limit"
        )


class LearnerLogprobs:
    """What the learner's model code computes with the weights of any snapshot, in CPU memory.

    Weights are not copied, unless actors have another type of them.
    """

    def __init__(self, policy: Policy) -> None:
        self._specs = policy.specs
        # A copy: what is set in it below would reach into the model in training.
        config = copy.deepcopy(policy.model.config)
        attention = config._attn_implementation
        try:
            with torch.device("meta"):
                self._model: Any = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                    config,
                    dtype=policy.model.dtype,
                    # The others need a GPU.
                    attn_implementation=attention if attention == "eager" else "sdpa",
                    trust_remote_code=False,
                ).eval()
        except Exception as error:
            raise ConfigError(
                f"the check of new actors cannot build the model: {brief(error)}; {WITHOUT}"
            ) from error
        # Buffers, of rotary positions for example, come from nowhere else.
        self._buffers = {
            name: buffer.detach().to("cpu", copy=True)
            for name, buffer in policy.model.named_buffers()
        }

    @torch.no_grad()
    def logprobs(self, snapshot: Snapshot, batch: PaddedBatch, temperature: float) -> torch.Tensor:
        """Log-probability [B, T] of every next token under the snapshot's policy."""
        weights = {
            spec.name: view(snapshot.packed, spec).to(self._model.dtype) for spec in self._specs
        }
        output = torch.func.functional_call(
            self._model,
            {**weights, **self._buffers},
            kwargs={"input_ids": batch.tokens_BL[:, :-1], "use_cache": False},
        )
        return gdpo.token_logprobs(output.logits, batch.tokens_BL[:, 1:], temperature=temperature)
