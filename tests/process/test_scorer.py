"""A scorer asks reward functions that run in a process of their own."""

import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.rewards.pool import RewardFailure, RewardPool
from actors.rewards.scorer import RewardScorer
from protocol.config import RewardConfig
from protocol.errors import RewardError
from tests.unit.actors.rewards.test_scorer import ROW, write_module

NAN = math.nan


@asynccontextmanager
async def make_scorer(folder: Path, source: str, **policies: Any) -> AsyncIterator[RewardScorer]:
    """A scorer for functions of a module; each reward has its function's name and a policy."""
    write_module(folder, source)
    rewards = [
        RewardConfig(name=name, function=f"my_rewards:{name}", on_failure=policy)
        for name, policy in policies.items()
    ]
    pool = RewardPool(rewards, allowed_modules=(), folder=folder, timeout_s=5, processes=1)
    try:
        await pool.start()
        yield RewardScorer(rewards, pool)
    finally:
        await pool.close()


SOURCE = """
def length(completions, **_): return [float(len(c)) for c in completions]
async def sparse(**_): return [None, 0.5]
def broken(answer, **_): return [1 / (int(a) - 4) for a in answer]
"""


async def test_a_group_has_a_column_of_scores_for_each_reward(tmp_path):
    async with make_scorer(tmp_path, SOURCE, length="error", sparse="error") as scorer:
        assert scorer.names == ("length", "sparse")
        scored = await scorer.score("row", ROW, ["a", "bbb"], [[1], [2]], ["stop", "stop"])
    assert scored.scores.dtype == np.float32
    np.testing.assert_array_equal(scored.scores, [[1, NAN], [3, 0.5]])
    assert scored.missing == {}
    assert scorer.failures == {}


@pytest.mark.parametrize("policy", ["drop_group", "error"])
async def test_a_failure_is_counted_and_raised_with_the_reward_and_its_kind(tmp_path, policy):
    async with make_scorer(tmp_path, SOURCE, length="error", broken=policy) as scorer:
        with pytest.raises(RewardFailure) as caught:
            await scorer.score("row", ROW, ["a"], [[1]], ["stop"])
    assert str(caught.value).startswith("reward 'broken' raised ZeroDivisionError: ")
    assert (caught.value.reward, caught.value.kind) == ("broken", "raised")
    assert scorer.failures == {("broken", "raised"): 1}


async def test_a_reward_that_may_be_missing_does_not_apply_where_it_fails(tmp_path, caplog):
    policies = {"broken": "missing", "length": "error"}
    async with make_scorer(tmp_path, SOURCE, **policies) as scorer:
        scored = await scorer.score("train/0/7", ROW, ["a", "bb"], [[1], [2]], ["stop", "stop"])
        np.testing.assert_array_equal(scored.scores, [[NAN, 1], [NAN, 2]])
        cause = "reward 'broken' raised ZeroDivisionError: division by zero (my_rewards.py, line 4)"
        assert scored.missing == {"broken": cause}
        assert scorer.failures == {("broken", "raised"): 1}
        assert caplog.messages == [f"train/0/7: {cause}; the reward counts as missing"]
        # The other rows have it.
        scored = await scorer.score("train/0/8", {**ROW, "answer": "6"}, ["a"], [[1]], ["stop"])
        assert scored.scores.tolist() == [[0.5, 1]]


async def test_a_scorer_with_a_function_that_cannot_be_loaded_does_not_start(tmp_path):
    with pytest.raises(RewardError, match="defines no function f"):
        async with make_scorer(tmp_path, "", f="missing"):
            pass
