"""Models of random weights in the shapes of Qwen2.5, and one optimiser step of them.

Shapes: T tokens that are predicted.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import Qwen2Config, Qwen2ForCausalLM

from benchmarks.gpu.attention import register
from benchmarks.gpu.rows import Row

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
HEAD_ROWS = 1024
"""Predicted tokens of which there are logits at the same time."""
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
    """A model in bfloat16, with master weights in float32 and AdamW."""

    def __init__(self, shape: str, attention: str, *, dry: bool) -> None:
        device, dtype = place(dry)
        config = Qwen2Config(
            **(TINY if dry else SHAPES[shape]),
            vocab_size=TINY_VOCABULARY if dry else VOCABULARY,
            max_position_embeddings=32_768,
            tie_word_embeddings=True,
        )
        config._attn_implementation = "sdpa" if attention == PADDED else register(attention)
        torch.manual_seed(0)
        with device:
            model: Any = Qwen2ForCausalLM(config)
        self.model = model.to(dtype)
        self.model.train()
        self.config = config
        self._parameters = list(self.model.parameters())
        self._masters = [p.detach().float().clone() for p in self._parameters]
        self._optimizer = torch.optim.AdamW(self._masters, lr=1e-6, fused=not dry)

    def recompute(self) -> None:
        """Keep no activations from here on but those between layers."""
        self.model.gradient_checkpointing_enable({"use_reentrant": False})

    def logprobs(self, row: Row) -> Tensor:
        """[T] of a packed row."""
        hidden = self.model.model(
            input_ids=row.tokens_N[None],
            position_ids=row.positions_N[None],
            use_cache=False,
            row=row,
        ).last_hidden_state[0]
        return self.head(hidden[row.source_T], row.target_T)

    def head(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """[T], without the logits of more than `HEAD_ROWS` tokens at a time."""
        weight = self.model.lm_head.weight
        chunks = zip(hidden.split(HEAD_ROWS), targets.split(HEAD_ROWS), strict=True)
        return torch.cat(
            [checkpoint(_logprobs, h, weight, t, use_reentrant=False) for h, t in chunks]
        )

    def update(self) -> None:
        """Take an optimiser step with the gradients that are there, and forget them."""
        for master, parameter in zip(self._masters, self._parameters, strict=True):
            assert parameter.grad is not None
            master.grad = parameter.grad.float()
            parameter.grad = None
        self._optimizer.step()
        for master, parameter in zip(self._masters, self._parameters, strict=True):
            parameter.data.copy_(master)
        self._optimizer.zero_grad(set_to_none=True)

    def flops(self, row: Row) -> float:
        """Of forward and backward: 6 for a weight and a token, 12 for a pair, a head and a number.

        What is computed twice counts once.
        """
        config: Any = self.config
        weights = sum(p.numel() for p in self.model.model.layers.parameters())
        attention = config.num_hidden_layers * config.hidden_size * row.num_pairs
        head = config.hidden_size * config.vocab_size * len(row.target_T)
        return float(6 * weights * len(row.tokens_N) + 12 * attention + 6 * head)


def _logprobs(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logits = (hidden @ weight.T).float()
    return logits.gather(-1, targets[:, None])[:, 0] - logits.logsumexp(-1)


def peak_tflops() -> float | None:
    """Return what this GPU could do at most; None if it is not known."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return next((float(peak) for part, peak in PEAK_TFLOPS if part in name), None)
