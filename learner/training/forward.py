"""Forward passes of the trainer.

Shapes: B sequences, T predicted positions, V vocabulary; see `learner.training.collate`.
"""

from collections.abc import Callable
from typing import Any

import torch

import gdpo
from learner.training.collate import PaddedBatch


class Forward:
    """Log-probabilities of sampled tokens at the temperature that they were sampled at."""

    def __init__(self, temperature: float, on_progress: Callable[[], None]) -> None:
        """``on_progress`` is called before each pass of a model."""
        self._temperature = temperature
        self._on_progress = on_progress

    def logprobs(self, model: Any, batch: PaddedBatch) -> torch.Tensor:
        """Log-probability [B, T] of every next token."""
        return gdpo.token_logprobs(
            self._logits(model, batch), batch.tokens_BL[:, 1:], temperature=self._temperature
        )

    def logprobs_and_entropy(
        self, model: Any, batch: PaddedBatch
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probability [B, T] of every next token, and the entropy [B, T] there, in nats."""
        return gdpo.token_logprobs_and_entropy(
            self._logits(model, batch), batch.tokens_BL[:, 1:], temperature=self._temperature
        )

    @torch.no_grad()
    def logprobs_in_parts(
        self, model: Any, batch: PaddedBatch, sequences_per_part: int
    ) -> torch.Tensor:
        """Log-probability [B, T] of every next token, without a gradient, part by part."""
        result_BT = torch.zeros_like(batch.behaviour_BT)
        # Sequences of similar length together: less padding to compute.
        for rows in batch.lengths_B.argsort().split(sequences_per_part):
            logprobs_BT = self.logprobs(model, batch.select(rows))
            result_BT[rows, : logprobs_BT.shape[1]] = logprobs_BT
        return result_BT

    def _logits(self, model: Any, batch: PaddedBatch) -> torch.Tensor:
        """Logits [B, T, V] of every next token.

        Padding is on the right, where causal attention cannot see it: no mask is needed.
        """
        self._on_progress()
        logits_BTV: torch.Tensor = model(input_ids=batch.tokens_BL[:, :-1], use_cache=False).logits
        return logits_BTV
