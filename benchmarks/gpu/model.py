"""Models of random weights in the shapes of Qwen2.5, and one optimiser step of them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from benchmarks.gpu.attention import use
from learner.config.training import OptimizerConfig
from learner.packing.forward import Forward, Way
from learner.packing.rows import Rows
from learner.packing.trees import TokenTree
from learner.training.memory import prepare_layers
from learner.training.optimizers import PolicyOptimizer

VOCABULARY = 151_936
SHAPES: dict[str, dict[str, Any]] = {
    "1.5B": {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
    },
    "0.5B": {
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
    },
}
TINY: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
TINY_VOCABULARY = 100
PADDED = "padded"
"""Attention as transformers does it, for padded rows."""
PEAK_TFLOPS = (
    ("H100 PCIe", 756),
    ("H100", 989),
    ("H200", 989),
    ("GH200", 989),
    ("B200", 2250),
    ("A100", 312),
    ("L40S", 362),
    ("L4", 121),
    ("A10", 125),
)
"""Of dense bfloat16 products, as the makers say."""


def place(dry: bool) -> tuple[torch.device, torch.dtype]:
    """Return where to compute, and in what."""
    return (torch.device("cpu"), torch.float32) if dry else (torch.device("cuda"), torch.bfloat16)


class Learner:
    """A model in bfloat16, computed and updated by the learner's own parts."""

    def __init__(self, shape: str, attention: str, *, dry: bool) -> None:
        device, dtype = place(dry)
        self.config = Qwen2Config(
            **(TINY if dry else SHAPES[shape]),
            vocab_size=TINY_VOCABULARY if dry else VOCABULARY,
            max_position_embeddings=32_768,
            tie_word_embeddings=True,
        )
        packed = attention != PADDED
        self.config._attn_implementation = use(attention)[0] if packed else "sdpa"
        torch.manual_seed(0)
        with device:
            model: Any = Qwen2ForCausalLM(self.config)
        self.model = model.to(dtype).eval()
        self._device = device
        self._forward = Forward(Way(packed=packed, fused_head=True), temperature=1.0)
        self._optimizer = PolicyOptimizer(self.model, OptimizerConfig(lr=1e-6))

    def recompute(self) -> None:
        """Keep no activations from here on but those between layers."""
        prepare_layers(self.model, checkpointed=True, compiled=False)

    def rows(self, trees: Sequence[TokenTree]) -> Rows:
        """Lay out trees as the input of one pass."""
        return self._forward.rows(trees, self._device)

    def logprobs(self, rows: Rows) -> Tensor:
        """Log-probabilities [N] of what is sampled."""
        return self._forward.logprobs(self.model, rows)

    def update(self) -> None:
        """Take an optimiser step with the gradients that are there, and forget them."""
        self._optimizer.clip()
        self._optimizer.step()
        self.forget()

    def forget(self) -> None:
        """Release the gradients."""
        self._optimizer.zero_grad()

    def flops(self, trees: Sequence[TokenTree]) -> float:
        """Of forward and backward: 6 for a weight and a token, 12 for a pair, a head and a number.

        What is computed twice counts once.
        """
        config: Any = self.config
        weights = sum(p.numel() for p in self.model.model.layers.parameters())
        tokens = sum(tree.num_tokens for tree in trees)
        pairs = sum(tree.num_pairs for tree in trees)
        sampled = sum(
            int(segment.sampled.sum())
            for tree in trees
            for segment in tree.segments
            if segment.sampled is not None
        )
        attention = config.num_hidden_layers * config.hidden_size * pairs
        head = config.hidden_size * config.vocab_size * sampled
        return float(6 * weights * tokens + 12 * attention + 6 * head)


def peak_tflops() -> float | None:
    """Return what this GPU could do at most; None if it is not known."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return next((float(peak) for part, peak in PEAK_TFLOPS if part in name), None)
