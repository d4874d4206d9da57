"""The vLLM engine against `transformers`: tokens, log-probabilities, and weights in flight.

The versions are made one after the other in the order of the tests: an engine never goes back.
"""

import asyncio

import numpy as np
import pytest
import torch

from actors.engines.engine import Request
from protocol.errors import EngineError
from tests.vllm.conftest import MAX_TOKENS, Served

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.timeout(180),
    pytest.mark.asyncio(loop_scope="session"),
]

PROMPT = (7, 20, 30)
# Longer than a block of the key-value cache on a CPU (128 tokens), so that it gets cached.
LONG_PROMPT = tuple(10 + (7 * i) % 37 for i in range(150))


def request(
    prompt=PROMPT, num_rollouts=4, temperature=1.0, max_tokens=MAX_TOKENS, seed=1
) -> Request:
    return Request(prompt, num_rollouts, temperature, max_tokens, seed)


@torch.no_grad()
def logits_TV(model, prompt: tuple[int, ...], tokens: np.ndarray) -> torch.Tensor:
    """Of every position of the completion, by a full forward pass over prompt and completion."""
    ids = torch.tensor([*prompt, *tokens.tolist()])[None]
    return model(ids).logits[0, len(prompt) - 1 : -1]


def logprobs_T(model, prompt, tokens: np.ndarray, temperature: float) -> torch.Tensor:
    logprobs_TV = (logits_TV(model, prompt, tokens) / temperature).log_softmax(-1)
    return logprobs_TV[torch.arange(len(tokens)), torch.from_numpy(tokens).long()]


def greedy(model, prompt: tuple[int, ...]) -> list[int]:
    ids = model.generate(torch.tensor([prompt]), max_new_tokens=MAX_TOKENS, do_sample=False)
    return ids[0, len(prompt) :].tolist()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
async def test_log_probabilities_are_those_of_the_distribution_sampled(
    served: Served, temperature: float
):
    if served.engine.version < 0:
        await served.load(0)
    rollouts = await served.engine.generate(request(num_rollouts=16, temperature=temperature))
    largest = 0.0
    for rollout in rollouts:
        expected = logprobs_T(served.models[0], PROMPT, rollout.tokens, temperature)
        largest = max(largest, (expected - torch.from_numpy(rollout.logprobs)).abs().max().item())
        assert rollout.spans == ((0, 0),)
        assert rollout.finish == ("stop" if rollout.tokens[-1] == 1 else "length")
    print(f"temperature {temperature}: largest difference {largest:.1e}")
    assert largest < 1e-4
    assert len({tuple(rollout.tokens) for rollout in rollouts}) > 1


async def test_a_seed_gives_the_same_rollouts_again(served: Served):
    first = await served.engine.generate(request(seed=12345678901234567))
    again = await served.engine.generate(request(seed=12345678901234567))
    other = await served.engine.generate(request(seed=12345678901234999))
    assert [r.tokens.tolist() for r in first] == [r.tokens.tolist() for r in again]
    assert [r.tokens.tolist() for r in first] != [r.tokens.tolist() for r in other]


async def test_prompts_that_do_not_fit_into_one_step_wait_for_the_next(served: Served):
    """Together they are longer than what one step may prefill."""
    requests = [request((10 + i, *LONG_PROMPT[1:]), 2, max_tokens=2, seed=i) for i in range(30)]
    groups = await asyncio.gather(*(served.engine.generate(r) for r in requests))
    assert [len(group) for group in groups] == [2] * 30


async def test_a_completion_ends_at_its_limit(served: Served):
    [rollout] = await served.engine.generate(request(num_rollouts=1, max_tokens=3))
    assert len(rollout.tokens) == 3
    assert rollout.finish == "length"


async def test_greedy_generation_equals_that_of_transformers(served: Served):
    for prompt in (PROMPT, LONG_PROMPT):
        rollouts = await served.engine.generate(request(prompt, temperature=0.0, num_rollouts=2))
        assert [r.tokens.tolist() for r in rollouts] == [greedy(served.models[0], prompt)] * 2


async def test_a_push_in_the_middle_of_generations_changes_the_tokens_after_it_only(
    served: Served,
):
    """Greedy for all to be equal; and many sampled rollouts, long by their temperature."""
    tasks = [
        asyncio.create_task(served.engine.generate(request((10 + i, 11), 1, temperature)))
        for i in range(24)
        for temperature in (0.0, 2.0)
    ]
    started = served.engine.stats.tokens_generated
    while served.engine.stats.tokens_generated < started + 48 * 4:
        await asyncio.sleep(0.001)
    stalled_s = await served.load(1)
    rollouts = [(await task)[0] for task in tasks]
    mixed, largest = 0, 0.0
    for index, rollout in enumerate(rollouts):
        prompt, temperature = (10 + index // 2, 11), (0.0, 2.0)[index % 2]
        versions = rollout.token_versions
        mixed += len(set(versions)) == 2
        for version in set(versions):
            chosen = versions == version
            model = served.models[version]
            expected = logprobs_T(model, prompt, rollout.tokens, temperature or 1.0)
            difference = (expected - torch.from_numpy(rollout.logprobs)).abs()[chosen]
            largest = max(largest, difference.max().item())
            if temperature == 0.0:
                best = logits_TV(model, prompt, rollout.tokens).argmax(-1).numpy()
                assert (best == rollout.tokens)[chosen].all()
    print(f"{mixed} rollouts of both versions; largest difference {largest:.1e}; {stalled_s=:.3f}")
    assert mixed >= 4
    assert largest < 1e-4


async def test_after_a_push_nothing_of_older_weights_is_in_the_prefix_cache(served: Served):
    before = await served.engine.generate(request(LONG_PROMPT, 1, temperature=0.0))
    await served.load(2)
    after = await served.engine.generate(request(LONG_PROMPT, 1, temperature=0.0))
    assert before[0].tokens.tolist() == greedy(served.models[1], LONG_PROMPT)
    assert after[0].tokens.tolist() == greedy(served.models[2], LONG_PROMPT)
    expected = logprobs_T(served.models[2], LONG_PROMPT, after[0].tokens, 1.0)
    assert (expected - torch.from_numpy(after[0].logprobs)).abs().max() < 1e-4
    # The two differ, or the test would show nothing.
    old = logprobs_T(served.models[1], LONG_PROMPT, after[0].tokens, 1.0)
    assert (expected - old).abs().max() > 1e-2


async def test_a_cancelled_request_ends_in_the_engine_too(served: Served):
    running = asyncio.create_task(served.engine.generate(request(num_rollouts=64, temperature=2.0)))
    started = served.engine.stats.tokens_generated
    while served.engine.stats.tokens_generated == started:
        await asyncio.sleep(0.001)
    assert served.engine.stalled_s > 0
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert served.engine.stalled_s == 0
    [rollout] = await served.engine.generate(request(num_rollouts=1, max_tokens=1))
    assert len(rollout.tokens) == 1


async def test_idle_time_runs_while_there_is_nothing_to_do(served: Served):
    idle = served.engine.stats.idle_seconds
    await asyncio.sleep(0.1)
    assert served.engine.stats.idle_seconds - idle >= 0.09


async def test_more_leases_are_taken_until_something_waits(served: Served):
    engine = served.engine
    at_once = engine._load.max_sequences
    assert engine.capacity(active=0, num_rollouts=8) == at_once // 8
    tasks = [
        asyncio.create_task(engine.generate(request((10 + i % 30, 12), 8, 2.0)))
        for i in range(at_once // 4)
    ]
    seen = set()
    while not all(task.done() for task in tasks):
        seen.add(engine.capacity(active=40, num_rollouts=8))
        await asyncio.sleep(0.005)
    # Half of the sequences wait: no more leases. Towards the end none does: a quarter more.
    assert seen >= {40, 50}


async def test_weights_that_leave_a_parameter_out_end_the_engine(served: Served):
    """Last: the engine is of no use afterwards."""
    with pytest.raises(EngineError, match=r"could not load version 3.*no weights came for"):
        await served.engine.load_weights(3, served.memory, served.specs[:-1])
    assert served.engine.version == 2
    with pytest.raises(EngineError, match="no weights came for"):
        await served.engine.generate(request())
