"""The work that both systems do: a model, prompts, and what a batch is made of."""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import torch
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from actors.tasks.tool_calling_tiny import TOOLS, Request, ground_truth_of, prompt_of
from actors.tasks.tool_calling_tiny import split_requests as split
from benchmarks.peers.smollm2 import smollm2

DEMO = Path(__file__).parents[2] / "examples" / "tool_calling_tiny"
REWARDS = {
    "format": "actors.tasks.tool_calling:format_reward",
    "correctness": "actors.tasks.tool_calling:correctness_reward",
}
"""The demo's reward functions, by name."""
NUM_ROWS = 1024


@dataclass(frozen=True)
class Case:
    """One model, and the work on it; the defaults are the demo's."""

    name: str
    model: str
    """Folder of the weights to start from."""
    rows: str
    """File of prompts and ground truths."""
    batches: int
    lr: float
    prompts: int = 32
    """Prompts in a batch."""
    rollouts: int = 4
    """Completions of a prompt."""
    optimizer_steps: int = 4
    """Optimiser steps on a batch."""
    max_prompt_tokens: int = 32
    max_tokens: int = 32
    """Longest completion."""
    dtype: str = "float32"
    """Type that both compute in; of bfloat16 they keep the weights in float32 besides."""

    @property
    def samples(self) -> int:
        """Completions in a batch."""
        return self.prompts * self.rollouts

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, path: Path) -> Self:
        return cls(**json.loads(path.read_text()))


def demo(folder: Path) -> Case:
    """The demo: .3 M parameters, warm-started."""
    rows = str(DEMO / "train.jsonl")
    return Case("demo, .3 M", str(DEMO / "base"), rows, batches=100, lr=3e-4)


def medium(folder: Path) -> Case:
    """The demo's prompts to random weights of 25 million parameters."""
    model = folder / "model"
    make_model(model, hidden_size=512, intermediate_size=1408, num_hidden_layers=9)
    rows = str(DEMO / "train.jsonl")
    return Case("Qwen2, 25 M", str(model), rows, batches=10, lr=1e-5, dtype="bfloat16")


def small_instruct(folder: Path) -> Case:
    """A real instruct model, told in words what the demo's policy knows."""
    rows = folder / "rows.jsonl"
    requests, _ = split(seed=0)
    rows.write_text("".join(json.dumps(instruct_row(r)) + "\n" for r in requests[:NUM_ROWS]))
    return Case(
        "SmolLM2-135M",
        str(smollm2()),
        str(rows),
        batches=4,
        lr=1e-6,
        prompts=4,
        rollouts=8,
        max_prompt_tokens=256,
        max_tokens=48,
        dtype="bfloat16",
    )


CASES: dict[str, Callable[[Path], Case]] = {
    "demo": demo,
    "25m": medium,
    "smollm2": small_instruct,
}
"""What makes each case, in an empty folder, by the name on the command line."""


def instruct_row(request: Request) -> dict[str, Any]:
    """A row of which the prompt is a chat that explains tools and format."""
    tools = "; ".join(f"{tool}({', '.join(keys)})" for tool, keys in TOOLS.items())
    text = (
        f"You can call these tools: {tools}.\n"
        "Think first, then make the calls, one JSON object a line:\n"
        "<think>one</think>\n<tool_call>\n"
        '{"name": "weather", "parameters": {"city": "lima", "day": "monday"}}\n'
        "</tool_call>\n"
        f"Now: {prompt_of(request).removesuffix(' =>')}"
    )
    prompt = [{"role": "user", "content": text}]
    return {"prompt": prompt, "ground_truth": ground_truth_of(request)}


def make_model(folder: Path, **shape: Any) -> None:
    """Write a Qwen2 with random weights that are the same every time, and the demo's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "base")
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        num_attention_heads=shape["hidden_size"] // 64,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        **shape,
    )
    torch.manual_seed(0)
    Qwen2ForCausalLM(config).save_pretrained(folder)
    for path in (DEMO / "base").glob("tokenizer*"):
        shutil.copy(path, folder)
