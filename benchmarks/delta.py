"""Sending what a training step changed, against sending all weights: bytes, time, and the result.

    python -m benchmarks.delta [--params 30e6] [--warm-up 5] [--repeats 5]

A random model of so many parameters (Qwen3, standard deviation 0.02) samples groups with random
scores and trains on them: some steps of one AdamW update each, so that the optimiser has moments,
then the step that is measured. Its packed weights before and after are cut into chunks and encoded
as the learner does (`protocol.chunk_codec`), one after the other on one thread. "changed" counts
weights; percentages are of the bytes of all weights. "copy" writes every chunk whole and plain, the
yardstick for "apply" in the same run. "pays below" is the speed of the link in Gbit/s at which one
actor has the delta (encoded, sent, applied, one after the other) just as soon as a plain copy; on
slower links the delta is faster, and several actors share one encoding. "equal" compares all bytes.

Weights trained in bfloat16 lose every update that is below half a unit in their last place, at
1e-6 nearly all of them: few weights change because few learn. In float32 nearly every weight moves,
which leaves a delta little to gain.
"""

import argparse
import math
import platform
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
import zstandard
from rich.console import Console
from rich.table import Table
from transformers import Qwen3Config, Qwen3ForCausalLM

from actors.engines.batch_generator import BatchGenerator
from actors.engines.engine import Request
from learner.config.run import RunConfig
from learner.training.policy import Policy
from learner.training.reward_settings import RewardSetting
from learner.training.trainer import Trainer
from learner.weights.pack import MemoryPool, pack
from protocol.chunk_codec import apply_patches, decode_full, encode_full, encode_patch
from protocol.groups import Group
from protocol.weights import CHUNK_BYTES, DTYPE_BYTES, layout, total_bytes

LEARNING_RATES = (1e-6, 1e-5, 1e-4)
TYPES = {"bfloat16": ("bfloat16",), "float32": ("bfloat16", "float32")}
"""Of the trained weights, and of those that actors get."""
REWARDS = ("format", "correctness")
VOCAB, LAYERS = 8192, 8
BATCH_GROUPS, NUM_ROLLOUTS = 4, 4
PROMPT_TOKENS, MAX_TOKENS = 16, 24


def make_model(num_params: float, dtype: str) -> Any:
    """A tied embedding of V x h and eight layers of 12 h^2: solve V h + 96 h^2 for h."""
    per_layer = 12 * LAYERS
    hidden = (math.sqrt(VOCAB**2 + 4 * per_layer * num_params) - VOCAB) / (2 * per_layer)
    heads = max(2, 2 * round(hidden / 128))
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=64 * heads,
        intermediate_size=3 * 64 * heads,
        num_hidden_layers=LAYERS,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        head_dim=64,
        tie_word_embeddings=True,
        initializer_range=0.02,
    )
    torch.manual_seed(0)
    return Qwen3ForCausalLM(config).to(getattr(torch, dtype)).eval()


def make_config(lr: float, dtype: str) -> RunConfig:
    return RunConfig.model_validate(
        {
            "name": "bench",
            "model": {"path": "nowhere", "dtype": dtype},
            "data": {"train": "nowhere"},
            "rewards": [{"name": name, "function": f"tasks:{name}"} for name in REWARDS],
            "sampling": {
                "num_rollouts": NUM_ROLLOUTS,
                "max_tokens": MAX_TOKENS,
                "max_prompt_tokens": PROMPT_TOKENS,
            },
            "training": {"batch_groups": BATCH_GROUPS, "minibatches": 1},
            "optimizer": {"lr": lr},
            "admission": {"self_check": False},
        }
    )


def make_groups(model: Any, version: int) -> list[Group]:
    """A batch, sampled by the model as it is now."""
    random = np.random.default_rng(version)
    generator = BatchGenerator(
        model, eos_ids=frozenset(), max_rows=BATCH_GROUPS * NUM_ROLLOUTS, version=version
    )
    prompts = random.integers(VOCAB, size=(BATCH_GROUPS, PROMPT_TOKENS), dtype=np.int32)
    for key, prompt in enumerate(prompts):
        seed = version * BATCH_GROUPS + key
        request = Request(tuple(prompt.tolist()), NUM_ROLLOUTS, 1.0, MAX_TOKENS, seed)
        generator.add(key, request)
    groups = []
    while generator.busy:
        for key, rollouts in generator.step()[1]:
            scores = random.random((NUM_ROLLOUTS, len(REWARDS)), dtype=np.float32)
            groups.append(
                Group(
                    lease=key,
                    prompt_tokens=prompts[key],
                    rollouts=tuple(rollouts),
                    reward_names=REWARDS,
                    scores=scores,
                )
            )
    return groups


def train(
    num_params: float, lr: float, dtype: str, warm_up: int
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Packed weights before and after the step that follows the warm-up, by the actors' type."""
    model = make_model(num_params, dtype)
    specs = {
        sent: layout((n, sent, tuple(p.shape)) for n, p in model.named_parameters())
        for sent in TYPES[dtype]
    }
    config = make_config(lr, dtype)
    trainer = Trainer(Policy(model, Path(), {}, "", []), config)
    setting = RewardSetting(dict.fromkeys(REWARDS, 1.0), dict.fromkeys(REWARDS))

    def step() -> None:
        trainer.step(make_groups(model, trainer.version), setting)

    def packed() -> dict[str, np.ndarray]:
        return {
            sent: pack(
                trainer.version, model, specs[sent], MemoryPool(total_bytes(specs[sent]))
            ).packed.numpy()
            for sent in specs
        }

    for _ in range(warm_up):
        step()
    before = packed()
    step()
    after = packed()
    return {sent: (before[sent], after[sent]) for sent in specs}


@dataclass(frozen=True)
class Figures:
    """Of one version, sent in one type."""

    changed: float
    full_bytes: int
    full_zstd_bytes: int
    delta_bytes: int
    full_zstd_s: float
    encode_s: float
    apply_s: float
    copy_s: float
    equal: bool

    @property
    def pays_below_gbit(self) -> float:
        """Full / speed + copy = encode + delta / speed + apply."""
        saved = self.full_bytes - self.delta_bytes
        return 8e-9 * saved / (self.encode_s + self.apply_s - self.copy_s)


def _chunks(num_bytes: int) -> list[slice]:
    return [slice(begin, begin + CHUNK_BYTES) for begin in range(0, num_bytes, CHUNK_BYTES)]


def measure(before: np.ndarray, after: np.ndarray, width: int, repeats: int) -> Figures:
    pieces = _chunks(len(after))
    # Fresh memory is slow when it is first written: both targets are there, and touched, before.
    copied, patched = np.ones_like(after), np.ones_like(after)
    patches: list[bytes] = []
    whole: list[int] = []

    def encode() -> None:
        patches[:] = [encode_patch(before[p].data, after[p].data, width) for p in pieces]

    def apply() -> None:
        for piece, patch in zip(pieces, patches, strict=True):
            apply_patches(patched[piece].data, [patch], width)

    def encode_whole() -> None:
        whole[:] = [len(encode_full(after[p].data, width, compress=True)[1]) for p in pieces]

    def copy() -> None:
        for piece in pieces:
            decode_full("raw", after[piece].data, copied[piece].data, width)

    works = (encode, apply, encode_whole, copy)
    best_s = [math.inf] * len(works)
    for _ in range(repeats):
        patched[:] = before
        # In turns, so that what disturbs the machine disturbs them alike.
        for index, work in enumerate(works):
            started = time.perf_counter()
            work()
            best_s[index] = min(best_s[index], time.perf_counter() - started)
    encode_s, apply_s, full_zstd_s, copy_s = best_s
    words = f"<u{width}"
    return Figures(
        changed=float(np.mean(before.view(words) != after.view(words))),
        full_bytes=len(after),
        full_zstd_bytes=sum(whole),
        delta_bytes=sum(map(len, patches)),
        full_zstd_s=full_zstd_s,
        encode_s=encode_s,
        apply_s=apply_s,
        copy_s=copy_s,
        equal=patched.tobytes() == after.tobytes() == copied.tobytes(),
    )


def processor() -> str:
    """Its name; on Linux `platform.processor` does not know it."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--params", type=float, default=30e6)
    parser.add_argument("--warm-up", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    table = Table(title="MB, and the best seconds of the repeats; one thread. Pays below: Gbit/s")
    table.add_column("trained, sent in")
    for column in (
        "lr",
        "changed",
        "full",
        "full zstd",
        "delta",
        "zstd s",
        "encode s",
        "apply s",
        "copy s",
        "pays below",
        "equal",
    ):
        table.add_column(column, justify="right")
    for trained in TYPES:
        rows: dict[str, list[tuple[float, Figures]]] = {sent: [] for sent in TYPES[trained]}
        for lr in LEARNING_RATES:
            versions = train(options.params, lr, trained, options.warm_up)
            for sent, (before, after) in versions.items():
                figures = measure(before, after, DTYPE_BYTES[sent], options.repeats)
                rows[sent].append((lr, figures))
        for sent, row in rows.items():
            for lr, figures in row:
                table.add_row(f"{trained}, {sent}", *_cells(lr, figures))
            table.add_section()
    console = Console(width=140)
    console.print(
        f"{processor()}; Python {platform.python_version()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}, numpy {np.__version__}, "
        f"zstandard {zstandard.__version__} (zstd {'.'.join(map(str, zstandard.ZSTD_VERSION))})",
        highlight=False,
    )
    console.print(table)


def _cells(lr: float, figures: Figures) -> list[str]:
    full = figures.full_bytes
    return [
        f"{lr:.0e}",
        f"{figures.changed:.2%}",
        f"{full / 1e6:.1f}",
        f"{figures.full_zstd_bytes / 1e6:.1f} ({figures.full_zstd_bytes / full:.0%})",
        f"{figures.delta_bytes / 1e6:.2f} ({figures.delta_bytes / full:.1%})",
        f"{figures.full_zstd_s:.3f}",
        f"{figures.encode_s:.3f}",
        f"{figures.apply_s:.3f}",
        f"{figures.copy_s:.3f}",
        f"{figures.pays_below_gbit:.1f}",
        "yes" if figures.equal else "NO",
    ]


if __name__ == "__main__":
    main()
