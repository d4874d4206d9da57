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
from learner.training.batch import Batch, collate, scores
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
    """Of the policy after it."""
    num_tokens: int
    """Sampled tokens trained on."""
    staleness: list[int]
    """Of each group, when the batch was cut."""
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


@dataclass(frozen=True, slots=True, eq=False)
class _Part:
    """What a microbatch leaves for the metrics."""

    record: gdpo.TokenRecord
    versions_BT: torch.Tensor


class Trainer:
    """Owns the optimiser and the policy version."""

    def __init__(
        self,
        policy: Policy,
        config: RunConfig,
        *,
        reference: Any = None,
        on_progress: Callable[[], None] = lambda: None,
    ) -> None:
        """``reference`` is the model of the KL term, if not the policy as it is now."""
        self._on_progress = on_progress
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
        self._needs_proximal = gdpo.CORRECTIONS[config.algorithm.correction].needs_proximal
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
        advantages_B = advantages.advantages.flatten().to(self._device)
        staleness = [self.version - group.oldest_version for group in groups]
        metrics, difference = self._update(batch, advantages_B)
        self.version += 1
        self.in_step = False
        names = list(setting.weights)
        metrics |= gdpo.reward_diagnostics(scores_PGK, advantages, names)
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
        self, batch: Batch, advantages_B: torch.Tensor
    ) -> tuple[dict[str, float], float | None]:
        """All optimiser steps of one batch."""
        proximal_BT = None
        if self._needs_proximal and self._config.algorithm.proximal == "recomputed":
            proximal_BT = self._proximal_logprobs(batch)
        history: dict[str, list[float]] = defaultdict(list)
        parts: list[_Part] = []
        order = torch.randperm(len(advantages_B), generator=self._random).to(self._device)
        for index, rows in enumerate(order.tensor_split(self._config.training.minibatches)):
            self._set_lr(index)
            new_parts, metrics = self._minibatch(batch, advantages_B, proximal_BT, rows)
            if index == 0:
                # Only before the batch's first update is the trainer's policy its version.
                difference = self._lag0_difference(new_parts)
            parts += new_parts
            for name, value in metrics.items():
                history[name].append(value)
        metrics = {
            name: max(values) if name.endswith("_max") else sum(values) / len(values)
            for name, values in history.items()
        }
        metrics |= gdpo.metrics_by_staleness(
            [part.record for part in parts],
            [self.version - part.versions_BT for part in parts],
        )
        return metrics, difference

    def _minibatch(
        self,
        batch: Batch,
        advantages_B: torch.Tensor,
        proximal_BT: torch.Tensor | None,
        rows: torch.Tensor,
    ) -> tuple[list["_Part"], dict[str, float]]:
        """One optimiser step, its gradient summed over microbatches that fit into memory."""
        denominator = gdpo.loss_denominator(
            batch.mask_BT[rows],
            aggregation=self._config.algorithm.aggregation,
            max_length=self._config.sampling.max_tokens,
        )
        self._optimizer.zero_grad(set_to_none=True)
        sums: dict[str, float] = defaultdict(float)
        parts: list[_Part] = []
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
            _add_metrics(sums, loss.metrics, share=len(micro_rows) / len(rows))
            parts.append(_Part(loss.record, part.versions_BT))
        if self._config.algorithm.scale_lr_by_ess:
            self._scale_lr(math.sqrt(_whole_ess(parts)))
        sums["grad_norm"] = self._apply(sums["loss"])
        return parts, dict(sums)

    def _loss(
        self,
        part: Batch,
        advantages_B: torch.Tensor,
        proximal_BT: torch.Tensor | None,
        denominator: torch.Tensor,
    ) -> gdpo.PolicyLoss:
        """The loss of a microbatch, as the configuration says."""
        algorithm = self._config.algorithm
        entropy_BT = None
        if algorithm.entropy_coefficient:
            logprobs_BT, entropy_BT = self._logprobs_and_entropy(part)
        else:
            logprobs_BT = self._logprobs(part)
        if self._needs_proximal and proximal_BT is None:
            proximal_BT = gdpo.interpolated_proximal(
                part.behaviour_BT, logprobs_BT, part.versions_BT, self.version
            )
        reference_BT = None
        if self._reference is not None:
            with torch.no_grad():
                reference_BT = self._logprobs(part, self._reference)
        return gdpo.policy_loss(
            logprobs_BT,
            advantages_B,
            part.mask_BT,
            behaviour_logprobs=part.behaviour_BT,
            proximal_logprobs=proximal_BT,
            correction=algorithm.correction,
            aggregation=algorithm.aggregation,
            clip_low=algorithm.clip_low,
            clip_high=algorithm.clip_high,
            weight_floor=algorithm.weight_floor,
            weight_cap=algorithm.weight_cap,
            tv_limit=algorithm.tv_limit,
            log_ratio_penalty=algorithm.log_ratio_penalty,
            second_moment_limit=algorithm.second_moment_limit,
            reference_logprobs=reference_BT,
            kl_kind=algorithm.kl_kind,
            kl_coefficient=algorithm.kl_coefficient,
            entropy=entropy_BT,
            entropy_coefficient=algorithm.entropy_coefficient,
            max_length=self._config.sampling.max_tokens,
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

    @torch.no_grad()
    def _proximal_logprobs(self, batch: Batch) -> torch.Tensor:
        """Log-probabilities [B, T] under the policy at the start of the batch."""
        result_BT = torch.zeros_like(batch.behaviour_BT)
        # Sequences of similar length together: less padding to compute.
        for rows in batch.lengths_B.argsort().split(self._config.training.microbatch_sequences):
            logprobs_BT = self._logprobs(batch.select(rows))
            result_BT[rows, : logprobs_BT.shape[1]] = logprobs_BT
        return result_BT

    def _logits(self, batch: Batch, model: Any) -> torch.Tensor:
        """Logits [B, T, V] of every next token.

        Padding is on the right, where causal attention cannot see it: no mask is needed.
        """
        self._on_progress()
        logits_BTV: torch.Tensor = model(input_ids=batch.tokens_BL[:, :-1], use_cache=False).logits
        return logits_BTV

    def _logprobs(self, batch: Batch, model: Any = None) -> torch.Tensor:
        """Log-probability [B, T] of every next token at the sampling temperature."""
        return gdpo.token_logprobs(
            self._logits(batch, model or self._model),
            batch.tokens_BL[:, 1:],
            temperature=self._config.sampling.temperature,
        )

    def _logprobs_and_entropy(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        return gdpo.token_logprobs_and_entropy(
            self._logits(batch, self._model),
            batch.tokens_BL[:, 1:],
            temperature=self._config.sampling.temperature,
        )

    def _lag0_difference(self, parts: list["_Part"]) -> float | None:
        """Largest |log rho| among tokens that were sampled from exactly this version."""
        differences = [
            part.record.log_rho_BT[fresh_BT].abs().max().item()
            for part in parts
            if (fresh_BT := part.record.mask_BT & (part.versions_BT == self.version)).any()
        ]
        return max(differences, default=None)

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


def _whole_ess(parts: list[_Part]) -> float:
    """Effective sample size of a minibatch: it does not add up over its microbatches."""
    weights_N = torch.cat([part.record.weight_BT[part.record.mask_BT] for part in parts])
    if len(weights_N) == 0:
        return 1.0
    weights_1N = weights_N[None]
    return gdpo.effective_sample_size(weights_1N, torch.ones_like(weights_1N)).item()


def _add_metrics(sums: dict[str, float], metrics: dict[str, torch.Tensor], *, share: float) -> None:
    """Add a microbatch's metrics: means by its share of the sequences, maxima as maxima."""
    for name, value in metrics.items():
        if name.endswith("_max"):
            sums[name] = max(sums[name], value.item())
        elif name == "tokens":
            sums[name] += value.item()
        else:
            sums[name] += share * value.item()
