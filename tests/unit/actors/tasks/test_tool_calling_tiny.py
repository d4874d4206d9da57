"""The miniature: its language, its tokenizer, and the policy and prompts that are shipped."""

import importlib.util
import json
import random
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from actors.tasks.tool_calling import correctness_reward, format_reward
from actors.tasks.tool_calling_tiny import (
    EOS,
    MAX_ANSWER_TOKENS,
    PAD,
    Noise,
    ToolCall,
    clean_answer,
    ground_truth_of,
    make_rows,
    make_tokenizer,
    noisy_answer,
    prompt_of,
    split_requests,
    vocabulary,
)

EXAMPLE = Path(__file__).parents[4] / "examples" / "tool_calling_tiny"
REQUEST = (
    ToolCall("weather", ("paris", "monday")),
    ToolCall("stock", ("acme", "friday")),
)
NO_NOISE = Noise(0.0, 0.0, 0.0, 0.0, 0.0)


@pytest.fixture(scope="module")
def made_tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def tokenizer():
    """The shipped one, as users load it."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(EXAMPLE / "base")


@pytest.fixture(scope="module")
def model():
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(EXAMPLE / "base")


def scores(answers, truths):
    unused = [None] * len(answers)
    formats = format_reward(unused, answers, unused, ground_truth=truths)
    return formats, correctness_reward(unused, answers, unused, ground_truth=truths)


def noisy_scores(noise, requests):
    rng = random.Random(0)
    answers = [noisy_answer(request, noise, rng) for request in requests]
    return scores(answers, [ground_truth_of(request) for request in requests])


def read_rows(name):
    return [json.loads(line) for line in (EXAMPLE / name).read_text().splitlines()]


def mean(values):
    return sum(values) / len(values)


def sample_requests(count):
    train, heldout = split_requests(0)
    return random.Random(0).sample(train + heldout, count)


# The language.


def test_prompts_answers_and_ground_truths_read_as_documented():
    assert prompt_of(REQUEST) == "weather paris monday ; stock acme friday =>"
    assert clean_answer(REQUEST) == (
        '<think>two</think><tool_call>{"name":"weather","parameters":{"city":"paris",'
        '"day":"monday"}}\n{"name":"stock","parameters":{"ticker":"acme","day":"friday"}}</tool_call>'
    )
    assert ground_truth_of(REQUEST[:1]) == (
        '<tool_call>\n{"name": "weather", "parameters": {"city": "paris", "day": "monday"}}\n'
        "</tool_call>"
    )


def test_every_clean_answer_earns_both_rewards_in_full():
    requests = sample_requests(1000)
    formats, correctness = noisy_scores(NO_NOISE, requests)
    assert set(formats) == {1.0}
    assert set(correctness) == {3.0}


def test_each_kind_of_noise_spoils_what_it_names_and_nothing_else():
    requests = sample_requests(200)
    formats, correctness = noisy_scores(replace(NO_NOISE, broken_frame=1.0), requests)
    assert set(formats) == {0.0} and set(correctness) == {3.0}

    formats, correctness = noisy_scores(replace(NO_NOISE, unclosed_calls=1.0), requests)
    assert set(formats) == {0.0} and set(correctness) == {-3.0}

    # One call: S = 4, R = 1 + 1 + 0, so 0. Two calls: S = 7, R = 1 + 2, so -3/7 (unless the two
    # calls are of one tool, where the wrong value of the one may be the right one of the other).
    formats, correctness = noisy_scores(replace(NO_NOISE, wrong_value=1.0), requests)
    assert set(formats) == {1.0} and max(correctness) < 3.0
    assert 0.0 in correctness and pytest.approx(-3 / 7) in correctness

    for mistake in ("wrong_tool", "wrong_number"):
        formats, correctness = noisy_scores(replace(NO_NOISE, **{mistake: 1.0}), requests)
        assert set(formats) == {1.0} and mean(correctness) < 2.3


def test_the_default_noise_leaves_both_rewards_to_be_learnt_and_to_be_found():
    formats, correctness = noisy_scores(Noise(), sample_requests(4000))
    # (1 - broken_frame) * (1 - unclosed_calls) = 0.035 * 0.94 = 0.033
    assert mean(formats) == pytest.approx(0.033, abs=0.01)
    assert 0.8 < mean(correctness) < 1.8
    assert 0.15 < mean([score == 3.0 for score in correctness]) < 0.6


def test_demonstrations_follow_from_their_seed():
    assert noisy_scores(Noise(), [REQUEST] * 50) == noisy_scores(Noise(), [REQUEST] * 50)


# Data.


def test_training_and_heldout_requests_are_disjoint_and_together_the_whole_language():
    train, heldout = split_requests(0)
    assert not set(train) & set(heldout)
    # 5 tools of 4 x 4 values: 80 calls; and 80 x 79 ordered pairs of different calls.
    assert len(set(train) | set(heldout)) == len(train + heldout) == 80 + 80 * 79
    assert len(heldout) == 16 + 1264


def test_the_split_and_the_rows_follow_from_their_seed():
    assert split_requests(3) == split_requests(3) != split_requests(4)
    train, _ = split_requests(3)
    assert make_rows(train, 64, 5) == make_rows(train, 64, 5) != make_rows(train, 64, 6)


def test_rows_are_a_quarter_single_calls_and_repeat_no_pair():
    train, _ = split_requests(0)
    prompts = [row["prompt"] for row in make_rows(train, 400, 0)]
    pairs = [prompt for prompt in prompts if ";" in prompt]
    assert len(prompts) == 400 and len(set(pairs)) == len(pairs) == 300


def test_the_shipped_rows_are_those_of_seed_zero_and_disjoint():
    train, heldout = split_requests(0)
    assert read_rows("train.jsonl") == make_rows(train, 1024, 0)
    assert read_rows("heldout.jsonl") == make_rows(heldout, 256, 0)
    prompts = [{row["prompt"] for row in read_rows(f"{n}.jsonl")} for n in ("train", "heldout")]
    assert not prompts[0] & prompts[1]


# The tokenizer.


def test_answers_survive_the_shipped_tokenizer(tokenizer):
    requests = sample_requests(500)
    rng = random.Random(0)
    answers = [clean_answer(request) for request in requests]
    answers += [noisy_answer(request, Noise(), rng) for request in requests]
    ids = tokenizer([answer + EOS for answer in answers])["input_ids"]
    assert tokenizer.batch_decode(ids, skip_special_tokens=True) == answers
    assert all(row[-1] == tokenizer.eos_token_id for row in ids)
    # An answer with a call too many has 10 tokens more than a clean one of the same request.
    clean_lengths = {len(row) for row in ids[:500]}
    assert clean_lengths == {15, MAX_ANSWER_TOKENS}


def test_a_prompt_is_one_token_a_word_and_nothing_else(tokenizer):
    prompt = prompt_of(REQUEST)
    ids = tokenizer(prompt)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == prompt.split(" ")
    assert tokenizer(prompt, add_special_tokens=False)["input_ids"] == ids
    assert tokenizer(f"  {prompt}  ")["input_ids"] == ids


def test_each_piece_of_the_frame_is_one_token(tokenizer):
    ids = tokenizer(clean_answer(REQUEST[:1]))["input_ids"]
    frame = ["<think>", "one", "</think>", "<tool_call>"]
    call = [
        '{"name":"',
        "weather",
        '","parameters":{',
        '"city":"',
        "paris",
        '",',
        '"day":"',
        "monday",
    ]
    assert tokenizer.convert_ids_to_tokens(ids) == [*frame, *call, '"}}', "</tool_call>"]


def test_only_padding_and_end_are_special(tokenizer):
    assert set(tokenizer.all_special_tokens) == {PAD, EOS}
    assert (tokenizer.pad_token, tokenizer.eos_token) == (PAD, EOS)
    assert tokenizer.padding_side == "left"


def test_the_tokenizer_is_the_same_however_it_is_loaded_or_saved_again(
    made_tokenizer, tokenizer, tmp_path
):
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    folder = EXAMPLE / "base"
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    text = prompt_of(REQUEST) + clean_answer(REQUEST) + EOS
    expected = made_tokenizer(text)["input_ids"]
    for loaded in (
        tokenizer,
        AutoTokenizer.from_pretrained(tmp_path),
        PreTrainedTokenizerFast.from_pretrained(folder),
    ):
        assert loaded.get_vocab() == {token: i for i, token in enumerate(vocabulary())}
        assert loaded(text)["input_ids"] == expected
        assert loaded.decode(expected) == made_tokenizer.decode(expected)


# The shipped policy.


def test_the_shipped_policy_is_small_and_loads_in_single_precision(model, tokenizer):
    import torch

    assert (EXAMPLE / "base" / "model.safetensors").stat().st_size < 1_000_000
    assert model.config.model_type == "qwen2"
    assert model.config.vocab_size == len(tokenizer) == len(vocabulary())
    assert model.dtype == torch.float32
    assert 280_000 < model.num_parameters() < 290_000
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id


def test_the_shipped_policy_is_seldom_well_formatted_and_half_right(model, tokenizer):
    import torch

    rows = read_rows("heldout.jsonl")
    inputs = tokenizer([row["prompt"] for row in rows], padding=True, return_tensors="pt")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        ids = model.generate(**inputs, max_new_tokens=32, num_return_sequences=2)
    answers = tokenizer.batch_decode(
        ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
    )
    formats, correctness = scores(answers, [row["ground_truth"] for row in rows for _ in range(2)])
    # 2.8 % and +0.84 in truth; the standard errors of 512 samples are 0.7 % and 0.09.
    assert 0.005 < mean(formats) < 0.06
    assert 0.5 < mean(correctness) < 1.2


def test_make_base_writes_the_same_bytes_again(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("make_base", EXAMPLE / "make_base.py")
    assert spec is not None
    assert spec.loader is not None
    make_base = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make_base)
    monkeypatch.setattr(make_base.torch, "set_num_threads", lambda count: None)
    monkeypatch.setattr(make_base, "STEPS", 3)
    monkeypatch.setattr(make_base, "SAMPLES_PER_PROMPT", 1)
    for run in ("first", "second"):
        monkeypatch.setattr(sys, "argv", ["make_base.py", "--out", str(tmp_path / run)])
        make_base.main()
    written = {
        run: {
            path.relative_to(tmp_path / run): path.read_bytes()
            for path in (tmp_path / run).rglob("*")
            if path.is_file()
        }
        for run in ("first", "second")
    }
    assert written["first"] == written["second"]
    assert len(written["first"]) == 7
    shipped_data = (EXAMPLE / "train.jsonl").read_bytes()
    assert written["first"][Path("train.jsonl")] == shipped_data
