"""How many tokens fit into a forward and backward pass, from what one is seen to keep."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from learner.packing.forward import Forward
from learner.packing.probe import probe
from learner.packing.trees import TokenTree

_LARGEST = 65_536
_SMALLEST = 256
_QUICK = {"cpu": 1024}
"""Tokens of which the activations are still in a CPU's caches."""
_WORTH_A_CUT = 1.15
"""How much more may be computed so that passes are quick: beyond their caches, CPUs take as much
longer for a token (`benchmarks/learner.py`)."""
_SHARE_OF_MEMORY = 0.25
"""The share of a machine's memory: actors and others have the rest."""
_SHARE_OF_FREE = 0.8
_BACKWARD = 1.25
"""What the backward pass takes beside what the forward pass kept."""


@dataclass(frozen=True, slots=True)
class Budget:
    """Tokens of a pass; a sequence alone may be longer."""

    most: int
    """As many as fit into memory."""
    quick: int
    """As many as are quickest, where no tree has to be cut for it."""

    def of(self, trees: Sequence[TokenTree]) -> int:
        """The smallest number that these trees are not cut too much for.

        What the pieces of a tree share is computed for each of them.
        """
        whole = sum(tree.num_tokens for tree in trees)
        tokens = self.quick
        while tokens < self.most:
            cut = sum(piece.num_tokens for tree in trees for piece in tree.pieces(tokens))
            if cut <= _WORTH_A_CUT * whole:
                break
            tokens = min(2 * tokens, self.most)
        return tokens


def token_budget(
    model: Any,
    forward: Forward,
    longest: int,
    *,
    recomputed_bytes: float = 0.0,
    masters: bool = True,
    ranks: int = 1,
) -> Budget:
    """Tokens of a pass: powers of two, so that they are the same in every run on a machine.

    One pass over a few tokens shows what a token keeps; the share of the memory that this may take
    is divided by it, and by what the backward pass computes again for a token at once,
    ``recomputed_bytes``. On GPUs, gradients, optimiser and, unless not, ``masters`` of a bfloat16
    model are left room for. ``ranks`` are going to share weights and all of these, or the memory.
    """
    device = next(model.parameters()).device
    per_token = bytes_per_token(model, forward, longest) + recomputed_bytes
    tokens = _memory(model, device, masters, ranks) / (_BACKWARD * per_token)
    most = int(max(_SMALLEST, min(_LARGEST, 2 ** math.floor(math.log2(max(tokens, 1))))))
    return Budget(most, quick=min(most, _QUICK.get(device.type, most)))


def bytes_per_token(model: Any, forward: Forward, longest: int) -> float:
    """Bytes that a pass keeps for its gradient, for each token of its rows."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    rows = forward.rows(probe(model, longest), next(model.parameters()).device)
    with torch.autograd.graph.saved_tensors_hooks(keep, _same):
        # It holds what was kept, so that no address is seen twice.
        logprobs_N = forward.logprobs(model, rows)
    del logprobs_N
    total = sum(kept.values())
    return float(total / rows.tokens_RL.numel())


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _memory(model: Any, device: torch.device, masters: bool, ranks: int) -> float:
    if device.type != "cuda":
        return _SHARE_OF_MEMORY * _total_memory() / ranks
    free: float = torch.cuda.mem_get_info(device)[0]
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    for parameter in model.parameters():
        free += parameter.nbytes * (1 - 1 / ranks)
        if parameter.requires_grad:
            # Gradient and two moments in float32.
            has_master = masters and parameter.dtype != torch.float32
            free -= parameter.numel() * (16 if has_master else 12) / ranks
    return _SHARE_OF_FREE * max(0.0, free)


def _total_memory() -> int:
    """Bytes of this machine, or what its container may use of it."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            text = Path(path).read_text().strip()
        except OSError:
            continue
        if text.isdigit():
            total = min(total, int(text))
    return total
