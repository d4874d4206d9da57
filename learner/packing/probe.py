"""A few small trees on which ways of computing a model are compared, and a model made small for it.

What depends on the distance of two tokens or on the length of a sequence must show on them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from learner.packing.trees import Ints, Segment, TokenTree
from protocol.errors import ConfigError

_PROMPT = 112
"""Tokens: too many for `learner.packing.attention` to compute them again for each sequence."""
_LIMITS = ("sliding_window", "attention_chunk_size", "floor_scale")
"""Attributes of models and their layers from which on tokens are treated otherwise."""
_SMALL = 16


@contextmanager
def small_limits(model: Any) -> Iterator[None]:
    """Have windows and their like so short that the probe is longer."""
    owners = {id(o): o for o in (model.config, model.config.get_text_config(), *model.modules())}
    before = [
        (owner, name, value)
        for owner in owners.values()
        for name in _LIMITS
        if isinstance(value := getattr(owner, name, None), int | float) and value > _SMALL
    ]
    try:
        for owner, name, _ in before:
            setattr(owner, name, _SMALL)
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)


def sampled_segment(parent: int, tokens: Ints, sequence: int) -> Segment:
    """All of these tokens as if version 0 had sampled them with certainty."""
    return Segment(
        parent,
        tokens,
        sequence,
        sampled=np.ones(len(tokens), dtype=np.bool_),
        logprobs=np.zeros(len(tokens), dtype=np.float32),
        versions=np.zeros(len(tokens), dtype=np.int32),
    )


def probe(model: Any, longest: int, *, reverse: bool = False) -> list[TokenTree]:
    """A tree of three levels, and one of two, of random tokens."""
    room = max(4, longest)
    prompt = max(1, min(_PROMPT, room - 12))
    short, long_ = max(1, min(5, room // 4)), max(1, min(7, room // 4))
    vocab_size = model.get_input_embeddings().weight.shape[0]
    random = np.random.default_rng(0)

    def segment(parent: int, length: int, sequence: int = -1) -> Segment:
        tokens = random.integers(0, vocab_size, length, dtype=np.int32)
        if sequence < 0:
            return Segment(parent, tokens[::-1].copy() if reverse else tokens)
        return sampled_segment(parent, tokens, sequence)

    return [
        TokenTree(
            (
                segment(-1, prompt),
                segment(0, long_, 0),
                segment(0, short, 1),
                segment(2, long_, 1),
                segment(2, short, 2),
            )
        ),
        TokenTree((segment(-1, max(1, prompt // 2)), segment(0, short, 3), segment(0, long_, 4))),
    ]


def positions_change_with_length(model: Any, longest: int) -> bool:
    """Whether positions are computed otherwise where the longest sequence of a pass is long.

    Raises `ConfigError` where they depend on the sequences before it too.
    """
    config = model.config.get_text_config()
    settings = getattr(config, "rope_parameters", None) or {}
    of_layers = [value for value in settings.values() if isinstance(value, dict)] or [settings]
    for each in of_layers:
        if (kind := each.get("rope_type")) not in ("dynamic", "longrope"):
            continue
        switch = each.get("original_max_position_embeddings") or config.max_position_embeddings
        if longest <= switch:
            continue
        if kind == "dynamic":
            raise ConfigError(
                f"the model's positions (dynamic RoPE) depend on the longest sequence before: keep "
                f"sampling.max_prompt_tokens + sampling.max_tokens = {longest} within {switch}, or "
                "take a model with YaRN or longrope"
            )
        return True
    return False
