"""What is kept of the batches that a run trains on, by a thread that nobody waits for."""

import logging
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest

from learner.completions.files import Completion, CompletionFiles, read_completions
from learner.completions.keeper import (
    MAX_WAITING,
    NEWEST_EVERY_S,
    CompletionKeeper,
    TrainedOn,
)
from tests.unit.factories import FakeClock, make_group

GROUPS, ROLLOUTS = 3, 4


class Tokenizer:
    """Texts that tell their tokens, and whether special ones were to be left out."""

    def batch_decode(self, ids: Any, skip_special_tokens: bool = False) -> list[str]:
        kind = "completion" if skip_special_tokens else "prompt"
        return [f"{kind} of {len(tokens)}" for tokens in ids]


def make_batch(step: int, **changes: Any) -> TrainedOn:
    groups = [make_group(version=step - 1, lengths=(1, 2, 3, 4)) for _ in range(GROUPS)]
    values: dict[str, Any] = {
        "step": step,
        "groups": groups,
        "prompt_indices": [step * 100 + p for p in range(GROUPS)],
        "advantages_PG": np.arange(GROUPS * ROLLOUTS).reshape(GROUPS, ROLLOUTS) / 8,
    }
    return TrainedOn(**values | changes)


def make_keeper(folder: Path, **changes: Any) -> CompletionKeeper:
    options: dict[str, Any] = {"per_step": 2, "seed": 1, "load_tokenizer": Tokenizer}
    return CompletionKeeper(CompletionFiles(folder, max_bytes=4 << 20), **options | changes)


def kept(folder: Path) -> list[Completion]:
    return list(read_completions(folder))


def sampled(folder: Path, steps: range, **changes: Any) -> list[Completion]:
    """What is kept of the steps before the last one."""
    keeper = make_keeper(folder, **changes)
    keeper.start()
    for step in steps:
        keeper.add(make_batch(step))
    keeper.close()
    return [row for row in kept(folder) if row.step != steps[-1]]


def test_a_completion_is_kept_with_all_that_is_known_of_it(tmp_path):
    keeper = make_keeper(tmp_path)
    keeper.start()
    keeper.add(make_batch(5))
    keeper.close()
    [row] = [row for row in kept(tmp_path) if (row.prompt_index, row.rollout) == (501, 2)]
    assert row == Completion(
        step=5,
        prompt_index=501,
        rollout=2,
        prompt="prompt of 2",
        completion="completion of 3",
        tokens=3,
        finish="stop",
        oldest_version=4,
        newest_version=4,
        advantage=(1 * ROLLOUTS + 2) / 8,
        scores={"format": 2.0, "correctness": 1.0},
    )


def test_all_of_the_newest_step_and_a_sample_of_every_other_one(tmp_path):
    assert len(sampled(tmp_path, range(1, 31))) == 29 * 2
    steps = [row.step for row in kept(tmp_path)]
    assert sorted(set(steps)) == list(range(1, 31))
    assert steps.count(30) == GROUPS * ROLLOUTS


def test_a_step_that_is_made_again_has_the_same_sample(tmp_path):
    first = sampled(tmp_path / "first", range(1, 6))
    assert sampled(tmp_path / "again", range(1, 6)) == first
    assert sampled(tmp_path / "other", range(1, 6), seed=2) != first
    # Not one place of all steps.
    assert len({(row.prompt_index % 100, row.rollout) for row in first}) > 2


def test_a_sample_larger_than_the_batch_is_all_of_it(tmp_path):
    assert len(sampled(tmp_path, range(1, 3), per_step=100)) == GROUPS * ROLLOUTS


def test_where_none_is_wanted_there_is_no_folder(tmp_path):
    keeper = make_keeper(tmp_path / "none", per_step=0)
    keeper.start()
    keeper.add(make_batch(1))
    keeper.close()
    assert not (tmp_path / "none").exists()


def test_quick_steps_share_an_addition_to_the_files(tmp_path, monkeypatch):
    clock, additions, wholes = FakeClock(), [], []
    wrote = Event()
    monkeypatch.setattr(CompletionFiles, "add", lambda self, rows: additions.append(len(rows)))

    def replace_newest(self: CompletionFiles, rows: list[Completion]) -> None:
        wholes.append(rows[0].step)
        wrote.set()

    monkeypatch.setattr(CompletionFiles, "replace_newest", replace_newest)
    keeper = make_keeper(tmp_path, clock=clock)
    keeper.start()
    keeper.add(make_batch(1))
    assert wrote.wait(10)
    for step in range(2, 12):
        keeper.add(make_batch(step))
    clock.advance(NEWEST_EVERY_S)
    wrote.clear()
    keeper.add(make_batch(12))
    assert wrote.wait(10)
    keeper.close()
    assert additions[0] == 2
    assert sum(additions) == 12 * 2
    assert (wholes[0], wholes[-1]) == (1, 12)
    # The thread may have seen that it is time before the last step came, and again at the end.
    assert len(additions) <= 3
    assert len(wholes) <= 3


def test_what_waits_is_written_for_a_checkpoint(tmp_path, monkeypatch):
    added, whole = Event(), Event()
    monkeypatch.setattr(CompletionFiles, "add", lambda self, rows: added.set())
    monkeypatch.setattr(CompletionFiles, "replace_newest", lambda self, rows: whole.set())
    keeper = make_keeper(tmp_path, clock=FakeClock())
    keeper.start()
    keeper.add(make_batch(1))
    assert whole.wait(10)
    added.clear()
    keeper.add(make_batch(2))
    assert not added.wait(0.2)
    keeper.write_soon()
    assert added.wait(10)
    keeper.close()


def test_a_thread_that_hangs_holds_nobody_up_and_costs_no_memory(tmp_path, caplog):
    hangs, hung = Event(), Event()

    def load_tokenizer() -> Tokenizer:
        hangs.set()
        assert hung.wait(30)
        return Tokenizer()

    keeper = make_keeper(tmp_path, load_tokenizer=load_tokenizer)
    keeper.start()
    keeper.add(make_batch(1))
    assert hangs.wait(10)
    for step in range(2, 501):
        keeper.add(make_batch(step))
    hung.set()
    keeper.close()
    # What it hung with, and the last of those that came meanwhile.
    steps = sorted({row.step for row in kept(tmp_path)})
    assert steps == [1, *range(501 - MAX_WAITING, 501)]
    [record] = caplog.records
    assert f"of {499 - MAX_WAITING} steps" in record.getMessage()


@pytest.mark.parametrize("where", ["disk", "tokenizer"])
def test_what_fails_is_said_once_and_ends_nothing(tmp_path, caplog, monkeypatch, where):
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    if where == "disk":
        monkeypatch.setattr(CompletionFiles, "add", fail)
    keeper = make_keeper(tmp_path, load_tokenizer=fail if where == "tokenizer" else Tokenizer)
    keeper.start()
    with caplog.at_level(logging.WARNING):
        for step in range(1, 4):
            keeper.add(make_batch(step))
        keeper.close()
    [line] = [record.getMessage() for record in caplog.records]
    assert line.startswith("completions are not kept any more: ")
    assert "No space left on device" in line


def test_a_resumed_run_has_every_step_once(tmp_path):
    sampled(tmp_path, range(1, 11))
    keeper = make_keeper(tmp_path)
    keeper.start()
    keeper.resume(6)
    for step in range(7, 13):
        keeper.add(make_batch(step))
    keeper.close()
    rows = kept(tmp_path)
    assert len({row.key for row in rows}) == len(rows)
    assert [row.step for row in rows if row.step < 12] == [s for s in range(1, 12) for _ in "ab"]
