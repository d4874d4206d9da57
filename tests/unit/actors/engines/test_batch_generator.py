"""The sampling loop against full recomputations with the same weights."""

from typing import Any, cast

import numpy as np
import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from actors.engines.batch_generator import BatchGenerator, sample_tokens
from actors.engines.engine import Request
from protocol.groups import Rollout

EOS = 1
VOCAB = 40


def make_model(seed: int) -> Qwen2ForCausalLM:
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
    )
    # Large weights make distributions peaked and different from model to model.
    model = Qwen2ForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0)
    return model.eval()


def make_request(**changes: Any) -> Request:
    values: dict[str, Any] = {
        "prompt_tokens": (5, 6, 7),
        "num_rollouts": 3,
        "temperature": 1.0,
        "max_tokens": 12,
        "seed": 7,
    }
    return Request(**(values | changes))


def run(generator: BatchGenerator, requests: list[Request]) -> list[list[Rollout]]:
    for key, request in enumerate(requests):
        generator.add(key, request)
    results: dict[int, list[Rollout]] = {}
    while generator.busy:
        results |= dict(generator.step()[1])
    return [results[key] for key in range(len(requests))]


def full_logprobs(model, prompt, tokens, temperature) -> np.ndarray:
    """Log-probability of each token by one forward pass over the whole sequence."""
    ids = torch.tensor([[*prompt, *tokens]])
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits[0, len(prompt) - 1 : -1] / temperature
    return logits.log_softmax(-1)[range(len(tokens)), tokens].numpy()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probabilities_equal_a_full_forward_pass(temperature):
    model = make_model(0)
    generator = BatchGenerator(model, eos_ids=frozenset([EOS]), max_rows=64, version=0)
    requests = [
        make_request(prompt_tokens=tuple(range(2, 2 + n)), seed=n, temperature=temperature)
        for n in (1, 4, 9)
    ]
    for request, rollouts in zip(requests, run(generator, requests), strict=True):
        for rollout in rollouts:
            expected = full_logprobs(model, request.prompt_tokens, rollout.tokens, temperature)
            assert np.abs(rollout.logprobs - expected).max() < 1e-4


def test_a_rollout_does_not_depend_on_the_batch_it_is_in():
    model = make_model(0)
    requests = [make_request(prompt_tokens=tuple(range(2, 3 + n)), seed=n) for n in range(6)]
    crowded = run(BatchGenerator(model, eos_ids=frozenset([EOS]), max_rows=64), requests)
    # One group at a time: the others wait for room.
    narrow = run(BatchGenerator(model, eos_ids=frozenset([EOS]), max_rows=3), requests)
    for one, other in zip(crowded, narrow, strict=True):
        assert [r.tokens.tolist() for r in one] == [r.tokens.tolist() for r in other]


def test_siblings_and_neighbouring_seeds_draw_differently():
    model = make_model(0)
    generator = BatchGenerator(model, eos_ids=frozenset([EOS]), max_rows=64)
    groups = run(generator, [make_request(num_rollouts=4, seed=seed) for seed in (100, 101)])
    sequences = {tuple(r.tokens.tolist()) for group in groups for r in group}
    assert len(sequences) == 8


def test_greedy_generation_equals_generate():
    model = make_model(3)
    prompt = (4, 9, 2, 11)
    generator = BatchGenerator(model, eos_ids=frozenset([EOS]), max_rows=8)
    [[rollout]] = run(
        generator, [make_request(prompt_tokens=prompt, num_rollouts=1, temperature=0.0)]
    )
    with torch.no_grad():
        expected = cast(Any, model).generate(
            torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=EOS
        )[0, len(prompt) :]
    assert rollout.tokens.tolist() == expected.tolist()


def test_new_weights_take_over_between_two_tokens():
    """Tokens before and after the change match a recomputation under their version's weights."""
    old, new = make_model(0), make_model(1)
    model = make_model(0)
    generator = BatchGenerator(model, eos_ids=frozenset(), max_rows=64, version=0)
    prompts = [(3, 4), (5, 6, 7, 8, 9)]
    for key, prompt in enumerate(prompts):
        generator.add(key, make_request(prompt_tokens=prompt, temperature=0.0, max_tokens=20))
    for _ in range(8):
        assert generator.step() == (6, [])
    model.load_state_dict(new.state_dict())
    generator.weights_changed(1)
    finished: dict[int, list[Rollout]] = {}
    while generator.busy:
        finished |= dict(generator.step()[1])
    for key, prompt in enumerate(prompts):
        for rollout in finished[key]:
            assert rollout.spans == ((0, 0), (8, 1))
            for version_model, part in ((old, slice(0, 8)), (new, slice(8, 20))):
                expected = full_logprobs(version_model, prompt, rollout.tokens, 1.0)[part]
                assert np.abs(rollout.logprobs[part] - expected).max() < 1e-4
            ids = torch.tensor([[*prompt, *rollout.tokens.tolist()]])
            with torch.no_grad():
                best_new = new(ids).logits[0, len(prompt) - 1 : -1].argmax(-1)
                best_old = old(ids).logits[0, len(prompt) - 1 : -1].argmax(-1)
            assert rollout.tokens[8:].tolist() == best_new[8:].tolist()
            assert rollout.tokens[:8].tolist() == best_old[:8].tolist()


def test_a_group_larger_than_the_batch_runs_alone():
    generator = BatchGenerator(make_model(0), eos_ids=frozenset([EOS]), max_rows=2)
    groups = run(generator, [make_request(num_rollouts=5), make_request(num_rollouts=1)])
    assert [len(group) for group in groups] == [5, 1]


@torch.inference_mode()
def test_an_aborted_group_leaves_the_others_alone():
    model = make_model(0)
    requests = [make_request(prompt_tokens=tuple(range(2, 3 + n)), seed=n) for n in range(4)]
    expected = run(BatchGenerator(model, eos_ids=frozenset(), max_rows=64), requests)
    # Room for two groups: one of those aborted is in flight, the other one waits.
    generator = BatchGenerator(model, eos_ids=frozenset(), max_rows=6)
    for key, request in enumerate(requests):
        generator.add(key, request)
    for _ in range(3):
        generator.step()
    generator.abort(1)
    generator.abort(2)
    results: dict[int, list[Rollout]] = {}
    while generator.busy:
        results |= dict(generator.step()[1])
    assert results.keys() == {0, 3}
    for key in results:
        assert [r.tokens.tolist() for r in results[key]] == [
            r.tokens.tolist() for r in expected[key]
        ]


def test_finish_reason_tells_the_end_of_sequence_from_the_limit():
    generator = BatchGenerator(make_model(0), eos_ids=frozenset([EOS]), max_rows=64)
    [group] = run(generator, [make_request(num_rollouts=40, max_tokens=6)])
    assert {r.finish for r in group} == {"stop", "length"}
    for rollout in group:
        ended = rollout.tokens[-1] == EOS
        assert rollout.finish == ("stop" if ended else "length")
        assert EOS not in rollout.tokens[:-1]
        assert ended or len(rollout.tokens) == 6


def test_sampled_frequencies_follow_the_distribution():
    logits = torch.tensor([0.0, 1.0, 2.0, -1e9])
    num_draws = 4000
    uniforms = (torch.arange(num_draws) + 0.5) / num_draws
    tokens, logprobs = sample_tokens(
        logits.expand(num_draws, 4), torch.full((num_draws,), 2.0), uniforms
    )
    # softmax([0, .5, 1]) of the logits at temperature 2; the last token is impossible.
    expected = torch.tensor([0.0, 0.5, 1.0]).softmax(0)
    counts = torch.bincount(tokens, minlength=4) / num_draws
    assert torch.allclose(counts[:3], expected, atol=1e-3)
    assert counts[3] == 0
    assert torch.allclose(logprobs, expected.log()[tokens], atol=1e-5)


def test_the_largest_uniform_draw_still_gives_a_possible_token():
    logits = torch.tensor([[0.0, -1e9, -1e9]])
    tokens, _ = sample_tokens(logits, torch.ones(1), torch.tensor([np.nextafter(1.0, 0.0)]))
    assert tokens.tolist() == [0]
