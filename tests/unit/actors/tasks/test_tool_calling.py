"""The two ToolRL rewards, against vectors worked out by hand."""

import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from actors.tasks.tool_calling import (
    Call,
    correctness_reward,
    format_reward,
    parse_calls,
    score_calls,
)

THINK = "<think>sure</think>"
WEATHER = {"city": "Paris", "unit": "C"}


def line(name="w", parameters=None):
    return json.dumps({"name": name, "parameters": WEATHER if parameters is None else parameters})


def block(*lines):
    return "<tool_call>\n" + "\n".join(lines) + "\n</tool_call>"


def format_of(completion, truth):
    [score] = format_reward([""], [completion], [[]], ground_truth=[truth])
    return score


def correctness_of(completion, truth):
    [score] = correctness_reward([""], [completion], [[]], ground_truth=[truth])
    return score


TRUTH = block(line())


# Correctness. For w(city, unit): S = 1 + 1 + 2 = 4, so a score is 6 R / 4 - 3.


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ([line()], 3.0),  # R = 1 + 1 + 2
        ([line(parameters={"city": "Rome", "unit": "C"})], 1.5),  # R = 1 + 1 + 1
        ([line(parameters={"city": "Paris"})], 0.75),  # R = 1 + 1/2 + 1
        ([line(name="x")], -3.0),  # R = 0
        ([line(), line()], 2.25),  # R = 1/2 + 1 + 2
        ([line(), line(name="x")], 2.25),
        ([line(parameters={})], -1.5),  # R = 1 + 0 + 0
        ([line(parameters=WEATHER | {"day": "today"})], 2.5),  # R = 1 + 2/3 + 2
        ([line(parameters={"city": "Rome", "unit": "F"})], 0.0),  # R = 1 + 1 + 0
        ([], -3.0),
    ],
)
def test_correctness_for_one_expected_call(lines, expected):
    assert correctness_of(THINK + block(*lines), TRUTH) == pytest.approx(expected)


def test_the_order_of_calls_and_of_parameters_does_not_matter():
    truth = block(line("a"), line("b", {"x": 1, "y": 2}))
    answer = block(line("b", {"y": 2, "x": 1}), line("a"))
    assert correctness_of(answer, truth) == 3.0


def test_a_missing_call_of_two_halves_the_names_and_loses_its_own_share():
    # S = 1 + 3 + 3 = 7; R = 1/2 + (1 + 2) = 3.5; 6 * 3.5 / 7 - 3 = 0.
    assert correctness_of(block(line("a")), block(line("a"), line("b"))) == pytest.approx(0.0)


def test_calls_of_one_name_are_matched_optimally_not_greedily():
    # Pair scores r_param + r_value: g1-p1 1+1, g1-p2 1+1, g2-p1 1+2, g2-p2 1+0. Whoever takes
    # g1-p1 first ends at 2 + 1; the best is g1-p2 and g2-p1, 2 + 3. S = 1 + 3 + 3, r_name = 1.
    expected = [Call("w", {"a": 1, "b": 2}), Call("w", {"a": 1, "b": 3})]
    made = [Call("w", {"a": 1, "b": 3}), Call("w", {"a": 0, "b": 2})]
    assert score_calls(expected, made) == pytest.approx(6 * (1 + 2 + 3) / 7 - 3)


def test_more_calls_than_expected_leave_the_worst_ones_unmatched():
    # names 1/3; the exact call 1 + 2. R = 10/3, S = 4: 6 * (10/3) / 4 - 3 = 2.
    answer = block(line(parameters={}), line(parameters={"city": "Rome"}), line())
    assert correctness_of(answer, TRUTH) == pytest.approx(2.0)


def test_calls_without_parameters_agree():
    assert correctness_of(block(line(parameters={})), block(line(parameters={}))) == 3.0


@pytest.mark.parametrize(
    ("want", "got", "equal"),
    [
        (1, 1.0, True),
        (1, True, False),
        (0, False, False),
        (True, True, True),
        ("1", 1, False),
        (None, None, True),
        ([1, {"a": True}], [1, {"a": True}], True),
        ([1, {"a": True}], [1, {"a": 1}], False),
        ({"a": 1}, {"a": 1, "b": 2}, False),
        ([], {}, False),
        (10**400, 0.5, False),
    ],
)
def test_values_are_compared_as_json(want, got, equal):
    truth, answer = block(line(parameters={"v": want})), block(line(parameters={"v": got}))
    assert correctness_of(answer, truth) == pytest.approx(3.0 if equal else 1.0)  # S = 3


def test_of_a_key_given_twice_the_last_value_counts():
    twice = '{"name": "x", "name": "w", "parameters": {"city": "Rome", "city": "Paris"}}'
    assert parse_calls(twice) == [Call("w", {"city": "Paris"})]


@pytest.mark.parametrize(
    "inside",
    [
        "weather in Paris",
        "[]",
        "3",
        "null",
        '"w"',
        '{"name": "w"}',
        '{"name": ["w"], "parameters": {}}',
        '{"name": {"w": 1}, "parameters": {}}',
        '{"name": "w", "parameters": []}',
        '{"name": "w", "parameters": {"city": NaN}}',
        '{"name": "w", "parameters": {"city": -Infinity}}',
        '{"name": "w", "parameters": {"n": ' + "9" * 100_000 + "}}",
        '{"name": "w", "parameters": ' + '{"a":' * 100_000,
        '{"name": "w", "parameters": {"a": ' + "[" * 100_000 + "]" * 100_000 + "}}",
        line() + line(),
        line() + "\n{",
    ],
    ids=lambda inside: inside[:48],
)
def test_a_section_that_cannot_be_read_scores_minus_three(inside):
    assert correctness_of(THINK + block(inside), TRUTH) == -3.0


def test_an_exponent_too_large_for_a_float_is_only_a_wrong_value():
    answer = block('{"name": "w", "parameters": {"city": 1e999, "unit": "C"}}')
    assert correctness_of(answer, TRUTH) == pytest.approx(1.5)


def test_values_nested_nearly_too_deep_do_not_break_the_comparison():
    truth = block('{"name": "w", "parameters": {"v": ' + "[" * 300 + "]" * 300 + "}}")
    for depth in range(50, 2000, 50):
        answer = block('{"name": "w", "parameters": {"v": ' + "[" * depth + "]" * depth + "}}")
        assert -3.0 <= correctness_of(answer, truth) <= 3.0
    assert correctness_of(truth, truth) == 3.0


def test_correctness_does_not_see_the_frame_around_the_calls():
    for frame in ("{}", "<think>{}", "{}</think><think>", "<response>{}</response>", "x{}y"):
        assert correctness_of(frame.format(TRUTH), TRUTH) == 3.0


def test_a_tool_call_that_is_never_closed_scores_minus_three():
    assert correctness_of(THINK + "<tool_call>\n" + line(), TRUTH) == -3.0


def test_only_the_first_tool_call_section_is_read():
    assert correctness_of(block(line()) + block(line("x")), TRUTH) == 3.0
    assert correctness_of(block(line("x")) + block(line()), TRUTH) == -3.0


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        (THINK + "<response>hello</response>", 3.0),
        ("anything at all", 3.0),
        (block(), 3.0),
        (block(line()), -3.0),
        ("<tool_call>never closed", -3.0),
    ],
)
def test_where_no_call_is_expected_none_must_be_made(completion, expected):
    assert correctness_of(completion, "<response>hello</response>") == expected


def test_an_unreadable_ground_truth_is_reported_to_who_wrote_it():
    with pytest.raises(ValueError, match="one JSON object a line"):
        correctness_of("", block("{"))


# Format.

CALL, SAY = block(line()), "<response>hello</response>"


@pytest.mark.parametrize(
    ("completion", "truth", "expected"),
    [
        (THINK + CALL, CALL, 1.0),
        (f"\n {THINK}\n\n{CALL} \n", CALL, 1.0),
        (THINK + SAY, SAY, 1.0),
        (f"{THINK}\n{CALL}\n{SAY}", CALL + SAY, 1.0),
        (THINK + CALL, THINK + CALL, 1.0),
        (THINK, THINK, 1.0),
        (THINK + "<tool_call>not json</tool_call>", CALL, 1.0),
        (CALL, CALL, 0.0),
        ("", CALL, 0.0),
        (THINK, CALL, 0.0),
        (CALL + THINK, CALL, 0.0),
        ("<think>" + CALL, CALL, 0.0),
        ("sure</think>" + CALL, CALL, 0.0),
        ("<think>sure" + CALL + "</think>", CALL, 0.0),
        (THINK + THINK + CALL, CALL, 0.0),
        (THINK + CALL + CALL, CALL, 0.0),
        (THINK + "<tool_call>" + line(), CALL, 0.0),
        (THINK + CALL + "bye", CALL, 0.0),
        ("hm" + THINK + CALL, CALL, 0.0),
        (THINK + "hm" + CALL, CALL, 0.0),
        (THINK + SAY, CALL, 0.0),
        (THINK + CALL + SAY, CALL, 0.0),
        (THINK + CALL, SAY, 0.0),
        (THINK + CALL, CALL + SAY, 0.0),
        (THINK + SAY + CALL, CALL + SAY, 0.0),
        (THINK + CALL + "hm" + SAY, CALL + SAY, 0.0),
    ],
)
def test_format(completion, truth, expected):
    assert format_of(completion, truth) == expected


# Both.


def messages(*contents):
    return [{"role": "assistant", "content": content} for content in contents]


@pytest.mark.parametrize(
    "completion",
    [
        messages(THINK + CALL),
        messages(THINK, CALL),
        messages(None, THINK + CALL),
        messages([{"type": "text", "text": THINK}, {"type": "text", "text": CALL}]),
        [*messages(THINK + CALL), {"role": "tool", "content": "21 degrees"}],
    ],
)
def test_conversational_completions_are_read_like_plain_ones(completion):
    assert format_of(completion, CALL) == 1.0
    assert correctness_of(completion, CALL) == 3.0


def test_an_empty_conversation_is_an_empty_answer():
    assert format_of([], CALL) == 0.0
    assert correctness_of([], CALL) == -3.0


def test_scores_come_in_the_order_of_the_completions_and_other_columns_are_ignored():
    completions, truths = [THINK + CALL, THINK, CALL], [CALL, CALL, None]
    columns = {"ground_truth": truths, "source": ["a", "b", "c"]}
    assert format_reward(["", "", ""], completions, [[], [], []], **columns) == [1.0, 0.0, None]
    scores = correctness_reward(["", "", ""], completions, [[], [], []], **columns)
    assert scores == [3.0, -3.0, None]


def test_columns_of_different_lengths_are_refused():
    with pytest.raises(ValueError):
        format_reward(["", ""], ["", ""], [[], []], ground_truth=[CALL])


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=6,
)
parameters = st.dictionaries(st.sampled_from("abc"), values, max_size=3)
calls = st.lists(st.builds(Call, st.sampled_from("vw"), parameters), max_size=4)
tags = [
    f"<{slash}{section}>" for section in ("think", "tool_call", "response") for slash in ("", "/")
]
junk = ["\n", "{", "}", "[", '"', '{"name":', "NaN", "1e999", "\ud800", "\0"]
fragments = st.sampled_from([*tags, *junk, line()])
answers = st.lists(fragments | st.text(max_size=4) | values.map(json.dumps)).map("".join)


@given(answers, st.sampled_from([TRUTH, SAY, CALL + SAY, ""]))
@example("<tool_call>" + "[" * 10_000 + "</tool_call>", TRUTH)
def test_no_answer_breaks_the_rewards_or_leaves_their_range(answer, truth):
    assert format_of(answer, truth) in (0.0, 1.0)
    assert -3.0 <= correctness_of(answer, truth) <= 3.0


@given(calls, calls, st.randoms(use_true_random=False))
def test_the_score_has_its_range_and_does_not_depend_on_order(expected, made, random):
    score = score_calls(expected, made)
    assert -3.0 <= score <= 3.0
    shuffled = random.sample(made, len(made))
    assert score_calls(random.sample(expected, len(expected)), shuffled) == pytest.approx(score)


@given(calls.filter(lambda expected: "nan" not in repr(expected)))
def test_only_the_expected_calls_score_three(expected):
    assert score_calls(expected, expected) == pytest.approx(3.0)
    assert score_calls(expected, [*expected, Call("w", {})]) < 3.0
