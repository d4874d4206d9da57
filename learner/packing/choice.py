"""Which way a model's sequences are computed: the fastest that equals computing them one by one.

Families differ in what they hand to their attention and in what their heads do. So a few small
trees are computed in each way at the start, and the results are compared.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
import transformers

from learner.packing.attention import PACKED, register
from learner.packing.forward import Forward, Way
from learner.packing.trees import Segment, TokenTree
from protocol.errors import ConfigError, brief

log = logging.getLogger("learner")

PLAIN = Way(packed=False, fused_head=False, max_sequences=1)
"""One sequence after the other, through nothing but the model."""
_EXACT = "eager"
"""The attention of transformers that leaves nothing out: ``sdpa`` ignores Gemma 2's softcap."""
LIMIT = 1e-3
"""Largest difference, in nats, that float32 may make."""
SHARE = 0.1
"""In other types, the share of the mean difference that the wrong order of the tokens makes."""
_WINDOW_PROBE = 1024
"""Windows up to this size are tried with sequences beyond them."""
# Llama 4 and DeepSeek-V4 cut the row itself into chunks, which are longer than the probe.
_CHUNKS_OF_ROWS = ("attention_chunk_size", "compress_rates")
# Their positions depend on the longest sequence of a pass.
_ROPE_BY_LENGTH = {"dynamic", "longrope"}


def choose(model: Any, longest: int) -> Way:
    """Find the best way for this model and sequences of up to ``longest`` tokens.

    It leaves the model with the attention that the way needs, and logs what was chosen and why.
    Raises `ConfigError` for a model that computes nothing finite.
    """
    register()
    own = model.config._attn_implementation
    truth = _truth(model, longest)
    if not truth.isfinite().all():
        raise ConfigError(
            "the model gives log-probabilities that are not finite: its weights are damaged, or "
            f"too large for {model.dtype}"
        )
    way, attention, reason = _first_equal(model, truth, longest, own)
    model.set_attn_implementation(attention)
    fused = replace(way, fused_head=True)
    if _is_equal(truth, fused, model, longest):
        way = fused
    else:
        log.warning("logits of whole rows are made: %s", _unlike(model, "head"))
    if way.packed:
        log.info("sequences are packed into rows without padding, a prompt once for its group")
    else:
        how = "padded to rows of one length" if way.max_sequences is None else "trained one by one"
        log.warning("sequences are %s, which is slower: %s", how, reason)
    return way


def _first_equal(model: Any, truth: torch.Tensor, longest: int, own: str) -> tuple[Way, str, str]:
    """The first way that gives the truth, its attention, and why the faster ones do not."""
    packed, padded = Way(packed=True, fused_head=False), Way(packed=False, fused_head=False)
    reason = "its positions depend on the longest sequence of a pass"
    candidates = [(PLAIN, own), (PLAIN, _EXACT)]
    if not _rope_depends_on_length(model, longest):
        candidates = [(padded, own), (padded, _EXACT), *candidates]
        reason = _unlike(model, "attention")
        config = model.config.get_text_config()
        if not any(getattr(config, name, None) for name in _CHUNKS_OF_ROWS):
            candidates = [(packed, PACKED), *candidates]
    for way, attention in candidates:
        try:
            _set(model, attention)
            if _equal(truth, partial(_compute, model, way, longest), model, longest):
                return way, attention, reason
        except Exception as error:  # Whatever a family's own code makes of it.
            reason = brief(error)
    raise ConfigError(f"{type(model).__name__} computes something else each time: {reason}")


def _unlike(model: Any, part: str) -> str:
    return f"the {part} of {type(model).__name__} is not the usual one"


def _set(model: Any, attention: str) -> None:
    """Give a model another attention; raises ValueError if it has only its own."""
    with _quiet():
        model.set_attn_implementation(attention)
    if model.config._attn_implementation != attention:
        raise ValueError(_unlike(model, "attention"))


def _equal(
    truth: torch.Tensor, compute: Callable[[], torch.Tensor], model: Any, longest: int
) -> bool:
    """Whether a way gives these log-probabilities, but for rounding."""
    differences = (compute() - truth).abs()
    if model.dtype == torch.float32:
        return bool(differences.max() <= LIMIT)
    wrong = _truth(model, longest, reverse=True)
    return bool(differences.mean() <= SHARE * (truth - wrong).abs().mean())


def _is_equal(truth: torch.Tensor, way: Way, model: Any, longest: int) -> bool:
    """Whether a way works, and gives these log-probabilities."""
    try:
        return _equal(truth, partial(_compute, model, way, longest), model, longest)
    except Exception as error:  # Whatever a family's own code makes of it.
        log.debug("%s", brief(error))
        return False


def _truth(model: Any, longest: int, *, reverse: bool = False) -> torch.Tensor:
    """One sequence after the other, by the attention of transformers that leaves nothing out."""
    now = model.config._attn_implementation
    _set(model, _EXACT)
    try:
        return _compute(model, PLAIN, longest, reverse=reverse)
    finally:
        _set(model, now)


@torch.no_grad()
def _compute(model: Any, way: Way, longest: int, *, reverse: bool = False) -> torch.Tensor:
    """Log-probabilities of the probe's tokens; ``reverse`` turns prompts around."""
    forward, device = Forward(way, temperature=1.0), next(model.parameters()).device
    passes = [probe(model, longest, reverse=reverse)]
    if way.max_sequences is not None:
        passes = [[chain] for tree in passes[0] for chain in tree.chains()]
    return torch.cat([forward.logprobs(model, forward.rows(trees, device)) for trees in passes])


def probe(model: Any, longest: int, *, reverse: bool = False) -> list[TokenTree]:
    """A tree of three levels, and one of two, of random tokens."""
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None) or 0
    beyond = window + 8 if window <= _WINDOW_PROBE else 0
    room = max(4, longest)
    prompt = max(1, min(max(24, beyond), room - 12))
    short, long_ = max(1, min(5, room // 4)), max(1, min(7, room // 4))
    vocab_size = model.get_input_embeddings().weight.shape[0]
    random = np.random.default_rng(0)

    def segment(parent: int, length: int, sequence: int = -1) -> Segment:
        tokens = random.integers(0, vocab_size, length, dtype=np.int32)
        if sequence < 0:
            return Segment(parent, tokens[::-1].copy() if reverse else tokens)
        return Segment(
            parent,
            tokens,
            sequence,
            sampled=np.ones(length, dtype=np.bool_),
            logprobs=np.zeros(length, dtype=np.float32),
            versions=np.zeros(length, dtype=np.int32),
        )

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


def _rope_depends_on_length(model: Any, longest: int) -> bool:
    """Whether positions are computed otherwise where a sequence is long, as some may be."""
    config = model.config.get_text_config()
    settings = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in settings.values() if isinstance(value, dict)] or [settings]
    kinds = {each.get("rope_type") for each in nested}
    switch = (
        min(
            (each.get("original_max_position_embeddings") or config.max_position_embeddings)
            for each in nested
        )
        if kinds & _ROPE_BY_LENGTH
        else longest
    )
    return longest > switch


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what transformers says of attentions that a family does not take."""
    level = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.utils.logging.set_verbosity(level)
