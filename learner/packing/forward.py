"""Forward passes over trees of tokens.

Shapes: N trained tokens, in the order of `Rows`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import gdpo
from learner.packing.attention import LAYOUT
from learner.packing.heads import head_of
from learner.packing.rows import Rows, packed_row, padded_rows
from learner.packing.trees import TokenTree


@dataclass(frozen=True, slots=True)
class Way:
    """How trees become rows, and hidden states log-probabilities."""

    packed: bool
    """One row without padding, what sequences share once; else a padded row for each sequence."""
    fused_head: bool
    """Head and softmax chunk by chunk; else by the model itself, with all its logits."""
    max_sequences: int | None = None
    """Sequences that may be in one pass; None for any number."""


class Root(nn.Module):
    """The root of a model whose weights are shared out over ranks.

    FSDP gathers what stands outside of the layers, the head too, while this module is called.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, compute: Callable[..., Any], rows: Rows, **options: Any) -> Any:
        """Compute with the model while its weights are there."""
        return compute(self.model, rows, **options)


class Forward:
    """Log-probabilities of sampled tokens at the temperature that they were sampled at."""

    def __init__(
        self, way: Way, temperature: float, on_progress: Callable[[], None] = lambda: None
    ) -> None:
        """``on_progress`` is called before each pass of a model."""
        self._way = way
        self._temperature = temperature
        self._on_progress = on_progress

    def rows(self, trees: Sequence[TokenTree], device: torch.device) -> Rows:
        """Lay trees out as the input of one pass."""
        if self._way.packed:
            return packed_row(trees, device)
        return padded_rows([chain for tree in trees for chain in tree.chains()], device)

    def logprobs(self, model: Any, rows: Rows) -> Tensor:
        """Log-probability [N] of each trained token."""
        if isinstance(model, Root):
            whole_N: Tensor = model(self.logprobs, rows)
            return whole_N
        if self._way.fused_head:
            return gdpo.head_logprobs(
                self._hidden(model, rows),
                head_of(model),
                rows.target_N,
                temperature=self._temperature,
            )
        return gdpo.token_logprobs(
            self._logits(model, rows), rows.target_N[None], temperature=self._temperature
        )[0]

    def logprobs_and_entropy(
        self,
        model: Any,
        rows: Rows,
        *,
        entropy_gradient: bool = False,
        loss_gradient: gdpo.LossGradient | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Log-probability [N] of each trained token, and the entropy [N] there, in nats.

        `gdpo.head_logprobs_and_entropy` says what the arguments are.
        """
        if isinstance(model, Root):
            whole: tuple[Tensor, Tensor] = model(
                self.logprobs_and_entropy,
                rows,
                entropy_gradient=entropy_gradient,
                loss_gradient=loss_gradient,
            )
            return whole
        if self._way.fused_head:
            return gdpo.head_logprobs_and_entropy(
                self._hidden(model, rows),
                head_of(model),
                rows.target_N,
                temperature=self._temperature,
                entropy_gradient=entropy_gradient,
                loss_gradient=loss_gradient,
            )
        logprobs, entropy = gdpo.token_logprobs_and_entropy(
            self._logits(model, rows), rows.target_N[None], temperature=self._temperature
        )
        return logprobs[0], entropy[0] if entropy_gradient else entropy[0].detach()

    def _hidden(self, model: Any, rows: Rows) -> Tensor:
        """Hidden states [N, H] that predict the trained tokens."""
        hidden_RLH = self._call(model.base_model, rows).last_hidden_state
        hidden_NH: Tensor = hidden_RLH.flatten(0, 1).index_select(0, rows.source_N)
        return hidden_NH

    def _logits(self, model: Any, rows: Rows) -> Tensor:
        """Logits [1, N, V] that predict the trained tokens."""
        logits_RLV = self._call(model, rows).logits
        logits_NV: Tensor = logits_RLV.flatten(0, 1).index_select(0, rows.source_N)
        return logits_NV[None]

    def _call(self, model: Any, rows: Rows) -> Any:
        self._on_progress()
        more: dict[str, Any] = {}
        if rows.layout is not None:
            more = {"position_ids": rows.positions_RL, LAYOUT: rows.layout}
        # Padding is on the right, where causal attention cannot see it: no mask is needed.
        return model(input_ids=rows.tokens_RL, use_cache=False, **more)
