"""Completions in files: complete or not there, bounded, and none twice after a resume."""

import math
from pathlib import Path

import pytest
from pyarrow import parquet

from learner.completions.files import FILE_BYTES, CompletionFiles, read_completions
from protocol.errors import ConfigError
from tests.unit.learner.completions.examples import make_completion, make_long_completion

MAX_BYTES = 8 << 20


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "completions.parquet"


def filled(folder: Path, steps: range, *, size: int = 100) -> CompletionFiles:
    """The sample of these steps, one completion each."""
    files = CompletionFiles(folder, max_bytes=MAX_BYTES)
    for step in steps:
        files.add([make_long_completion(step, size=size)])
    return files


def kept_steps(folder: Path) -> list[int]:
    return [row.step for row in read_completions(folder)]


def used_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def test_what_is_kept_comes_back_as_it_was(folder):
    rows = [
        make_completion(3, completion="fünf\n\x1b[31m", advantage=-0.25),
        make_completion(4, scores={"format": 0.5, "correctness": -2.0}, finish="length"),
    ]
    CompletionFiles(folder, max_bytes=MAX_BYTES).add(rows)
    assert list(read_completions(folder)) == rows


def test_a_reward_that_does_not_apply_has_no_score(folder):
    row = make_completion(scores={"format": 1.0, "correctness": math.nan})
    CompletionFiles(folder, max_bytes=MAX_BYTES).add([row])
    [back] = read_completions(folder)
    assert math.isnan(back.scores["correctness"])
    assert back.scores["format"] == 1.0
    assert parquet.read_table(folder)["reward/correctness"].to_pylist() == [None]


def test_others_read_the_folder_as_one_table_without_the_newest_batch(folder):
    # 40 steps of 200 kB are more than one file.
    files = filled(folder, range(1, 41), size=200_000)
    files.replace_newest([make_completion(40, rollout=r) for r in range(4)])
    (folder / "_steps-00000001.parquet.partial").write_bytes(b"of a learner that was killed")
    assert len(list(folder.glob("steps-*.parquet"))) > 1
    assert sorted(parquet.read_table(folder)["step"].to_pylist()) == list(range(1, 41))


def test_a_completion_of_sample_and_newest_batch_is_read_once(folder):
    files = CompletionFiles(folder, max_bytes=MAX_BYTES)
    files.add([make_completion(2, rollout=1)])
    files.replace_newest([make_completion(2, rollout=r) for r in range(3)])
    assert sorted(row.rollout for row in read_completions(folder)) == [0, 1, 2]


def test_the_newest_batch_takes_the_place_of_the_one_before(folder):
    files = CompletionFiles(folder, max_bytes=MAX_BYTES)
    for step in (1, 2):
        files.replace_newest([make_completion(step, rollout=r) for r in range(3)])
    assert kept_steps(folder) == [2, 2, 2]


def test_the_oldest_go_where_there_is_no_room(folder):
    files = CompletionFiles(folder, max_bytes=MAX_BYTES)
    for step in range(1, 201):
        files.add([make_long_completion(step, size=200_000)])
        files.replace_newest([make_long_completion(step, size=200_000, rollout=1)])
        assert used_bytes(folder) <= MAX_BYTES
    steps = sorted(set(kept_steps(folder)))
    assert steps == list(range(steps[0], 201))
    # 200 kB of hexadecimal digits take 100 kB: of 8 MiB the newest batch has one of them.
    assert 40 < len(steps) < 84


def test_a_batch_larger_than_its_share_of_the_room_is_kept_in_part(folder):
    files = CompletionFiles(folder, max_bytes=MAX_BYTES)
    rows = [make_long_completion(1, size=100_000, rollout=r) for r in range(100)]
    files.replace_newest(rows)
    # A quarter of 8 MiB is 2,097,152 bytes; a character may take four.
    assert len(kept_steps(folder)) == 2_097_152 // (4 * (100_000 + len("2 + 3 =")))


def test_an_addition_costs_the_same_however_long_the_run_is(folder):
    files = filled(folder, range(1, 100), size=200_000)
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    files.add([make_long_completion(100, size=200_000)])
    changed = [p for p in folder.iterdir() if before.get(p) != p.stat().st_mtime_ns]
    assert len(changed) == 1
    assert changed[0].stat().st_size < FILE_BYTES + 200_000


def test_a_resumed_run_has_every_step_once(folder):
    filled(folder, range(1, 61), size=100_000)
    again = CompletionFiles(folder, max_bytes=MAX_BYTES)
    assert again.forget_after(30) == []
    assert kept_steps(folder) == list(range(1, 31))
    for step in range(31, 80):
        again.add([make_long_completion(step, size=100_000)])
    assert kept_steps(folder) == list(range(1, 80))


def test_a_newest_batch_that_will_be_made_again_is_forgotten(folder):
    files = filled(folder, range(1, 11))
    files.replace_newest([make_completion(10, rollout=r) for r in range(4)])
    CompletionFiles(folder, max_bytes=MAX_BYTES).forget_after(9)
    assert kept_steps(folder) == list(range(1, 10))


def test_a_damaged_file_is_one_clear_line_and_ends_no_resume(folder):
    filled(folder, range(1, 41), size=200_000)
    first, *_ = sorted(folder.glob("steps-*.parquet"))
    whole = first.read_bytes()
    first.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ConfigError, match=r"steps-00000001.parquet is damaged: ") as caught:
        list(read_completions(folder))
    assert len(str(caught.value).splitlines()) == 1
    [text] = CompletionFiles(folder, max_bytes=MAX_BYTES).forget_after(40)
    assert "is damaged" in text
    assert kept_steps(folder) == list(range(kept_steps(folder)[0], 41))


def test_a_table_of_somebody_else_is_damaged(folder):
    CompletionFiles(folder, max_bytes=MAX_BYTES).add([make_completion()])
    [path] = folder.iterdir()
    parquet.write_table(parquet.read_table(path).drop_columns("finish"), path)
    with pytest.raises(ConfigError, match=r"is damaged: its column 'finish' is missing"):
        list(read_completions(folder))


def test_a_folder_without_any_says_why(folder):
    with pytest.raises(ConfigError, match=r"no completions in .*completions\.per_step = 0"):
        list(read_completions(folder))
