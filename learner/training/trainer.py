"""The trainer: one GDPO update from one batch of groups.

Where it departs from the GDPO paper's synchronous recipe:
1. The loss corrects for stale tokens (`algorithm.correction`); the paper's is on policy.
2. The proximal policy is that before the batch's first update: a pass without a gradient gives
   its log-probabilities, but for the first minibatch, whose own they are. Groups whose scores
   do not differ are computed without a gradient, as theirs is 0.
3. The KL term is off unless `algorithm.kl_coefficient` is set.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

import gdpo
from learner.config.run import RunConfig
from learner.packing.budget import Budget
from learner.packing.choice import choose
from learner.packing.forward import Forward
from learner.packing.rows import Rows
from learner.packing.split import Work
from learner.training.batch import Batch
from learner.training.batch_tensors import to_tensors
from learner.training.completion_metrics import completion_metrics
from learner.training.memory import layers_of, prepared
from learner.training.microbatches import (
    Microbatch,
    lag0_difference,
    of_all_ranks,
    step_metrics,
    whole_ess,
)
from learner.training.optimizers import PolicyOptimizer
from learner.training.passes import Passes
from learner.training.policy import Policy
from learner.training.ranks import ALONE, Order, Ranks
from learner.training.reward_settings import RewardSetting
from learner.training.shards import shard
from protocol.errors import TrainingError
from protocol.groups import Group

_RANDOM = "random_generator"


@dataclass(frozen=True, slots=True, eq=False)
class StepResult:
    """What one step did."""

    version: int
    """Version of the policy after it."""
    num_tokens: int
    """Sampled tokens trained on."""
    staleness: list[int]
    """Staleness of each group when the batch was cut, in training batches."""
    metrics: dict[str, float]
    rewards: dict[str, float]
    """Mean raw score of each reward."""
    setting: RewardSetting
    """What the rewards counted."""
    advantages_PG: Tensor
    """What the rollouts of each group were trained with."""
    lag0_difference: float | None
    """Largest difference between the actors' and the trainer's log-probability of a token that
    was sampled from exactly the trainer's version; None if there was no such token."""


class Trainer:
    """The owner of the optimiser and of the policy version."""

    def __init__(
        self,
        policy: Policy,
        config: RunConfig,
        *,
        reference: Any = None,
        ranks: Ranks = ALONE,
        on_progress: Callable[[], None] = lambda: None,
    ) -> None:
        """``reference`` is the model of the KL term, if not the policy as it is now.

        Of several ``ranks``, all make a trainer of the same model; its weights are shared out.
        """
        self._model = policy.model
        self._config = config
        self.ranks = ranks
        self._device = next(self._model.parameters()).device
        self._random = torch.Generator().manual_seed(config.seed)
        longest = config.sampling.max_prompt_tokens + config.sampling.max_tokens
        self.way = choose(self._model, longest)
        """How sequences go through the model."""
        self._forward = Forward(self.way, config.sampling.temperature, on_progress)
        budget = prepared(
            self._model,
            self._forward,
            longest,
            config.training,
            masters=config.optimizer.master_weights,
            ranks=min(config.training.shard_ranks or ranks.size, ranks.size),
        )
        work = Work.of(self._model)
        self._correction = config.algorithm.make_correction()
        self.batch_std: float | None = None
        """Scale of the batches before, which were weighed by ``batch_std_setting``."""
        self.batch_std_setting: RewardSetting | None = None
        self._reference: Any = None
        if config.algorithm.kl_coefficient:
            self._reference = (reference or copy.deepcopy(policy.model)).requires_grad_(False)
            # The same family: what the check found holds for it too.
            self._reference.set_attn_implementation(self._model.config._attn_implementation)
        if ranks.size > 1:
            budget = self._share_out(budget)
        self._passes = Passes(self._forward, self.way, budget, work, self._device, ranks)
        self._optimizer = PolicyOptimizer(policy.model, config.optimizer, seed=config.seed)
        self.version = 0
        self.in_step = False
        """Whether the weights are between two versions, which is so after a step that failed."""

    def _share_out(self, budget: Budget) -> Budget:
        """Become one of several ranks, that all compute in the same way; returns their budget."""
        self.ranks.meet()
        self.ranks.check_equal("the way of computing the model", repr(self.way))
        each = self._config.training.shard_ranks
        self._model = shard(self._model, layers_of(self._model), each)
        if self._reference is not None:
            self._reference = shard(self._reference, layers_of(self._reference), each)
        return Budget(*map(self.ranks.smallest, (budget.most, budget.quick)))

    def state_tensors(self) -> dict[str, torch.Tensor]:
        """Optimiser and random generator: what a checkpoint needs besides the weights.

        Masters of the weights are part of the optimiser. `load_state` takes them all back.
        """
        return self._optimizer.state_tensors() | {_RANDOM: self._random.get_state()}

    def load_state(self, version: int, fill: Callable[[dict[str, torch.Tensor]], None]) -> None:
        """Be as after the step that made ``version``; ``fill`` writes into `state_tensors`."""
        tensors = self.state_tensors()
        fill(tensors)
        self._random.set_state(tensors[_RANDOM])
        self._optimizer.filled()
        self.version = version

    def step(self, groups: list[Group], setting: RewardSetting) -> StepResult:
        """Train on a batch; raises `TrainingError` when loss or gradient is not finite."""
        batch = Batch(groups, self._config.algorithm.overlong)
        advantages = self._advantages(batch.scores_PGK, setting)
        staleness = [self.version - group.oldest_version for group in groups]
        if self.ranks.size > 1:
            self.ranks.order(Order.TRAIN, to_tensors(groups, advantages.advantages))
        metrics, difference = self.update(batch, advantages.advantages)
        names = list(setting.weights)
        metrics |= gdpo.reward_diagnostics(batch.scores_PGK, advantages, names)
        metrics |= completion_metrics(groups, metrics)
        return StepResult(
            version=self.version,
            num_tokens=batch.num_tokens,
            staleness=staleness,
            metrics=metrics,
            rewards={name: metrics[f"reward/{name}/mean"] for name in names},
            setting=setting,
            advantages_PG=advantages.advantages,
            lag0_difference=difference,
        )

    def _advantages(self, scores_PGK: torch.Tensor, setting: RewardSetting) -> gdpo.Advantages:
        algorithm = self._config.algorithm
        if setting != self.batch_std_setting:
            # The scale of the batches before says nothing about other weights.
            self.batch_std, self.batch_std_setting = None, setting
        advantages = gdpo.compute_advantages(
            scores_PGK,
            estimator=algorithm.estimator,
            weights=list(setting.weights.values()),
            eps=algorithm.advantage_eps,
            min_std=algorithm.min_std,
            clamp=algorithm.advantage_clamp,
            conditions=setting.conditions,
            exclude_dead_from_batch_std=algorithm.exclude_dead_from_batch_std,
            ema_decay=algorithm.batch_std_ema,
            previous_batch_std=self.batch_std,
        )
        self.batch_std = advantages.batch_std
        return advantages

    def update(self, batch: Batch, advantages_PG: Tensor) -> tuple[dict[str, float], float | None]:
        """All optimiser steps of one batch, on every rank: metrics, and the difference at lag 0.

        Raises as `step` does.
        """
        self.in_step = True
        with self.ranks.explained():
            result = self._minibatches(batch, advantages_PG)
        self.version += 1
        self.in_step = False
        return result

    def _minibatches(
        self, batch: Batch, advantages_PG: Tensor
    ) -> tuple[dict[str, float], float | None]:
        order = torch.randperm(len(batch.groups), generator=self._random)
        learns_P = (advantages_PG != 0).any(1) | self._all_learn
        advantages_B = advantages_PG.flatten().to(self._device, torch.float32)
        minibatches = [
            _Minibatch(batch, places_p, self._passes.of(batch, places_p[learns_P[places_p]]))
            for places_p in order.tensor_split(self._config.training.minibatches)
        ]
        parts = self._without_gradient(
            self._passes.of(batch, order[~learns_P[order]]), advantages_B
        )
        difference = lag0_difference(parts, self.version)
        # Before the first update: after it, the policy is another one.
        later = [self._proximal(minibatch) for minibatch in minibatches[1:]]
        losses, norms = [], []
        for index, (minibatch, proximal) in enumerate(
            zip(minibatches, [None, *later], strict=True)
        ):
            self._set_lr(index)
            new_parts, loss = self._backward(minibatch, advantages_B, proximal)
            if self._config.algorithm.scale_lr_by_ess:
                self._optimizer.scale_lr(math.sqrt(whole_ess(new_parts)))
            norms.append(self._apply(loss))
            losses.append(loss)
            parts += new_parts
            if index == 0:
                # Only before the batch's first update is the trainer's policy its version.
                difference = lag0_difference(parts, self.version)
        metrics = step_metrics(parts, self.version)
        metrics["loss"] = sum(losses) / len(losses)
        metrics["grad_norm"] = sum(norms) / len(norms)
        metrics["learning_rate"] = self._optimizer.lr
        return metrics, difference

    @torch.no_grad()
    def _without_gradient(self, passes: list[Rows], advantages_B: Tensor) -> list[Microbatch]:
        """What groups that have no gradient leave for the metrics."""
        parts = [
            Microbatch(self._loss(rows, advantages_B, None, None).record, rows.versions_N)
            for rows in passes
        ]
        return of_all_ranks(parts, self.ranks)

    @property
    def _all_learn(self) -> bool:
        """Whether tokens have a gradient that their advantage has no part in."""
        algorithm = self._config.algorithm
        return bool(
            algorithm.kl_coefficient
            or algorithm.entropy_coefficient
            or self._correction.acts_without_advantage
        )

    @torch.no_grad()
    def _proximal(self, minibatch: "_Minibatch") -> list[Tensor] | None:
        """Log-probabilities [N] of each pass under the policy as it is now, if they are needed."""
        if not self._recomputes_proximal:
            return None
        return [self._forward.logprobs(self._model, rows) for rows in minibatch.passes]

    @property
    def _recomputes_proximal(self) -> bool:
        return self._correction.needs_proximal and self._config.algorithm.proximal == "recomputed"

    def _backward(
        self, minibatch: "_Minibatch", advantages_B: Tensor, proximal: list[Tensor] | None
    ) -> tuple[list[Microbatch], float]:
        """Gradient of a minibatch, summed over passes that fit into memory; returns its loss.

        Passes, loss and gradient are those of all ranks.
        """
        self._optimizer.zero_grad()
        denominator = gdpo.loss_denominator(
            minibatch.lengths_b.to(self._device),
            aggregation=self._config.algorithm.aggregation,
            max_length=self._config.sampling.max_tokens,
        )
        total = torch.zeros((), device=self._device)
        parts: list[Microbatch] = []
        for index, rows in enumerate(minibatch.passes):
            proximal_N = None if proximal is None else proximal[index]
            loss = self._loss(rows, advantages_B, proximal_N, denominator)
            loss.loss.backward()  # type: ignore[no-untyped-call]
            total += loss.loss.detach()
            parts.append(Microbatch(loss.record, rows.versions_N))
        return of_all_ranks(parts, self.ranks), self.ranks.sum(total).item()

    def _loss(
        self,
        rows: Rows,
        advantages_B: Tensor,
        proximal_N: Tensor | None,
        denominator: Tensor | None,
    ) -> gdpo.PolicyLoss:
        """The loss of a pass, as the configuration says; without ``proximal_N``, the policy is."""
        reference_N = None
        if self._reference is not None:
            with torch.no_grad():
                reference_N = self._forward.logprobs(self._reference, rows)
        of = partial(self._loss_of, rows, advantages_B, proximal_N, reference_N, denominator)
        of_entropy = bool(self._config.algorithm.entropy_coefficient)
        by_token = self._correction.by_token and not of_entropy
        return of(
            *self._forward.logprobs_and_entropy(
                self._model,
                rows,
                entropy_gradient=of_entropy,
                loss_gradient=_gradient_of(of) if by_token else None,
            )
        )

    def _loss_of(
        self,
        rows: Rows,
        advantages_B: Tensor,
        proximal_N: Tensor | None,
        reference_N: Tensor | None,
        denominator: Tensor | None,
        logprobs_N: Tensor,
        entropy_N: Tensor | None = None,
    ) -> gdpo.PolicyLoss:
        """The loss of a pass from the log-probabilities of all policies."""
        algorithm = self._config.algorithm
        if self._correction.needs_proximal and proximal_N is None:
            proximal_N = logprobs_N.detach()
            if not self._recomputes_proximal:
                proximal_N = gdpo.interpolated_proximal(
                    rows.behaviour_N, proximal_N, rows.versions_N, self.version
                )
        tokens = gdpo.Tokens(
            policy_N=logprobs_N,
            behaviour_N=rows.behaviour_N,
            advantage_N=advantages_B[rows.sequence_N],
            sequence_N=rows.sequence_N,
            num_sequences=len(advantages_B),
            proximal_N=proximal_N,
        )
        return gdpo.packed_policy_loss(
            tokens,
            correction=self._correction,
            aggregation=algorithm.aggregation,
            kl=None if reference_N is None else algorithm.make_kl_term(reference_N),
            entropy=None if entropy_N is None else algorithm.make_entropy_term(entropy_N),
            denominator=denominator,
        )

    def _apply(self, loss: float) -> float:
        """Clip the gradient and step; returns its norm before clipping."""
        norm = self._optimizer.clip()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise TrainingError(
                f"step {self.version + 1}: loss {loss}, gradient norm {norm}. Lower optimizer.lr, "
                "or look for a reward of extreme size"
            )
        self._optimizer.step()
        return norm

    def _set_lr(self, minibatch: int) -> None:
        config, minibatches = self._config.optimizer, self._config.training.minibatches
        factor = lr_factor(
            self.version * minibatches + minibatch,
            warmup=config.warmup_steps * minibatches,
            total=self._config.training.steps * minibatches,
            schedule=config.lr_schedule,
        )
        self._optimizer.set_lr(factor)


def _gradient_of(loss_of: Callable[[Tensor], gdpo.PolicyLoss]) -> gdpo.LossGradient:
    """The gradient of a loss with respect to log-probabilities."""

    def gradient(logprobs_N: Tensor) -> Tensor:
        with torch.enable_grad():  # type: ignore[no-untyped-call]
            own_N = logprobs_N.detach().clone().requires_grad_()
            (gradient_N,) = torch.autograd.grad(loss_of(own_N).loss, own_N)
        return gradient_N

    return gradient


@dataclass(frozen=True, slots=True, eq=False)
class _Minibatch:
    """The groups of one optimiser step."""

    batch: Batch
    places_p: Tensor
    """int64: which groups of the batch."""
    passes: list[Rows]
    """Of those that have a gradient."""

    @property
    def lengths_b(self) -> Tensor:
        """Tokens of each sequence."""
        return self.batch.lengths_PG[self.places_p].flatten()


def lr_factor(update: int, *, warmup: int, total: int, schedule: str) -> float:
    """Share of the learning rate at optimiser step ``update`` (from 0) of ``total``."""
    if update < warmup:
        return (update + 1) / (warmup + 1)
    if schedule == "constant":
        return 1.0
    return (total - update) / (total - warmup)
