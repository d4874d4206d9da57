"""Which way a model's sequences are computed: the fastest that equals computing them one by one.

Families differ in what they hand to their attention and in what their heads do. So a few small
trees are computed in each way at the start, and the results are compared.
"""

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
import transformers

from learner.packing.attention import PACKED, register
from learner.packing.forward import Forward, Way
from learner.packing.probe import positions_change_with_length, probe, small_limits
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


def choose(model: Any, longest: int) -> Way:
    """Find the best way for this model and sequences of up to ``longest`` tokens.

    It leaves the model with the attention that the way needs, and logs what was chosen and why.
    Raises `ConfigError` for a model that computes nothing finite, or never the same twice.
    """
    register()
    with small_limits(model):
        return _choose(model, longest)


def _choose(model: Any, longest: int) -> Way:
    own = model.config._attn_implementation
    truth = _Truth.of(model, longest)
    if not truth.logprobs_N.isfinite().all():
        raise ConfigError(
            "the model gives log-probabilities that are not finite: its weights are damaged, or "
            f"too large for {model.dtype}"
        )
    way, attention, reason = _first_equal(model, truth, longest, own)
    _set(model, attention)
    way = replace(way, fused_head=_can_fuse(model, way, truth, longest))
    if not way.fused_head:
        log.warning("logits of whole rows are made: %s", _unlike(model, "head"))
    if way.packed:
        log.info("sequences are packed into rows without padding, a prompt once for its group")
    else:
        how = "padded to rows of one length" if way.max_sequences is None else "trained one by one"
        log.warning("sequences are %s, which is slower: %s", how, reason)
    return way


@dataclass(frozen=True, slots=True, eq=False)
class _Truth:
    """Log-probabilities of the probe, one by one, and how far from them rounding may lead."""

    logprobs_N: torch.Tensor
    largest: float
    """Largest difference, in nats."""
    mean: float
    """Mean of the absolute differences."""

    @classmethod
    def of(cls, model: Any, longest: int) -> Self:
        logprobs_N = _exact(model, longest)
        if model.dtype == torch.float32:
            return cls(logprobs_N, largest=LIMIT, mean=LIMIT)
        wrong_N = _exact(model, longest, reverse=True)
        mean = SHARE * (logprobs_N - wrong_N).abs().mean().item()
        return cls(logprobs_N, largest=math.inf, mean=mean)

    def is_given_by(self, other_N: torch.Tensor) -> bool:
        """Whether these are the same, but for rounding."""
        differences_N = (other_N - self.logprobs_N).abs()
        # Not "is above": a NaN is no equality.
        return bool(differences_N.max() <= self.largest and differences_N.mean() <= self.mean)


def _first_equal(model: Any, truth: _Truth, longest: int, own: str) -> tuple[Way, str, str]:
    """The first way that gives the truth, its attention, and why the faster ones do not."""
    packed, padded = Way(packed=True, fused_head=False), Way(packed=False, fused_head=False)
    reason = "its positions depend on the longest sequence of a pass"
    candidates = [(PLAIN, own), (PLAIN, _EXACT)]
    if not positions_change_with_length(model, longest):
        candidates = [(packed, PACKED), (padded, own), (padded, _EXACT), *candidates]
        reason = _unlike(model, "attention")
    for way, attention in candidates:
        try:
            _set(model, attention)
            if truth.is_given_by(_compute(model, way, longest)):
                return way, attention, reason
        except Exception as error:  # Whatever a family's own code makes of it.
            reason = brief(error)
    raise ConfigError(f"{type(model).__name__} computes something else each time: {reason}")


def _can_fuse(model: Any, way: Way, truth: _Truth, longest: int) -> bool:
    """Whether hidden states and the head alone give the truth."""
    try:
        return truth.is_given_by(_compute(model, replace(way, fused_head=True), longest))
    except Exception:  # Heads of another width, models that have no part without one.
        return False


def _unlike(model: Any, part: str) -> str:
    return f"the {part} of {type(model).__name__} is not the usual one"


def _set(model: Any, attention: str) -> None:
    """Give a model another attention; raises ValueError if it has only its own."""
    with _quiet():
        model.set_attn_implementation(attention)
    if model.config._attn_implementation != attention:
        raise ValueError(_unlike(model, "attention"))


def _exact(model: Any, longest: int, *, reverse: bool = False) -> torch.Tensor:
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


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what transformers says of attentions that a family does not take."""
    level = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.utils.logging.set_verbosity(level)
