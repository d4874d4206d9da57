"""Data sets from files, and the streams of work made from them."""

import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from learner.prompts.rows import load_rows
from learner.prompts.stream import PromptStream, evaluation_work
from protocol.errors import ConfigError
from tests.unit.factories import make_config

ROWS = [
    {"prompt": "one", "answer": "1", "level": 1.5},
    {"prompt": "two", "answer": None, "level": 2.0},
]
CHAT = [{"prompt": [{"role": "user", "content": "hi"}], "answer": "1"}]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def jsonl(tmp_path: Path, rows: list[Any]) -> str:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def refusal(source: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_rows(source, "train")
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- Loading -----------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [ROWS, CHAT], ids=["strings", "messages"])
def test_rows_of_a_jsonl_file_come_as_plain_values(tmp_path, rows):
    assert load_rows(jsonl(tmp_path, rows), "train") == rows


@pytest.mark.parametrize("rows", [ROWS, CHAT], ids=["strings", "messages"])
def test_rows_of_a_parquet_file_come_as_plain_values(tmp_path, rows):
    path = tmp_path / "rows.parquet"
    datasets.Dataset.from_list(rows).to_parquet(path)
    assert load_rows(str(path), "train") == rows


def test_the_example_data_loads(recipe):
    rows = load_rows(str(recipe.parent / "tool_calling_tiny" / "train.jsonl"), "train")
    assert {*rows[0]} == {"prompt", "ground_truth"}


def test_data_without_a_prompt_column_is_refused_with_the_columns_it_has(tmp_path):
    message = refusal(jsonl(tmp_path, [{"question": "one", "answer": "1"}]))
    assert message.endswith("no column 'prompt' among question, answer")


def test_a_prompt_that_is_neither_text_nor_messages_is_refused_with_its_row(tmp_path):
    assert "row 0: prompt is a int" in refusal(jsonl(tmp_path, [{"prompt": 3}]))
    message = refusal(jsonl(tmp_path, [{"prompt": "one"}, {"prompt": None}]))
    assert "row 1: prompt is a NoneType" in message


def test_a_file_that_is_not_there_is_refused(tmp_path):
    path = tmp_path / "none.jsonl"
    assert refusal(str(path)) == f"no such data file: {path}"


def test_a_broken_file_is_refused_with_what_is_wrong_in_it(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "one"}\n{"prompt": \n')
    message = refusal(str(path))
    assert str(path) in message
    assert "JSON parse error" in message


def test_a_file_without_rows_is_refused_as_empty(tmp_path):
    empty, no_rows = tmp_path / "rows.jsonl", tmp_path / "rows.parquet"
    empty.write_text("")
    datasets.Dataset.from_dict({"prompt": []}).to_parquet(no_rows)
    for path in (empty, no_rows):
        assert f"{path} is empty" in refusal(str(path))


# ---- Streams -----------------------------------------------------------------------------------


def make_stream(num_rows: int = 5, seed: int = 0) -> PromptStream:
    config = make_config().model_copy(update={"seed": seed})
    return PromptStream([{"prompt": f"p{i}"} for i in range(num_rows)], config)


def test_every_row_comes_once_an_epoch():
    stream = make_stream(5)
    for epoch in range(3):
        works = [stream.next() for _ in range(5)]
        assert {work.row["prompt"] for work in works} == {f"p{i}" for i in range(5)}
        assert {work.prompt_id.split("/")[1] for work in works} == {str(epoch)}


def test_the_same_seed_gives_the_same_work_and_another_seed_another_order():
    first, second, other = (make_stream(20, seed) for seed in (0, 0, 1))
    order = [first.next() for _ in range(40)]
    assert order == [second.next() for _ in range(40)]
    assert [work.row for work in order] != [other.next().row for _ in range(40)]
    # Epochs differ from each other as well.
    assert [work.row for work in order[:20]] != [work.row for work in order[20:]]


def test_no_two_pieces_of_work_share_a_seed():
    streams = [make_stream(20, seed) for seed in (0, 1)]
    works = [stream.next() for stream in streams for _ in range(60)]
    config = make_config(data={"heldout": "h"}, eval={"sets": [{"name": "more"}]})
    for heldout in evaluation_work([[{"prompt": "p"}] * 20] * 2, config, due=0).values():
        works += heldout
    seeds = {work.seed for work in works}
    assert len(seeds) == len(works)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_training_work_samples_as_the_configuration_says():
    work = make_stream().next()
    assert (work.num_rollouts, work.temperature, work.max_tokens) == (2, 1.0, 8)
    assert (work.purpose, work.attempts) == ("train", 0)


def test_an_empty_stream_is_refused():
    with pytest.raises(ConfigError, match="empty"):
        PromptStream([], make_config())


def test_evaluations_are_the_same_every_time():
    config = make_config(
        data={"heldout": "h"},
        eval={
            "prompts": 3,
            "num_rollouts": 5,
            "temperature": 0.5,
            "sets": [{"name": "greedy", "prompts": 9, "temperature": 0}],
        },
    )
    rows = [{"prompt": f"p{i}"} for i in range(9)]
    works = evaluation_work([rows, rows], config, due=0)
    later = evaluation_work([rows, rows], config, due=7)
    assert works.keys() == later.keys() == {"heldout", "greedy"}
    for name, of_set in works.items():
        assert [work.seed for work in of_set] == [work.seed for work in later[name]]
        assert {work.purpose for work in of_set} == {"eval"}
    assert [work.row for work in works["heldout"]] == rows[:3]
    assert [work.row for work in works["greedy"]] == rows
    sampled = {name: works[name][0] for name in works}
    found = {n: (w.num_rollouts, w.temperature, w.max_tokens) for n, w in sampled.items()}
    assert found == {"heldout": (5, 0.5, 8), "greedy": (1, 0.0, 8)}
    assert [works["heldout"][0].prompt_id, later["greedy"][8].prompt_id] == [
        "heldout/0/0",
        "greedy/7/8",
    ]
