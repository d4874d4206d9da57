"""Groups on the wire: what goes in comes out, and what is no valid group is refused."""

import math
from dataclasses import replace
from random import Random

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.errors import BadMessage
from protocol.framing import decode_to_learner, encode
from protocol.groups import Group, GroupLimits, Rollout, pack_group, unpack_group
from protocol.messages import GroupHeader
from tests.unit.factories import REWARDS, VOCAB, make_group

NAN = math.nan
PROMPT, LENGTHS, TOKENS, LOGPROBS, SPANS, SCORES = range(6)
LIMITS = GroupLimits(
    num_rollouts=2,
    reward_names=REWARDS,
    vocab_size=VOCAB,
    max_prompt_tokens=4,
    max_tokens=8,
    newest_version=5,
)
ids = st.integers(0, VOCAB - 1)


def receive(group: Group, limits: GroupLimits = LIMITS) -> Group:
    """A group after a journey over the wire."""
    header, payloads = decode_to_learner(encode(*pack_group(group)))
    assert isinstance(header, GroupHeader)
    return unpack_group(header, payloads, limits)


def assert_same(left: Group, right: Group) -> None:
    for name in ("lease", "reward_names", "generation_seconds", "reward_seconds"):
        assert getattr(left, name) == getattr(right, name)
    np.testing.assert_array_equal(left.prompt_tokens, right.prompt_tokens)
    np.testing.assert_array_equal(left.scores, right.scores)
    assert len(left.rollouts) == len(right.rollouts)
    for a, b in zip(left.rollouts, right.rollouts, strict=True):
        np.testing.assert_array_equal(a.tokens, b.tokens)
        np.testing.assert_array_equal(a.logprobs, b.logprobs)
        assert (a.spans, a.finish) == (b.spans, b.finish)


# ---- Good groups -------------------------------------------------------------------------------


@st.composite
def rollouts(draw: st.DrawFn) -> Rollout:
    length = draw(st.integers(1, 8))
    starts = {0, *draw(st.sets(st.integers(0, length - 1)))}
    versions = draw(st.sets(st.integers(0, 9), min_size=len(starts), max_size=len(starts)))
    floats = st.floats(-50, 0, width=32)
    return Rollout(
        tokens=np.array(draw(st.lists(ids, min_size=length, max_size=length)), dtype=np.int32),
        logprobs=np.array(
            draw(st.lists(floats, min_size=length, max_size=length)), dtype=np.float32
        ),
        spans=tuple(zip(sorted(starts), sorted(versions), strict=True)),
        finish=draw(st.sampled_from(["stop", "length"])),
    )


@st.composite
def groups(draw: st.DrawFn) -> Group:
    members = draw(st.lists(rollouts(), min_size=1, max_size=4))
    names = tuple(f"r{k}" for k in range(draw(st.integers(1, 3))))
    score = st.just(NAN) | st.floats(-1e6, 1e6, width=32)
    row = st.lists(score, min_size=len(names), max_size=len(names))
    return Group(
        lease=draw(st.integers(1, 2**40)),
        prompt_tokens=np.array(draw(st.lists(ids, min_size=1, max_size=4)), dtype=np.int32),
        rollouts=tuple(members),
        reward_names=names,
        scores=np.array([draw(row) for _ in members], dtype=np.float32),
        generation_seconds=draw(st.floats(0, 100)),
        reward_seconds=draw(st.floats(0, 100)),
    )


@settings(max_examples=200, deadline=None)
@given(groups())
def test_any_valid_group_survives_the_wire(group):
    limits = replace(
        LIMITS,
        num_rollouts=len(group.rollouts),
        reward_names=group.reward_names,
        newest_version=9,
    )
    arrived = receive(group, limits)
    assert_same(arrived, group)
    assert arrived.oldest_version == min(v for r in group.rollouts for _, v in r.spans)
    assert arrived.num_tokens == sum(len(r.tokens) for r in group.rollouts)
    assert arrived.size_bytes == group.size_bytes


def test_the_size_of_a_group_is_that_of_its_arrays():
    # 5 tokens of 4 + 4 bytes, a prompt of 2 x 4 bytes, 2 x 2 scores of 4 bytes.
    assert make_group(lengths=(3, 2)).size_bytes == 5 * 8 + 2 * 4 + 4 * 4


def test_a_group_outlives_the_frames_it_came_in():
    header, payloads = pack_group(make_group())
    buffers = [bytearray(payload) for payload in payloads]
    arrived = unpack_group(header, [memoryview(buffer) for buffer in buffers], LIMITS)
    for buffer in buffers:
        buffer[:] = bytes(len(buffer))
    assert_same(arrived, make_group())


def test_a_log_probability_rounded_above_0_counts_as_0():
    group = make_group()
    group.rollouts[0].logprobs[1] = 5e-7
    assert receive(group).rollouts[0].logprobs.tolist() == [-0.5, 0.0, -0.5]


# ---- Bad groups --------------------------------------------------------------------------------


def int32(*values):
    return np.array(values, dtype="<i4").tobytes()


def float32(*values):
    return np.array(values, dtype="<f4").tobytes()


# The group that these replace one frame of has prompt [7, 8], completions [0, 1, 2] and [0, 1],
# every log-probability -0.5, and spans (0, 0, 0), (1, 0, 0).
BAD_FRAMES = {
    "an empty prompt": (PROMPT, int32(), "a prompt of 0 tokens"),
    "a prompt too long": (PROMPT, int32(1, 2, 3, 4, 5), "a prompt of 5 tokens"),
    "a prompt token out of the vocabulary": (PROMPT, int32(VOCAB), "outside the vocabulary"),
    "a negative prompt token": (PROMPT, int32(-1), "outside the vocabulary"),
    "a token out of the vocabulary": (TOKENS, int32(0, 1, VOCAB, 3, 4), "outside the vocabulary"),
    "a negative token": (TOKENS, int32(0, 1, -(2**31), 3, 4), "outside the vocabulary"),
    "a token too few": (TOKENS, int32(0, 1, 2, 3), "disagree"),
    "a token too many": (TOKENS, int32(0, 1, 2, 3, 4, 5), "disagree"),
    "no tokens": (TOKENS, b"", "disagree"),
    "a log-probability too few": (LOGPROBS, float32(-1, -1, -1, -1), "disagree"),
    "no log-probabilities": (LOGPROBS, b"", "disagree"),
    "a positive log-probability": (LOGPROBS, float32(-1, -1, 0.01, -1, -1), "above 0"),
    "a NaN log-probability": (LOGPROBS, float32(-1, -1, NAN, -1, -1), "not finite"),
    "an infinite log-probability": (LOGPROBS, float32(-1, -1, -math.inf, -1, -1), "not finite"),
    "lengths in another order": (LENGTHS, int32(2, 4), "disagree"),
    "an empty completion": (LENGTHS, int32(5, 0), "an empty completion"),
    "a negative length": (LENGTHS, int32(6, -1), "an empty completion"),
    "a completion over max_tokens": (LENGTHS, int32(9, 2), "over max_tokens"),
    "a rollout too few": (LENGTHS, int32(5), "1 rollouts, not 2"),
    "a rollout too many": (LENGTHS, int32(2, 2, 1), "3 rollouts, not 2"),
    "no rollouts": (LENGTHS, b"", "0 rollouts, not 2"),
    "lengths whose int32 sum is 5": (LENGTHS, int32(2**31 - 1, -(2**31) + 6), "empty completion"),
    "spans that are no triples": (SPANS, int32(0, 0, 0, 1), "triples"),
    "no spans": (SPANS, b"", "first token has no version"),
    "a rollout without span": (SPANS, int32(0, 0, 0), "first token has no version"),
    "a first token without version": (SPANS, int32(0, 1, 0, 1, 0, 0), "no version"),
    "a span of a third rollout": (SPANS, int32(0, 0, 0, 2, 0, 0), "no rollout"),
    "a span of rollout -1": (SPANS, int32(0, 0, 0, -1, 0, 0), "no rollout"),
    "a version from the future": (SPANS, int32(0, 0, 6, 1, 0, 0), "version 6 is unknown"),
    "a negative version": (SPANS, int32(0, 0, -1, 1, 0, 0), "version -1 is unknown"),
    "a version twice": (SPANS, int32(0, 0, 1, 0, 1, 1, 1, 0, 0), "out of order"),
    "versions that go back": (SPANS, int32(0, 0, 2, 0, 1, 1, 1, 0, 0), "out of order"),
    "a span at the same token": (SPANS, int32(0, 0, 1, 0, 0, 2, 1, 0, 0), "out of order"),
    "a span before the first": (SPANS, int32(0, 0, 1, 0, -1, 2, 1, 0, 0), "out of order"),
    "a negative first span": (SPANS, int32(0, -1, 0, 1, 0, 0), "no version"),
    "a span after the end": (SPANS, int32(0, 0, 1, 0, 3, 2, 1, 0, 0), "after the end"),
    "a score too few": (SCORES, float32(1, 2, 3), "3 scores"),
    "no scores": (SCORES, b"", "0 scores"),
    "an infinite score": (SCORES, float32(1, 2, 3, math.inf), "infinite score"),
    "a score of minus infinity": (SCORES, float32(1, 2, -math.inf, NAN), "infinite score"),
}


@pytest.mark.parametrize(("index", "frame", "problem"), BAD_FRAMES.values(), ids=BAD_FRAMES.keys())
def test_a_group_with_one_bad_frame_is_refused(index, frame, problem):
    header, payloads = pack_group(make_group())
    payloads[index] = frame
    with pytest.raises(BadMessage, match=problem):
        unpack_group(header, [memoryview(payload) for payload in payloads], LIMITS)


@pytest.mark.parametrize("index", range(6))
def test_a_frame_that_holds_no_whole_numbers_of_4_bytes_is_refused(index):
    header, payloads = pack_group(make_group())
    payloads[index] = bytes(payloads[index]) + b"\0"
    with pytest.raises(BadMessage, match="no multiple of 4"):
        unpack_group(header, [memoryview(payload) for payload in payloads], LIMITS)


@pytest.mark.parametrize("change", [-1, 1])
def test_a_wrong_number_of_frames_is_refused(change):
    header, payloads = pack_group(make_group())
    payloads = payloads[:change] if change < 0 else [*payloads, b""]
    with pytest.raises(BadMessage, match=f"6 payload frames, not {6 + change}"):
        unpack_group(header, [memoryview(payload) for payload in payloads], LIMITS)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"reward_names": ("format",)}, "reward names differ"),
        ({"reward_names": ("correctness", "format")}, "reward names differ"),
        ({"finish": ("stop",)}, "1 finish reasons"),
        ({"finish": ("stop", "stop", "length")}, "3 finish reasons"),
        ({"missing": {"speed": "it raised"}}, "no reward 'speed' can be missing"),
        ({"missing": {"format": "it raised"}}, "scores of 'format', which is said to be missing"),
    ],
)
def test_a_group_with_a_header_that_does_not_fit_is_refused(change, problem):
    header, payloads = pack_group(make_group())
    header = msgspec.structs.replace(header, **change)
    with pytest.raises(BadMessage, match=problem):
        unpack_group(header, [memoryview(payload) for payload in payloads], LIMITS)


def test_a_group_says_which_rewards_are_missing_and_why():
    group = replace(make_group(scores=[[NAN, 1], [NAN, 2]]), missing={"format": "it raised"})
    assert receive(group).missing == {"format": "it raised"}
    # That a reward does not apply is no failure.
    assert receive(replace(group, missing={})).missing == {}


def test_lengths_whose_sum_overflows_int32_do_not_wrap_around():
    # Three times 1431655767 is 2^32 + 5: as int32 it would equal the number of tokens.
    limits = replace(LIMITS, num_rollouts=3, max_tokens=2**31 - 1)
    header, payloads = pack_group(make_group(lengths=(2, 2, 1)))
    payloads[LENGTHS] = int32(1431655767, 1431655767, 1431655767)
    with pytest.raises(BadMessage, match="disagree"):
        unpack_group(header, [memoryview(payload) for payload in payloads], limits)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32))
def test_mutated_frames_give_a_valid_group_or_a_bad_message(seed):
    random = Random(seed)
    header, payloads = pack_group(make_group())
    for _ in range(10):
        mutants = [bytearray(payload) for payload in payloads]
        frame = random.choice(mutants)
        at = random.randrange(len(frame) + 1) // 4 * 4
        frame[at : at + 4 * random.randint(0, 2)] = random.randbytes(4 * random.randint(0, 2))
        try:
            group = unpack_group(header, [memoryview(mutant) for mutant in mutants], LIMITS)
        except BadMessage:
            continue
        assert_same(receive(group), group)
        assert 0 <= group.oldest_version <= LIMITS.newest_version
