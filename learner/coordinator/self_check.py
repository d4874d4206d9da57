"""The check of every new actor: does its engine compute the policy that the learner trains?

A new actor first gets one prompt. The log-probabilities that its engine recorded are compared with
those of the learner's model, at the version of the weights that each token was sampled from. Only
then it gets work. Importance ratios are built from the same two numbers, and a wrong temperature or
attention would train on without any other sign.

    joined ──► due ──► out (a lease) ──► scoring (on a side thread) ──► passed
                ▲                           │         └──────────────► refused, with the figure
                └───────────────────────────┘ weights changed before its first token
"""

import copy
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import torch
from transformers import AutoModelForCausalLM

import gdpo
from learner.config.run import RunConfig
from learner.training.collate import PaddedBatch, collate
from learner.training.policy import Policy
from learner.weights.snapshots import Snapshot
from protocol.errors import AsyncGdpoError, ConfigError, TrainingError, brief
from protocol.groups import Group
from transfer.packed import view

log = logging.getLogger("learner")

LIMITS = {"float32": 1e-3, "bfloat16": 5e-2, "float16": 5e-2}
"""Mean absolute difference of log-probabilities, by the less precise of both sides' types."""
WITHOUT = "admission.self_check=false leaves it out"
LARGEST = 50.0
"""The largest difference may be so many times the limit of the mean."""


@dataclass(frozen=True, slots=True)
class CheckResult:
    """What the comparison found."""

    num_tokens: int
    """Compared; 0 if all of them came from other versions."""
    mean_difference: float
    largest_difference: float
    likely_cause: str = ""
    """Why the difference is above the limit; empty if it is not."""

    def __str__(self) -> str:
        return (
            f"log-probabilities of {self.num_tokens} tokens differ from the learner's by "
            f"{self.mean_difference:.2g} on average, {self.largest_difference:.2g} at most"
        )


class SelfCheck:
    """Scores sequences of new actors on a thread of its own: training goes on."""

    def __init__(self, policy: Policy, config: RunConfig) -> None:
        self._config = config
        self._reference = Reference(policy)
        self._queue: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="self-check", daemon=True)
        self._thread.start()

    def submit(
        self,
        group: Group,
        snapshot: Snapshot,
        report: Callable[[CheckResult], None],
        fail: Callable[[AsyncGdpoError], None],
    ) -> None:
        """Compare ``group`` with the snapshot of its version; ``report`` is called later.

        Or ``fail``, if it cannot be done: without it no actor would ever get work.
        """

        def job() -> None:
            try:
                result = self.compare(group, snapshot)
            except Exception as error:
                log.exception("check of a new actor")
                fail(TrainingError(f"the check of a new actor failed: {brief(error)}; {WITHOUT}"))
            else:
                report(result)

        self._queue.put(job)

    def compare(self, group: Group, snapshot: Snapshot) -> CheckResult:
        """Difference of the actor's and the learner's log-probabilities, over the tokens that were
        sampled from the snapshot's version.
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
        """Of the mean difference."""
        both = (self._config.model.dtype, self._config.for_actors().dtype)
        return self._config.admission.check_limit or max(LIMITS[dtype] for dtype in both)

    def close(self) -> None:
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        if self._config.training.threads:
            torch.set_num_threads(self._config.training.threads)
        while job := self._queue.get():
            job()

    def _differences(self, group: Group, snapshot: Snapshot, temperature: float) -> torch.Tensor:
        """[N] of the tokens that were sampled from the snapshot."""
        batch = collate([group], torch.device("cpu"))
        chosen_BT = batch.mask_BT & (batch.versions_BT == snapshot.version)
        if not chosen_BT.any():
            return torch.empty(0)
        logprobs_BT = self._reference.logprobs(snapshot, batch, temperature)
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


class Reference:
    """The learner's model code over the weights of any snapshot, in CPU memory.

    Weights are not copied, unless actors have another type of them.
    """

    def __init__(self, policy: Policy) -> None:
        self._specs = policy.specs
        # Its own: what is set in it below would reach into the model in training.
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
