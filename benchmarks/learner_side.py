"""One side of the comparison, in a process of its own: prints a line of JSON.

It is run by its path, so that the packages of another version may be imported: PYTHONPATH says
which. So nothing of this repository may be imported but what every version has.
"""

import importlib
import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import Qwen2Config, Qwen2ForCausalLM

REWARDS = ("format", "correctness")
OLD_MICROBATCH_BYTES = 4e9
"""What logits and their gradient may take in the earlier version, whose microbatches are counts."""


def main() -> None:
    side, threads, work = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
    torch.set_num_threads(threads)
    model = make_model(work)
    batches = make_groups(work, seed=1), make_groups(work, seed=2)
    step, tokens = SIDES[side](model, work)
    # The first makes the optimiser's state and everything that is made once.
    step(make_groups(work | {"groups": 1, "rollouts": 2, "completion": 8}, seed=0))
    before = peak()
    computed = tokens(batches[0])
    times = []
    for groups in batches[: 1 + (len(sys.argv) > 4)]:
        started = time.perf_counter()
        step(groups)
        times.append(time.perf_counter() - started)
    print(json.dumps({"seconds": min(times), "tokens": computed, "bytes": peak() - before}))


def peak() -> int:
    """Most bytes that this process ever had in memory."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def make_model(work: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=work["vocab_size"],
        hidden_size=work["hidden"],
        intermediate_size=3 * work["hidden"],
        num_hidden_layers=work["layers"],
        num_attention_heads=work["hidden"] // 64,
        num_key_value_heads=2,
        max_position_embeddings=32_768,
        tie_word_embeddings=True,
    )
    return Qwen2ForCausalLM(config).eval()


def lengths_of(work: dict[str, Any], random: np.random.Generator) -> Any:
    sizes = random.lognormal(np.log(work["completion"]), 0.5, (work["groups"], work["rollouts"]))
    return np.clip(sizes, 1, 4 * work["completion"]).astype(int)


def make_groups(work: dict[str, Any], seed: int) -> list[Any]:
    """Groups of random tokens and scores, with log-probabilities near those of the model."""
    groups: Any = importlib.import_module("protocol.groups")
    random = np.random.default_rng(seed)
    uniform = -float(np.log(work["vocab_size"]))

    def ids(number: int) -> Any:
        return random.integers(0, work["vocab_size"], number, dtype=np.int32)

    def rollout(length: int) -> Any:
        logprobs = (uniform + 0.1 * random.standard_normal(length)).astype(np.float32)
        return groups.Rollout(ids(length), logprobs, ((0, 0),), "stop")

    return [
        groups.Group(
            lease=index,
            prompt_tokens=ids(work["prompt"]),
            rollouts=tuple(rollout(int(length)) for length in row),
            reward_names=REWARDS,
            scores=random.random((len(row), 2), dtype=np.float32),
        )
        for index, row in enumerate(lengths_of(work, random))
    ]


# --- sides ---------------------------------------------------------------------------------------

Side = tuple[Callable[[list[Any]], object], Callable[[list[Any]], int]]
"""A step on groups, and the tokens that it computes, prompts and padding included."""


def ours(model: Any, work: dict[str, Any]) -> Side:
    from learner.config.run import RunConfig
    from learner.training.policy import Policy
    from learner.training.reward_settings import RewardSetting
    from learner.training.trainer import Trainer

    config = RunConfig.model_validate(
        settings(work) | {"training": {"batch_groups": work["groups"], "minibatches": 1}}
    )
    trainer = Trainer(Policy(model, Path(), {}, "", []), config)
    setting = RewardSetting(dict.fromkeys(REWARDS, 1.0), dict.fromkeys(REWARDS))
    return lambda groups: trainer.step(groups, setting), distinct


def earlier(model: Any, work: dict[str, Any]) -> Side:
    """Of the version that is on PYTHONPATH."""
    config_module, policy_module, settings_module, trainer_module = (
        importlib.import_module(f"learner.{name}")
        for name in ("config", "policy", "reward_settings", "trainer")
    )
    longest = work["prompt"] + 4 * work["completion"]
    rows = max(1, int(OLD_MICROBATCH_BYTES / (12 * longest * work["vocab_size"])))
    section = {
        "batch_groups": work["groups"],
        "minibatches": 1,
        "microbatch_sequences": rows,
    }
    config = config_module.RunConfig.model_validate(settings(work) | {"learner": section})
    trainer = trainer_module.Trainer(policy_module.Policy(model, Path(), {}, "", []), config)
    setting = settings_module.RewardSetting(dict.fromkeys(REWARDS, 1.0), dict.fromkeys(REWARDS))

    def tokens(groups: list[Any]) -> int:
        """Of the pass with a gradient, where rows are in random order, and the one before it."""
        lengths = [len(g.prompt_tokens) + len(r.tokens) for g in groups for r in g.rollouts]
        order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(0)).tolist()
        shuffled, ordered = [lengths[i] for i in order], sorted(lengths)

        def padded(rows_of: list[int]) -> int:
            parts = [rows_of[i : i + rows] for i in range(0, len(rows_of), rows)]
            return sum(len(part) * max(part) for part in parts)

        return padded(shuffled) + padded(ordered)

    return lambda groups: trainer.step(groups, setting), tokens


def bare(model: Any, work: dict[str, Any]) -> Side:
    """The model itself on rows of the distinct tokens, as in pretraining, and AdamW.

    A group is a row, cut where it is longer than a prompt and a completion, so that attention has
    about as much to do; logits are made and used in chunks of the tokens that are trained.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)

    def step(groups: list[Any]) -> None:
        optimizer.zero_grad(set_to_none=True)
        total = sum(group.num_tokens for group in groups)
        for group in groups:
            ids = np.concatenate([group.prompt_tokens, *(r.tokens for r in group.rollouts)])
            row = torch.from_numpy(ids).long()[None]
            trained = row.shape[1] - len(group.prompt_tokens)
            for part in row.split(work["prompt"] + work["completion"], dim=1):
                hidden = model.model(input_ids=part, use_cache=False).last_hidden_state[0]
                share = max(1, round(part.shape[1] * trained / row.shape[1]))
                hidden, targets = hidden[-share:], part[0, -share:]
                logits = F.linear(hidden, model.lm_head.weight)
                (F.cross_entropy(logits, targets, reduction="sum") / total).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step, distinct


def distinct(groups: list[Any]) -> int:
    return sum(len(group.prompt_tokens) + group.num_tokens for group in groups)


def settings(work: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": "bench",
        "model": {"path": "nowhere", "dtype": "float32"},
        "data": {"train": "nowhere"},
        "rewards": [{"name": name, "function": f"tasks:{name}"} for name in REWARDS],
        "sampling": {
            "num_rollouts": work["rollouts"],
            "max_tokens": 4 * work["completion"],
            "max_prompt_tokens": work["prompt"],
        },
    }


SIDES: dict[str, Callable[[Any, dict[str, Any]], Side]] = {
    "ours": ours,
    "earlier": earlier,
    "bare": bare,
}

if __name__ == "__main__":
    main()
