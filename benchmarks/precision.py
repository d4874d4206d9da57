"""What the type of the weights makes of training at a small learning rate.

    .venv-peers/bin/python -m benchmarks.precision [--steps 20] [--lr 1e-6] [--threads 2]

SmolLM2-135M-Instruct, as `make bench-peers` fetches it, samples 4 groups of 4 short completions, to
which random scores are given. Three trainers train on this one batch again and again, a step being
one optimiser step: in float32; in bfloat16 with float32 master weights; and in bfloat16 without
them, optimiser and all. The columns:

"optimised" is the share of the optimiser's weights that differ from the first ones, and "model"
that of the weights that the model computes with and actors get. "kept" is the part of float32's
update that is found along its direction, d * d32 / (d32 * d32), of either. The change of
log-probability is the mean over the batch's tokens of its size, computed in float32 from the
weights that the model computes with, so that no rounding of activations is in it. "loss" is the
trainer's own.
"""

import argparse
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from actors.engines.batch_generator import BatchGenerator
from actors.engines.engine import Request
from benchmarks.peers.smollm2 import smollm2
from learner.config.run import RunConfig
from learner.packing.choice import choose
from learner.packing.forward import Forward
from learner.packing.trees import tree_of
from learner.training.masters import PREFIX
from learner.training.policy import Policy
from learner.training.reward_settings import RewardSetting
from learner.training.trainer import Trainer
from protocol.groups import Group

KINDS = {
    "float32": ("float32", True),
    "bfloat16, masters": ("bfloat16", True),
    "bfloat16 as it was": ("bfloat16", False),
}
"""The model's type, and `optimizer.master_weights`."""
REWARDS = ("format", "correctness")
QUESTIONS = (
    "What is 3 + 4?",
    "Name a river in France.",
    "Which colour has the sky?",
    "Say hello in Spanish.",
)
NUM_ROLLOUTS, MAX_TOKENS, MAX_PROMPT_TOKENS = 4, 24, 64
MEASURED_STEPS = (1, 2, 5, 10, 15, 20)

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Point:
    """After a step."""

    step: int
    loss: float
    change: float
    """Mean size of the change of log-probability."""


@dataclass
class Run:
    """Of one kind."""

    points: list[Point] = field(default_factory=list)
    optimised: Weights = field(default_factory=dict)
    """The optimiser's weights after the last step less those before the first."""
    model: Weights = field(default_factory=dict)
    """Likewise, those that the model computes with."""
    step_s: float = 0.0


def make_config(folder: Path, kind: str, lr: float, steps: int) -> RunConfig:
    dtype, master_weights = KINDS[kind]
    return RunConfig.model_validate(
        {
            "name": "bench",
            "model": {"path": str(folder), "dtype": dtype, "device": "cpu"},
            "data": {"train": "nowhere"},
            "rewards": [{"name": name, "function": f"tasks:{name}"} for name in REWARDS],
            "sampling": {
                "num_rollouts": NUM_ROLLOUTS,
                "max_tokens": MAX_TOKENS,
                "max_prompt_tokens": MAX_PROMPT_TOKENS,
            },
            "training": {"steps": steps, "batch_groups": len(QUESTIONS), "minibatches": 1},
            "optimizer": {"lr": lr, "master_weights": master_weights},
        }
    )


def load(folder: Path, dtype: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()


def make_groups(model: Any, tokenizer: Any) -> list[Group]:
    """The batch, sampled by the model, with random scores."""
    random = np.random.default_rng(0)
    generator = BatchGenerator(
        model,
        eos_ids=frozenset([tokenizer.eos_token_id]),
        max_rows=len(QUESTIONS) * NUM_ROLLOUTS,
        version=0,
    )
    prompts = []
    for key, question in enumerate(QUESTIONS):
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
        )
        prompts.append(tokenizer(text, add_special_tokens=False)["input_ids"])
        generator.add(key, Request(tuple(prompts[key]), NUM_ROLLOUTS, 1.0, MAX_TOKENS, key))
    groups = []
    while generator.busy:
        for key, rollouts in generator.step()[1]:
            groups.append(
                Group(
                    lease=key,
                    prompt_tokens=np.array(prompts[key], dtype=np.int32),
                    rollouts=tuple(rollouts),
                    reward_names=REWARDS,
                    scores=random.random((NUM_ROLLOUTS, len(REWARDS)), dtype=np.float32),
                )
            )
    return sorted(groups, key=lambda group: group.lease)


class Judge:
    """Computes log-probabilities of the batch in float32, whatever weights it is given."""

    def __init__(self, folder: Path, groups: list[Group]) -> None:
        self._model = load(folder, "float32")
        longest = MAX_PROMPT_TOKENS + MAX_TOKENS
        self._forward = Forward(choose(self._model, longest), temperature=1.0)
        trees = [tree_of(group, i * NUM_ROLLOUTS) for i, group in enumerate(groups)]
        self._rows = self._forward.rows(trees, torch.device("cpu"))

    @torch.no_grad()
    def logprobs(self, model: Any) -> Tensor:
        weights = dict(model.named_parameters())
        for name, parameter in self._model.named_parameters():
            parameter.copy_(weights[name])
        return self._forward.logprobs(self._model, self._rows)


def weights_of(trainer: Trainer, model: Any) -> tuple[Weights, Weights]:
    """Copies in float32 of the optimiser's weights, and of the model's."""
    state = trainer.state_tensors()
    model_weights = {
        name: p.detach().to(torch.float32, copy=True) for name, p in model.named_parameters()
    }
    optimised = {n: state[PREFIX + n].clone() for n in model_weights if PREFIX + n in state}
    return optimised or model_weights, model_weights


def train(config: RunConfig, folder: Path, groups: list[Group], judge: Judge) -> Run:
    model = load(folder, config.model.dtype)
    trainer = Trainer(Policy(model, folder, {}, "", []), config)
    setting = RewardSetting(dict.fromkeys(REWARDS, 1.0), dict.fromkeys(REWARDS))
    run = Run()
    first = weights_of(trainer, model)
    before_N = judge.logprobs(model)
    started, judged_s = time.perf_counter(), 0.0
    for step in range(1, config.training.steps + 1):
        loss = trainer.step(groups, setting).metrics["loss"]
        if step in MEASURED_STEPS or step == config.training.steps:
            judging = time.perf_counter()
            change = (judge.logprobs(model) - before_N).abs().mean().item()
            run.points.append(Point(step, loss, change))
            judged_s += time.perf_counter() - judging
    run.step_s = (time.perf_counter() - started - judged_s) / config.training.steps
    last = weights_of(trainer, model)
    run.optimised, run.model = (
        {name: after[name] - before[name] for name in after}
        for before, after in zip(first, last, strict=True)
    )
    return run


def moved(update: Weights) -> float:
    changed: int = sum(int(delta.count_nonzero()) for delta in update.values())
    return changed / sum(delta.numel() for delta in update.values())


def kept(update: Weights, whole: Weights) -> float:
    """Part of ``whole`` that ``update`` has along its direction."""

    def product(a: Weights, b: Weights) -> float:
        return sum(float(torch.dot(a[n].flatten(), b[n].flatten())) for n in whole)

    return product(update, whole) / product(whole, whole)


def tables(runs: dict[str, Run], lr: float) -> list[Table]:
    steps = [point.step for point in runs["float32"].points]
    weights = Table(title=f"after {steps[-1]} steps at a learning rate of {lr:.0e}")
    for column in ("", "optimised", "kept", "model", "kept", "s a step"):
        weights.add_column(column, justify="right" if column else "left")
    whole = runs["float32"].optimised
    for kind, run in runs.items():
        weights.add_row(
            kind,
            f"{moved(run.optimised):.2%}",
            f"{kept(run.optimised, whole):.2f}",
            f"{moved(run.model):.2%}",
            f"{kept(run.model, whole):.2f}",
            f"{run.step_s:.1f}",
        )
    curves = Table(title="loss before a step, and mean |change of log-probability| after it")
    curves.add_column("")
    for step in steps:
        curves.add_column(f"step {step}", justify="right")
    for kind, run in runs.items():
        curves.add_row(f"{kind}: loss", *(f"{point.loss:+.4f}" for point in run.points))
        curves.add_row(f"{kind}: change", *(f"{point.change:.5f}" for point in run.points))
    return [weights, curves]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--lr", type=float, default=1e-6)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    folder = smollm2()
    groups = make_groups(load(folder, "float32"), AutoTokenizer.from_pretrained(folder))
    judge = Judge(folder, groups)
    console = Console(width=120)
    console.print(f"{sum(group.num_tokens for group in groups)} tokens to train on")
    runs = {}
    for kind in KINDS:
        config = make_config(folder, kind, options.lr, options.steps)
        runs[kind] = train(config, folder, groups, judge)
        console.print(f"{kind}: {runs[kind].step_s:.1f} s a step", highlight=False)
    for table in tables(runs, options.lr):
        console.print(table)


if __name__ == "__main__":
    main()
