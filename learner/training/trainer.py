"""The trainer: one GDPO update from one batch of groups.

Where it departs from the GDPO paper's synchronous recipe:
1. The loss corrects for stale tokens (`algorithm.correction`); the paper's is on policy.
2. The proximal policy is recomputed once per batch, before its first update.
3. The KL term is off unless `algorithm.kl_coefficient` is set.
"""

import copy
import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

import gdpo
from learner.config.run import RunConfig
from learner.training.collate import PaddedBatch, collate, scores
from learner.training.forward import Forward
from learner.training.microbatches import (
    Microbatch,
    add_metrics,
    lag0_difference,
    metrics_by_staleness,
    over_minibatches,
    whole_ess,
)
from learner.training.overlong import cut_off, trained_on
from learner.training.policy import Policy
from learner.training.reward_settings import RewardSetting
from protocol.errors import TrainingError
from protocol.groups import Group

_FLAT = StateDictOptions(flatten_optimizer_state_dict=True)
_RANDOM = "random_generator"


@dataclass(frozen=True, slots=True)
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
    mean_tokens: float
    """Mean length of the completions."""
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
        on_progress: Callable[[], None] = lambda: None,
    ) -> None:
        """``reference`` is the model of the KL term, if not the policy as it is now."""
        self._model = policy.model
        self._config = config
        self._device = next(self._model.parameters()).device
        self._optimizer = torch.optim.AdamW(
            self._model.parameters(),
            lr=config.optimizer.lr,
            betas=config.optimizer.betas,
            weight_decay=config.optimizer.weight_decay,
        )
        self._random = torch.Generator().manual_seed(config.seed)
        self._forward = Forward(config.sampling.temperature, on_progress)
        self._correction = config.algorithm.make_correction()
        self.batch_std: float | None = None
        """Scale of the batches before, which were weighed by ``batch_std_setting``."""
        self.batch_std_setting: RewardSetting | None = None
        self._reference: Any = None
        if config.algorithm.kl_coefficient:
            self._reference = (reference or copy.deepcopy(policy.model)).requires_grad_(False)
        self.version = 0
        self.in_step = False
        """Whether the weights are between two versions, which is so after a step that failed."""

    def state_tensors(self) -> dict[str, torch.Tensor]:
        """Optimiser and random generator: what a checkpoint needs besides the weights.

        They are the optimiser's own; `load_state` takes them back.
        """
        return self._optimizer_tensors() | {_RANDOM: self._random.get_state()}

    def load_state(self, version: int, fill: Callable[[dict[str, torch.Tensor]], None]) -> None:
        """Be as after the step that made ``version``; ``fill`` writes into `state_tensors`."""
        tensors = self.state_tensors()
        fill(tensors)
        self._random.set_state(tensors.pop(_RANDOM))
        state = get_optimizer_state_dict(self._model, self._optimizer, options=_FLAT)
        state.update(tensors)  # type: ignore[arg-type]
        set_optimizer_state_dict(self._model, self._optimizer, state, options=_FLAT)
        self.version = version

    def step(self, groups: list[Group], setting: RewardSetting) -> StepResult:
        """Train on a batch; raises `TrainingError` when loss or gradient is not finite."""
        self.in_step = True
        scores_PGK = scores(groups)
        advantages = self._advantages(scores_PGK, setting)
        batch = collate(groups, self._device)
        cut_PG = cut_off(groups)
        trained_B = trained_on(cut_PG, self._config.algorithm.overlong).flatten()
        batch.mask_BT.logical_and_(trained_B.to(self._device)[:, None])
        advantages_B = advantages.advantages.flatten().to(self._device)
        staleness = [self.version - group.oldest_version for group in groups]
        metrics, difference = self._update(batch, advantages_B)
        self.version += 1
        self.in_step = False
        names = list(setting.weights)
        metrics |= gdpo.reward_diagnostics(scores_PGK, advantages, names)
        metrics["overlong"] = cut_PG.double().mean().item()
        num_tokens = sum(group.num_tokens for group in groups)
        return StepResult(
            version=self.version,
            num_tokens=num_tokens,
            staleness=staleness,
            metrics=metrics,
            rewards={name: metrics[f"reward/{name}/mean"] for name in names},
            setting=setting,
            mean_tokens=num_tokens / len(batch.tokens_BL),
            lag0_difference=difference,
        )

    def _optimizer_tensors(self) -> dict[str, torch.Tensor]:
        state: dict[str, Any] = dict(
            get_optimizer_state_dict(self._model, self._optimizer, options=_FLAT)
        )
        return {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}

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

    def _update(
        self, batch: PaddedBatch, advantages_B: torch.Tensor
    ) -> tuple[dict[str, float], float | None]:
        """All optimiser steps of one batch."""
        proximal_BT = None
        if self._correction.needs_proximal and self._config.algorithm.proximal == "recomputed":
            proximal_BT = self._forward.logprobs_in_parts(
                self._model, batch, self._config.training.microbatch_sequences
            )
        history: dict[str, list[float]] = defaultdict(list)
        parts: list[Microbatch] = []
        order = torch.randperm(len(advantages_B), generator=self._random).to(self._device)
        for index, rows in enumerate(order.tensor_split(self._config.training.minibatches)):
            self._set_lr(index)
            new_parts, metrics = self._minibatch(batch, advantages_B, proximal_BT, rows)
            if index == 0:
                # Only before the batch's first update is the trainer's policy its version.
                difference = lag0_difference(new_parts, self.version)
            parts += new_parts
            for name, value in metrics.items():
                history[name].append(value)
        metrics = over_minibatches(history) | metrics_by_staleness(parts, self.version)
        return metrics, difference

    def _minibatch(
        self,
        batch: PaddedBatch,
        advantages_B: torch.Tensor,
        proximal_BT: torch.Tensor | None,
        rows: torch.Tensor,
    ) -> tuple[list[Microbatch], dict[str, float]]:
        """One optimiser step, its gradient summed over microbatches that fit into memory."""
        denominator = gdpo.loss_denominator(
            batch.mask_BT[rows],
            aggregation=self._config.algorithm.aggregation,
            max_length=self._config.sampling.max_tokens,
        )
        self._optimizer.zero_grad(set_to_none=True)
        sums: dict[str, float] = defaultdict(float)
        parts: list[Microbatch] = []
        for micro_rows in rows.split(self._config.training.microbatch_sequences):
            part = batch.select(micro_rows)
            length = part.mask_BT.shape[1]
            loss = self._loss(
                part,
                advantages_B[micro_rows],
                None if proximal_BT is None else proximal_BT[micro_rows, :length],
                denominator,
            )
            loss.loss.backward()  # type: ignore[no-untyped-call]
            sums["loss"] += loss.loss.item()
            add_metrics(sums, loss.metrics, share=len(micro_rows) / len(rows))
            parts.append(Microbatch(loss.record, part.versions_BT))
        if self._config.algorithm.scale_lr_by_ess:
            self._scale_lr(math.sqrt(whole_ess(parts)))
        sums["grad_norm"] = self._apply(sums["loss"])
        return parts, dict(sums)

    def _loss(
        self,
        part: PaddedBatch,
        advantages_B: torch.Tensor,
        proximal_BT: torch.Tensor | None,
        denominator: torch.Tensor,
    ) -> gdpo.PolicyLoss:
        """The loss of a microbatch, as the configuration says."""
        algorithm = self._config.algorithm
        entropy = None
        if algorithm.entropy_coefficient:
            logprobs_BT, entropy_BT = self._forward.logprobs_and_entropy(self._model, part)
            entropy = algorithm.make_entropy_term(entropy_BT)
        else:
            logprobs_BT = self._forward.logprobs(self._model, part)
        if self._correction.needs_proximal and proximal_BT is None:
            proximal_BT = gdpo.interpolated_proximal(
                part.behaviour_BT, logprobs_BT, part.versions_BT, self.version
            )
        kl = None
        if self._reference is not None:
            with torch.no_grad():
                kl = algorithm.make_kl_term(self._forward.logprobs(self._reference, part))
        return gdpo.policy_loss(
            logprobs_BT,
            advantages_B,
            part.mask_BT,
            behaviour_logprobs=part.behaviour_BT,
            proximal_logprobs=proximal_BT,
            correction=self._correction,
            aggregation=algorithm.aggregation,
            kl=kl,
            entropy=entropy,
            denominator=denominator,
        )

    def _apply(self, loss: float) -> float:
        """Clip the gradient and step; returns its norm before clipping."""
        norm = torch.nn.utils.clip_grad_norm_(
            self._model.parameters(), self._config.optimizer.max_grad_norm
        ).item()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise TrainingError(
                f"step {self.version + 1}: loss {loss}, gradient norm {norm}. Lower optimizer.lr, "
                "or look for a reward of extreme size"
            )
        self._optimizer.step()
        return norm

    def _scale_lr(self, factor: float) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] *= factor

    def _set_lr(self, minibatch: int) -> None:
        config, minibatches = self._config.optimizer, self._config.training.minibatches
        factor = lr_factor(
            self.version * minibatches + minibatch,
            warmup=config.warmup_steps * minibatches,
            total=self._config.training.steps * minibatches,
            schedule=config.lr_schedule,
        )
        for group in self._optimizer.param_groups:
            group["lr"] = config.lr * factor


def lr_factor(update: int, *, warmup: int, total: int, schedule: str) -> float:
    """Share of the learning rate at optimiser step ``update`` (from 0) of ``total``."""
    if update < warmup:
        return (update + 1) / (warmup + 1)
    if schedule == "constant":
        return 1.0
    return (total - update) / (total - warmup)
