"""Makes what the miniature needs: a policy to start from, prompts to train and to judge on.

The base policy is warm-started by supervised steps on noisy demonstrations, so that it writes
the right format now and then and gets some of the calls right. Writes `base/` (a Qwen2 of 283
thousand parameters with its tokenizer), `train.jsonl` and `heldout.jsonl`, the same bytes for the
same seed, in about a minute on one core.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from actors.tasks.tool_calling import correctness_reward, format_reward
from actors.tasks.tool_calling_tiny import (
    EOS,
    Noise,
    Request,
    make_rows,
    make_tokenizer,
    noisy_answer,
    prompt_of,
    split_requests,
)

STEPS, BATCH_SIZE, LEARNING_RATE = 400, 64, 2e-3
NUM_TRAIN, NUM_HELDOUT = 1024, 256
SAMPLES_PER_PROMPT = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # more threads add in another order, and are slower at this size

    train, heldout = split_requests(arguments.seed)
    arguments.out.mkdir(parents=True, exist_ok=True)
    heldout_rows = make_rows(heldout, NUM_HELDOUT, arguments.seed)
    write_jsonl(arguments.out / "train.jsonl", make_rows(train, NUM_TRAIN, arguments.seed))
    write_jsonl(arguments.out / "heldout.jsonl", heldout_rows)
    save_policy(warm_start(train, arguments.seed), arguments.out / "base")
    report(arguments.out / "base", heldout_rows, arguments.seed)


def write_jsonl(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def warm_start(requests: list[Request], seed: int) -> Qwen2ForCausalLM:
    """A new policy after `STEPS` supervised steps on fresh noisy demonstrations."""
    rng = random.Random(seed)
    tokenizer = make_tokenizer()
    with seeded(seed):
        model = Qwen2ForCausalLM(architecture(tokenizer))
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, STEPS)
    singles = [request for request in requests if len(request) == 1]
    pairs = [request for request in requests if len(request) == 2]
    for step in range(1, STEPS + 1):
        batch = [rng.choice(rng.choice((singles, pairs))) for _ in range(BATCH_SIZE)]
        loss = model(**demonstrations(batch, tokenizer, rng)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            print(f"step {step:4d}  loss {loss.item():.3f}", flush=True)
    return model


def architecture(tokenizer: PreTrainedTokenizerFast) -> Qwen2Config:
    return Qwen2Config(
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=3,
        num_key_value_heads=3,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        architectures=["Qwen2ForCausalLM"],
        dtype="float32",
    )


def demonstrations(
    requests: list[Request], tokenizer: PreTrainedTokenizerFast, rng: random.Random
) -> dict[str, torch.Tensor]:
    """A padded batch of [B, T] tensors in which only the answers, with their end, are predicted."""
    rows = []
    for request in requests:
        prompt = tokenizer(prompt_of(request))["input_ids"]
        answer = tokenizer(noisy_answer(request, Noise(), rng) + EOS)["input_ids"]
        rows.append((prompt, answer))
    width = max(len(prompt) + len(answer) for prompt, answer in rows)

    def padded(sequences: list[list[int]], filler: int) -> torch.Tensor:
        return torch.tensor([ids + [filler] * (width - len(ids)) for ids in sequences])

    return {
        "input_ids": padded([p + a for p, a in rows], tokenizer.pad_token_id),
        "attention_mask": padded([[1] * len(p + a) for p, a in rows], 0),
        "labels": padded([[-100] * len(p) + a for p, a in rows], -100),
    }


def save_policy(model: Qwen2ForCausalLM, folder: Path) -> None:
    """Write a folder that `from_pretrained` reads.

    It is float16 on disk for its size and float32 by its configuration, because small optimiser
    steps are lost in half precision.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(folder)
    model.config.save_pretrained(folder)
    GenerationConfig(
        do_sample=True,
        top_k=0,  # the default of 50 would cut off 5 of the 55 tokens
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    ).save_pretrained(folder)
    weights = {name: weight.half() for name, weight in model.state_dict().items()}
    del weights["lm_head.weight"]  # the embedding once more
    (folder / "model.safetensors").write_bytes(save(weights, metadata={"format": "pt"}))


def report(folder: Path, rows: list[dict[str, str]], seed: int) -> None:
    """Prints how well the saved policy does on the given prompts, sampled at temperature 1."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer([row["prompt"] for row in rows], padding=True, return_tensors="pt")
    with seeded(seed):
        ids = model.generate(**inputs, max_new_tokens=32, num_return_sequences=SAMPLES_PER_PROMPT)
    new_ids = ids[:, inputs["input_ids"].shape[1] :]
    answers = tokenizer.batch_decode(new_ids, skip_special_tokens=True)
    truths = [row["ground_truth"] for row in rows for _ in range(SAMPLES_PER_PROMPT)]
    unused: list[Any] = [None] * len(answers)
    for name, reward in (("format", format_reward), ("correctness", correctness_reward)):
        scores = torch.tensor(reward(unused, answers, unused, ground_truth=truths))
        error = scores.std() / len(scores) ** 0.5
        print(f"{name:12} {scores.mean():+.3f} +- {error:.3f}, {len(scores)} held-out samples")


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seeds torch's global generator for a while, for code that takes no generator."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


if __name__ == "__main__":
    main()
