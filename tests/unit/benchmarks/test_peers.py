"""`make bench-peers`: what it makes of the figures of two systems."""

import os

import pytest

from benchmarks.peers.cases import instruct_row
from benchmarks.peers.report import memory_text, row
from benchmarks.peers.result import Result, of_ours, of_trl
from benchmarks.peers.watch import Watch, family, role
from learner.records import Step
from tests.unit.record_examples import make_step


def trl_lines() -> list[dict[str, float]]:
    return [
        {"seconds": 4.0, "generation": 1.0, "rewards": 0.2, "tokens": 80},
        {"seconds": 6.0, "generation": 1.8, "rewards": 0.6, "tokens": 160},
    ]


def steps() -> list[Step]:
    return [
        make_step(n, seconds=2.0 + n, step_seconds=1.0, **{"completions/mean_length": 9.0})
        for n in (1, 2)
    ]


def test_the_time_that_is_neither_generation_nor_rewards_is_training():
    result = of_trl(8, trl_lines())
    assert result.split == pytest.approx({"generation": 0.3, "rewards": 0.1, "training": 0.6})
    # 16 samples in 6 s, 160 tokens in 16 samples.
    assert result.samples_per_s == pytest.approx(16 / 6)
    assert result.tokens_per_sample == 10
    # 4 s, then 2 s.
    assert result.batch_seconds == 3.0


def test_the_learner_waits_when_it_is_in_no_step():
    result = of_ours(8, steps(), None)
    assert result.split["training"] == pytest.approx(2 / 4)
    assert result.split["learner waits"] == pytest.approx(2 / 4)
    assert result.samples_per_s == pytest.approx(16 / 4)


def test_the_actors_time_adds_up():
    split = of_ours(8, steps(), None).split
    assert split["generation"] + split["actors wait"] + split["actors load weights"] == 1


def test_warm_leaves_the_first_quarter_out():
    # 4 batches of 10, the first of which took 7 s and the others 1 s each.
    result = Result("TRL", 10, [7.0, 8.0, 9.0, 10.0], 1.0, {})
    assert result.samples_per_s == 4.0
    assert result.later_samples_per_s == 10.0


def test_a_run_without_a_batch_has_a_row_that_says_why():
    empty = of_trl(8, [], note="no batch in 300 s")
    cells = row(_case(), empty, empty)
    assert "no batch in 300 s" in cells
    assert cells[2] == "0"


def test_the_ratio_is_to_the_first_system():
    base, other = Result("TRL", 8, [4.0], 1.0, {}), Result("async-gdpo", 8, [1.0], 1.0, {})
    assert row(_case(), other, base)[4] == "4.00"
    assert row(_case(), base, base)[4] == "1.00"


def test_many_processes_of_a_role_are_one_figure():
    text = memory_text({"actor": [2_000_000, 1_000_000], "rewards": [3_000_000] * 9})
    assert text == "actor 2 + 1\nrewards 9 of up to 3"


def test_a_process_watches_its_own_memory():
    watch = Watch(os.getpid())
    watch.look()
    [peaks] = watch.peaks.values()
    # Python alone has ten megabytes.
    assert peaks[0] > 10_000_000
    assert os.getpid() in family(os.getppid())


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("python -P -m deploy learner c.toml", "learner"),
        ("python -m deploy actor --learner tcp://127.0.0.1:5555", "actor"),
        ("python -m deploy run recipe.toml", "launcher"),
        ("python -m benchmarks.peers.with_trl case.json lines.jsonl", "trainer"),
        ("python -c from-actors.rewards.guard-import-main", "rewards"),
        ("bash", "other"),
    ],
)
def test_what_a_process_is_there_for(arguments: str, expected: str):
    assert role(arguments.split()) == expected


def test_an_instruct_prompt_asks_for_what_the_ground_truth_holds():
    from actors.tasks.tool_calling_tiny import ToolCall

    made = instruct_row((ToolCall("route", ("paris", "foot")),))
    [message] = made["prompt"]
    assert message["content"].endswith("Now: route paris foot")
    assert (
        '{"name": "route", "parameters": {"city": "paris", "mode": "foot"}}' in made["ground_truth"]
    )


def _case():
    from benchmarks.peers.cases import Case

    return Case("tiny", "model", "rows", batches=1, lr=1e-3)
