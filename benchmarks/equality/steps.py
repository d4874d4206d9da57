"""Five steps of the learner's trainer, in several splits and beside a textbook's loop."""

from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import gdpo
from benchmarks.equality.data import COMPLETIONS, LONGEST, PROMPTS, REWARDS, ROLLOUTS, make_groups
from benchmarks.equality.families import Family, make_family
from benchmarks.equality.ways import EXACT, TEMPERATURE
from learner.config.run import RunConfig
from learner.training.policy import Policy
from learner.training.reward_settings import RewardSetting
from learner.training.trainer import Trainer
from protocol.groups import Group

LR = 1e-3
STEPS = 5
SPLITS = (4096, 90, 1)
"""Tokens of a pass."""


@dataclass(frozen=True, slots=True)
class Moved:
    """How far two trainings are apart, in units of the learning rate."""

    mean: float
    largest: float


@dataclass(frozen=True, slots=True)
class Steps:
    """What was found of a family."""

    textbook: Moved
    """The learner's weights beside the textbook's."""
    split_metrics: float
    """The largest difference of a metric, relative to it where it is above 1."""
    split_weights: Moved


def compare_steps(family: Family) -> Steps:
    """Train with the learner in several splits, and as a textbook would."""
    groups = make_groups(COMPLETIONS[1], seed=7)
    weights, metrics = zip(*(train(family, groups, tokens) for tokens in SPLITS), strict=True)
    return Steps(
        textbook=moved(weights[0], textbook(family, groups)),
        split_metrics=max(unlike(each, metrics[0]) for each in metrics[1:]),
        split_weights=max((moved(w, weights[0]) for w in weights[1:]), key=attrgetter("mean")),
    )


def moved(left: Tensor, right: Tensor) -> Moved:
    apart = (left - right).abs() / LR
    return Moved(apart.mean().item(), apart.max().item())


def unlike(left: dict[str, float], right: dict[str, float]) -> float:
    assert left.keys() == right.keys()
    return max(abs(left[name] - right[name]) / max(1.0, abs(right[name])) for name in right)


def train(family: Family, groups: list[Group], tokens: int) -> tuple[Tensor, dict[str, float]]:
    """The learner's own steps in passes of ``tokens``: the weights, and the metrics of all."""
    model = make_family(family)
    trainer = Trainer(Policy(model, Path(), {}, "", []), configuration(tokens))
    setting = RewardSetting(dict.fromkeys(REWARDS, 1.0), dict.fromkeys(REWARDS))
    metrics = {
        f"{step}/{name}": value
        for step in range(STEPS)
        for name, value in trainer.step(groups, setting).metrics.items()
    }
    return flat(model), metrics


def textbook(family: Family, groups: list[Group]) -> Tensor:
    """The weights after as many steps of a loop that knows nothing of rows, passes or trees."""
    model, config = make_family(family), configuration(SPLITS[0])
    model.set_attn_implementation(EXACT)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0)
    scores_PGK = torch.from_numpy(np.stack([group.scores for group in groups]))
    advantages = gdpo.compute_advantages(scores_PGK, estimator="gdpo", weights=[1.0, 1.0])
    rollouts = [(group.prompt_tokens, rollout) for group in groups for rollout in group.rollouts]
    behaviour_BT = padded([torch.from_numpy(r.logprobs) for _, r in rollouts])
    mask_BT = padded([torch.ones(len(r.tokens)) for _, r in rollouts])
    for _ in range(STEPS):
        optimizer.zero_grad()
        policy_BT = padded([sequence(model, prompt, r.tokens) for prompt, r in rollouts])
        loss = gdpo.policy_loss(
            policy_BT,
            advantages.advantages.flatten(),
            mask_BT,
            behaviour_logprobs=behaviour_BT,
            proximal_logprobs=policy_BT.detach(),
            correction=config.algorithm.make_correction(),
        )
        loss.loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.max_grad_norm)
        optimizer.step()
    return flat(model)


def sequence(model: Any, prompt: Any, completion: Any) -> Tensor:
    """Log-probabilities of a completion's tokens by the model itself."""
    ids = torch.from_numpy(np.concatenate([prompt, completion])).long()
    logits = model(input_ids=ids[None], use_cache=False).logits[0, len(prompt) - 1 : -1]
    logprobs: Tensor = (logits.float() / TEMPERATURE).log_softmax(-1)
    return logprobs.gather(-1, ids[len(prompt) :, None])[:, 0]


def padded(rows: list[Tensor]) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def flat(model: Any) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def configuration(tokens: int) -> RunConfig:
    return RunConfig.model_validate(
        {
            "name": "equality",
            "model": {"path": "nowhere", "dtype": "float32"},
            "data": {"train": "nowhere"},
            "rewards": [{"name": name, "function": f"tasks:{name}"} for name in REWARDS],
            "sampling": {
                "num_rollouts": ROLLOUTS,
                "temperature": TEMPERATURE,
                "max_prompt_tokens": max(PROMPTS),
                "max_tokens": LONGEST - max(PROMPTS),
            },
            "training": {
                "batch_groups": len(PROMPTS),
                "minibatches": 1,
                "microbatch_tokens": tokens,
            },
            "optimizer": {"lr": LR},
        }
    )
