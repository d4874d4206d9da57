"""Forward passes of whole sequences, each of bounded size, with every prompt computed once.

Shapes: B rows, L positions, V vocabulary; see `actors.engines.padded_cache`.
"""

from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import torch

from actors.engines.padded_cache import PaddedCache

PASS_TOKENS = 2048
"""Tokens, padding included, that one forward pass computes: activations are bounded by them."""
PART_TOKENS = 16384
"""Cached positions of the rows that are computed together, beside those of the whole batch."""
WORTH_TWO_PASSES = 64
"""Tokens that it takes two more passes not to compute, at least. On one core a pass takes a model
of 10 M parameters as long as 65 tokens do, one of 100 M as long as 45."""

ItemT = TypeVar("ItemT")


class Prefill:
    """Computes keys, values and next-token logits with the weights that a model now holds."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._last = torch.tensor([-1], device=model.device)

    def prompts(self, prompts: Sequence[Sequence[int]]) -> tuple[torch.Tensor, PaddedCache]:
        """Next-token logits [B, V] and cache of prompts."""
        length = max(map(len, prompts))
        ids_BL, mask_BL = self._padded(prompts, [length - len(prompt) for prompt in prompts])
        cache = PaddedCache(mask_BL)
        logits_BV = self._in_passes(ids_BL, cache)
        return logits_BV, cache

    def completions(self, cache: PaddedCache, completions: Sequence[Sequence[int]]) -> None:
        """Append tokens to the rows of ``cache``, each row its own number of them."""
        length = max(map(len, completions))
        if length == 0:
            return
        # On the right, so that nothing stands between a prompt and its completion. Nothing sees
        # it there: attention is causal.
        missing = [length - len(completion) for completion in completions]
        ids_BL, mask_BL = self._padded(completions, [0] * len(completions))
        cache.mask_BL = torch.cat([cache.mask_BL, mask_BL], dim=1)
        self._in_passes(ids_BL, cache)
        cache.move_right(missing)

    def next_tokens(self, cache: PaddedCache, tokens: Sequence[int]) -> torch.Tensor:
        """Append one token to each row; returns the next-token logits [B, V]."""
        return self.continued(cache, [[token] for token in tokens])

    def continued(self, cache: PaddedCache, tokens: Sequence[Sequence[int]]) -> torch.Tensor:
        """Append as many tokens to each row; returns the next-token logits [B, V]."""
        ids_BL = torch.tensor(tokens, device=cache.mask_BL.device)
        cache.mask_BL = torch.cat([cache.mask_BL, torch.ones_like(ids_BL)], dim=1)
        return self._in_passes(ids_BL, cache)

    def _in_passes(self, ids_BL: torch.Tensor, cache: PaddedCache) -> torch.Tensor:
        """Compute the last columns of ``cache``; returns the logits [B, V] of the very last."""
        first = cache.mask_BL.shape[1] - ids_BL.shape[1]
        positions_BL = (cache.mask_BL.cumsum(1) - 1).clamp(min=0)
        width = max(1, PASS_TOKENS // len(ids_BL))
        for start in range(0, ids_BL.shape[1], width):
            part_BL = ids_BL[:, start : start + width]
            stop = first + start + part_BL.shape[1]
            output = self._model(
                input_ids=part_BL,
                attention_mask=cache.mask_BL[:, :stop],
                position_ids=positions_BL[:, first + start : stop],
                past_key_values=cache.past,
                use_cache=True,
                # An index, which gathers the last position of all rows. For a slice (which 1
                # means) torch makes a product for each row, each with a copy of the whole output
                # matrix.
                logits_to_keep=self._last,
            )
        logits_BV: torch.Tensor = output.logits[:, -1].float()
        return logits_BV

    def _padded(
        self, sequences: Sequence[Sequence[int]], starts: Sequence[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and mask [B, L] of sequences, each from its column in ``starts`` on."""
        length = max(map(len, sequences))
        ids_BL = torch.zeros(len(sequences), length, dtype=torch.long)
        mask_BL = torch.zeros_like(ids_BL)
        for row, (sequence, start) in enumerate(zip(sequences, starts, strict=True)):
            ids_BL[row, start : start + len(sequence)] = torch.tensor(sequence, dtype=torch.long)
            mask_BL[row, start : start + len(sequence)] = 1
        return ids_BL.to(self._model.device), mask_BL.to(self._model.device)


def one_pass_will_do(
    rows: Sequence[Sequence[int]],
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
) -> bool:
    """Whether it saves too little to compute the prompts of ``rows`` once, and what follows then.

    A row is a prompt and a completion; ``prompts`` has each prompt once.
    """
    whole, shared = _size(rows), _size(prompts) + _size(completions)
    return whole <= min(PASS_TOKENS, PART_TOKENS) and whole - shared < WORTH_TWO_PASSES


def _size(sequences: Sequence[Sequence[int]]) -> int:
    """Tokens, padding included."""
    return len(sequences) * max(map(len, sequences))


def in_parts(items: Sequence[tuple[int, ItemT]]) -> Iterator[list[ItemT]]:
    """Items by their length, as many at a time as make up `PART_TOKENS` padded to the longest.

    Similar lengths come together. At least one item is in each part.
    """
    part: list[ItemT] = []
    for length, item in sorted(items, key=lambda pair: pair[0]):
        if part and (len(part) + 1) * length > PART_TOKENS:
            yield part
            part = []
        part.append(item)
    if part:
        yield part
