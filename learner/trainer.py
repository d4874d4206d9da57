"""The trainer: one GDPO update from one batch of groups.

Where it departs from the GDPO paper's synchronous recipe:
1. The loss corrects for stale tokens (`algorithm.correction`); the paper's is on policy.
2. The proximal policy of `decoupled_ppo` is recomputed once per batch, before its first update.
3. There is no KL term.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

import gdpo
from learner.batch import Batch, collate, scores
from learner.config import RunConfig
from learner.policy import Policy
from protocol.errors import TrainingError
from protocol.groups import Group


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
    mean_tokens: float
    """Mean length of the completions."""
    lag0_difference: float | None
    """Largest difference between the actors' and the trainer's log-probability of a token that
    was sampled from exactly the trainer's version; None if there was no such token."""


class Trainer:
    """Owns the optimiser and the policy version."""

    def __init__(
        self,
        policy: Policy,
        config: RunConfig,
        *,
        on_progress: Callable[[], None] = lambda: None,
    ) -> None:
        self._on_progress = on_progress
        self._model = policy.model
        self._config = config
        self._device = next(self._model.parameters()).device
        self._optimizer = torch.optim.AdamW(
            self._model.parameters(),
            lr=config.learner.lr,
            betas=config.learner.betas,
            weight_decay=config.learner.weight_decay,
        )
        self._random = torch.Generator().manual_seed(config.seed)
        self._names = [reward.name for reward in config.rewards]
        self._weights = [reward.weight for reward in config.rewards]
        self._conditions = [
            gdpo.Condition(index, self._names.index(r.when.reward), r.when.at_least)
            for index, r in enumerate(config.rewards)
            if r.when
        ]
        self.version = 0

    def step(self, groups: list[Group]) -> StepResult:
        """Train on a batch; raises `TrainingError` when loss or gradient is not finite."""
        scores_PGK = scores(groups)
        advantages = gdpo.compute_advantages(
            scores_PGK,
            estimator=self._config.algorithm.estimator,
            weights=self._weights,
            eps=self._config.algorithm.advantage_eps,
            conditions=self._conditions,
        )
        batch = collate(groups, self._device)
        advantages_B = advantages.advantages.flatten().to(self._device)
        staleness = [self.version - group.oldest_version for group in groups]
        metrics, difference = self._update(batch, advantages_B)
        self.version += 1
        metrics |= gdpo.reward_diagnostics(scores_PGK, advantages, self._names)
        num_tokens = sum(group.num_tokens for group in groups)
        return StepResult(
            version=self.version,
            num_tokens=num_tokens,
            staleness=staleness,
            metrics=metrics,
            rewards={name: metrics[f"reward/{name}/mean"] for name in self._names},
            mean_tokens=num_tokens / len(batch.tokens_BL),
            lag0_difference=difference,
        )

    def _update(
        self, batch: Batch, advantages_B: torch.Tensor
    ) -> tuple[dict[str, float], float | None]:
        """All optimiser steps of one batch."""
        proximal_BT = None
        if self._config.algorithm.correction != "ppo":
            proximal_BT = self._proximal_logprobs(batch)
        history: dict[str, list[float]] = defaultdict(list)
        differences: list[float] = []
        order = torch.randperm(len(advantages_B), generator=self._random).to(self._device)
        for index, rows in enumerate(order.tensor_split(self._config.learner.minibatches)):
            self._set_lr(index)
            measure = differences if index == 0 else None
            for name, value in self._minibatch(
                batch, advantages_B, proximal_BT, rows, measure
            ).items():
                history[name].append(value)
        metrics = {
            name: max(values) if name.endswith("_max") else sum(values) / len(values)
            for name, values in history.items()
        }
        return metrics, max(differences, default=None)

    def _minibatch(
        self,
        batch: Batch,
        advantages_B: torch.Tensor,
        proximal_BT: torch.Tensor | None,
        rows: torch.Tensor,
        differences: list[float] | None,
    ) -> dict[str, float]:
        """One optimiser step, its gradient summed over microbatches that fit into memory.

        ``differences`` collects the log-probability differences at lag 0: only before the
        batch's first update is the trainer's policy exactly its version.
        """
        algorithm = self._config.algorithm
        denominator = gdpo.loss_denominator(
            batch.mask_BT[rows],
            aggregation=algorithm.aggregation,
            max_length=self._config.sampling.max_tokens,
        )
        self._optimizer.zero_grad(set_to_none=True)
        sums: dict[str, float] = defaultdict(float)
        for micro_rows in rows.split(self._config.learner.microbatch_sequences):
            part = batch.select(micro_rows)
            length = part.mask_BT.shape[1]
            logprobs_BT = self._logprobs(part)
            loss = gdpo.policy_loss(
                logprobs_BT,
                advantages_B[micro_rows],
                part.mask_BT,
                behaviour_logprobs=part.behaviour_BT,
                proximal_logprobs=(
                    None if proximal_BT is None else proximal_BT[micro_rows, :length]
                ),
                correction=algorithm.correction,
                aggregation=algorithm.aggregation,
                clip_low=algorithm.clip_low,
                clip_high=algorithm.clip_high,
                weight_cap=algorithm.weight_cap,
                max_length=self._config.sampling.max_tokens,
                denominator=denominator,
            )
            loss.loss.backward()  # type: ignore[no-untyped-call]
            sums["loss"] += loss.loss.item()
            _add_metrics(sums, loss.metrics, share=len(micro_rows) / len(rows))
            if differences is not None:
                differences += self._lag0_differences(part, logprobs_BT.detach())
        sums["grad_norm"] = self._apply(sums["loss"])
        return dict(sums)

    def _apply(self, loss: float) -> float:
        """Clip the gradient and step; returns its norm before clipping."""
        norm = torch.nn.utils.clip_grad_norm_(
            self._model.parameters(), self._config.learner.max_grad_norm
        ).item()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise TrainingError(
                f"step {self.version + 1}: loss {loss}, gradient norm {norm}; the weights before "
                "it are saved. Lower learner.lr, or look for a reward of extreme size"
            )
        self._optimizer.step()
        return norm

    @torch.no_grad()
    def _proximal_logprobs(self, batch: Batch) -> torch.Tensor:
        """Log-probabilities [B, T] under the policy at the start of the batch."""
        result_BT = torch.zeros_like(batch.behaviour_BT)
        # Sequences of similar length together: less padding to compute.
        for rows in batch.lengths_B.argsort().split(self._config.learner.microbatch_sequences):
            logprobs_BT = self._logprobs(batch.select(rows))
            result_BT[rows, : logprobs_BT.shape[1]] = logprobs_BT
        return result_BT

    def _logprobs(self, batch: Batch) -> torch.Tensor:
        """Log-probability [B, T] of every next token at the sampling temperature.

        Padding is on the right, where causal attention cannot see it: no mask is needed.
        """
        self._on_progress()
        logits_BTV = self._model(input_ids=batch.tokens_BL[:, :-1], use_cache=False).logits
        return gdpo.token_logprobs(
            logits_BTV, batch.tokens_BL[:, 1:], temperature=self._config.sampling.temperature
        )

    def _lag0_differences(self, batch: Batch, logprobs_BT: torch.Tensor) -> Iterator[float]:
        fresh_BT = batch.mask_BT & (batch.versions_BT == self.version)
        if fresh_BT.any():
            yield (logprobs_BT - batch.behaviour_BT)[fresh_BT].abs().max().item()

    def _set_lr(self, minibatch: int) -> None:
        config = self._config.learner
        factor = lr_factor(
            self.version * config.minibatches + minibatch,
            warmup=config.warmup_steps * config.minibatches,
            total=config.steps * config.minibatches,
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


def _add_metrics(sums: dict[str, float], metrics: dict[str, torch.Tensor], *, share: float) -> None:
    """Add a microbatch's metrics: means by its share of the sequences, maxima as maxima."""
    for name, value in metrics.items():
        if name.endswith("_max"):
            sums[name] = max(sums[name], value.item())
        elif name == "tokens":
            sums[name] += value.item()
        else:
            sums[name] += share * value.item()
