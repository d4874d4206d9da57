"""A group of rollouts: the atom of the system, and its form on the wire.

A group is G completions of one prompt with K reward scores each. On the wire it is a
`GroupHeader` followed by these payload frames, little-endian, in this order:

    prompt_tokens  int32   [prompt]       the token ids that the engine was given
    lengths        int32   [G]            tokens of each completion, end-of-sequence included
    tokens         int32   [sum lengths]  completions back to back
    logprobs       float32 [sum lengths]  behaviour log-probability of each sampled token
    spans          int32   [S, 3]         (rollout, first token, policy version), in order
    scores         float32 [G, K]         reward k of rollout g; NaN = does not apply
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from protocol.errors import BadMessage
from protocol.framing import Buffer
from protocol.messages import FinishReason, GroupHeader

Ints = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float32]

_DTYPES = ("<i4", "<i4", "<i4", "<f4", "<i4", "<f4")
NUM_PAYLOADS = len(_DTYPES)
_NAMES = ("prompt_tokens", "lengths", "tokens", "logprobs", "spans", "scores")


@dataclass(frozen=True, slots=True, eq=False)
class Rollout:
    """One completion."""

    tokens: Ints
    """[T] sampled token ids, the end-of-sequence token included."""
    logprobs: Floats
    """[T] log-probability of each token under the distribution that it was sampled from."""
    spans: tuple[tuple[int, int], ...]
    """(first token, policy version): each version holds up to the next span's first token."""
    finish: FinishReason

    @property
    def token_versions(self) -> Ints:
        """[T] policy version that each token was sampled from."""
        versions = np.empty(len(self.tokens), dtype=np.int32)
        for start, version in self.spans:
            versions[start:] = version
        return versions


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """G rollouts of one prompt, scored."""

    lease: int
    prompt_tokens: Ints
    """[prompt]"""
    rollouts: tuple[Rollout, ...]
    reward_names: tuple[str, ...]
    scores: Floats
    """[G, K], NaN = the reward does not apply."""
    generation_seconds: float = 0.0
    reward_seconds: float = 0.0
    missing: Mapping[str, str] = field(default_factory=dict)
    """Rewards that failed on the group, by name, with the cause; their scores are NaN."""

    @property
    def versions(self) -> set[int]:
        """Policy versions of its tokens."""
        return {version for rollout in self.rollouts for _, version in rollout.spans}

    @property
    def oldest_version(self) -> int:
        """Policy version of the group's oldest token, from which its staleness is measured."""
        return min(self.versions)

    @property
    def num_tokens(self) -> int:
        """Sampled tokens, prompts not counted."""
        return sum(len(rollout.tokens) for rollout in self.rollouts)

    @property
    def size_bytes(self) -> int:
        """Memory of the arrays."""
        per_rollout = sum(r.tokens.nbytes + r.logprobs.nbytes for r in self.rollouts)
        return per_rollout + self.prompt_tokens.nbytes + self.scores.nbytes


@dataclass(frozen=True, slots=True)
class GroupLimits:
    """Limits of a valid group, which the learner knows from its configuration."""

    num_rollouts: int
    reward_names: tuple[str, ...]
    vocab_size: int
    max_prompt_tokens: int
    max_tokens: int
    newest_version: int


def pack_group(group: Group) -> tuple[GroupHeader, list[Buffer]]:
    """Header and payload frames of a group."""
    rollouts = group.rollouts
    arrays: Sequence[npt.NDArray[Any]] = (
        group.prompt_tokens,
        np.array([len(r.tokens) for r in rollouts]),
        np.concatenate([r.tokens for r in rollouts]),
        np.concatenate([r.logprobs for r in rollouts]),
        np.array([(g, *span) for g, r in enumerate(rollouts) for span in r.spans]),
        group.scores,
    )
    header = GroupHeader(
        lease=group.lease,
        reward_names=group.reward_names,
        finish=tuple(r.finish for r in rollouts),
        generation_seconds=group.generation_seconds,
        reward_seconds=group.reward_seconds,
        missing=dict(group.missing),
    )
    payloads: list[Buffer] = [
        np.ascontiguousarray(array, dtype=dtype).tobytes()
        for array, dtype in zip(arrays, _DTYPES, strict=True)
    ]
    return header, payloads


def unpack_group(header: GroupHeader, payloads: Sequence[memoryview], limits: GroupLimits) -> Group:
    """Validate a group from the network against ``limits``; raises `BadMessage`.

    The arrays are copied, so the group outlives the frames it came in.
    """
    prompt, lengths, tokens, logprobs, spans, scores = _arrays(payloads)
    num_rollouts, num_rewards = limits.num_rollouts, len(limits.reward_names)
    _require(header.reward_names == limits.reward_names, "reward names differ from the run's")
    _require(len(header.finish) == num_rollouts, f"{len(header.finish)} finish reasons")
    _require(len(lengths) == num_rollouts, f"{len(lengths)} rollouts, not {num_rollouts}")
    _require(bool((lengths >= 1).all()), "an empty completion")
    _require(bool((lengths <= limits.max_tokens).all()), "a completion over max_tokens")
    total = int(lengths.sum(dtype=np.int64))
    _require(len(tokens) == total == len(logprobs), "tokens, log-probabilities, lengths disagree")
    _require(1 <= len(prompt) <= limits.max_prompt_tokens, f"a prompt of {len(prompt)} tokens")
    for ids in (prompt, tokens):
        _require(
            bool(((ids >= 0) & (ids < limits.vocab_size)).all()),
            "a token id outside the vocabulary",
        )
    _require(bool(np.isfinite(logprobs).all()), "a log-probability that is not finite")
    _require(bool((logprobs <= 1e-6).all()), "a log-probability above 0")
    _require(scores.size == num_rollouts * num_rewards, f"{scores.size} scores")
    _require(not bool(np.isinf(scores).any()), "an infinite score")
    scores = scores.reshape(num_rollouts, num_rewards)
    for name in header.missing:
        _require(name in limits.reward_names, f"no reward {name!r} can be missing")
        column = scores[:, limits.reward_names.index(name)]
        _require(bool(np.isnan(column).all()), f"scores of {name!r}, which is said to be missing")
    spans_by_rollout = _spans(spans, lengths, limits)
    stops = np.cumsum(lengths)
    rollouts = tuple(
        Rollout(
            tokens=tokens[stop - length : stop],
            logprobs=np.minimum(logprobs[stop - length : stop], 0.0),
            spans=rollout_spans,
            finish=finish,
        )
        for stop, length, rollout_spans, finish in zip(
            stops, lengths, spans_by_rollout, header.finish, strict=True
        )
    )
    return Group(
        lease=header.lease,
        prompt_tokens=prompt,
        rollouts=rollouts,
        reward_names=header.reward_names,
        scores=scores,
        generation_seconds=header.generation_seconds,
        reward_seconds=header.reward_seconds,
        missing=header.missing,
    )


def _arrays(payloads: Sequence[memoryview]) -> list[npt.NDArray[Any]]:
    if len(payloads) != len(_DTYPES):
        raise BadMessage(f"a group has {len(_DTYPES)} payload frames, not {len(payloads)}")
    for name, payload in zip(_NAMES, payloads, strict=True):
        _require(payload.nbytes % 4 == 0, f"{name}: {payload.nbytes} bytes is no multiple of 4")
    return [
        np.frombuffer(payload, dtype=dtype).astype(dtype[1:])
        for payload, dtype in zip(payloads, _DTYPES, strict=True)
    ]


def _spans(
    flat: npt.NDArray[Any], lengths: npt.NDArray[Any], limits: GroupLimits
) -> list[tuple[tuple[int, int], ...]]:
    """Check that the spans of each rollout start at 0, increase and never go back in version."""
    _require(flat.size % 3 == 0, "version spans are triples")
    by_rollout: list[list[tuple[int, int]]] = [[] for _ in lengths]
    for rollout, start, version in flat.reshape(-1, 3).tolist():
        _require(0 <= rollout < len(lengths), "a version span of no rollout")
        _require(0 <= version <= limits.newest_version, f"policy version {version} is unknown")
        spans = by_rollout[rollout]
        if spans:
            _require(start > spans[-1][0] and version > spans[-1][1], "version spans out of order")
        _require(start < lengths[rollout], "a version span after the end")
        spans.append((start, version))
    for spans in by_rollout:
        _require(bool(spans) and spans[0][0] == 0, "a rollout whose first token has no version")
    return [tuple(spans) for spans in by_rollout]


def _require(holds: object, problem: str) -> None:
    if not holds:
        raise BadMessage(f"group: {problem}")
