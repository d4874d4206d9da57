"""Run folders: new for every run, never half a file."""

import json
import math
import os
import re
import resource
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given
from hypothesis import strategies as st

from learner.config.file import load_config
from learner.records import Control, Endpoints
from learner.run_folder import RunFolder
from protocol.errors import ConfigError, TrainingError
from tests.unit.record_examples import STEP, SUMMARY, make_evaluation, make_step, make_summary

ENDPOINTS = Endpoints(learner="tcp://127.0.0.1:1", metrics="http://127.0.0.1:2/metrics")
CONTROL = Control(url="http://127.0.0.1:2", token="secret")


def test_an_earlier_run_of_the_same_name_is_never_touched(recipe, tmp_path):
    config = load_config(recipe, [f"runs_folder={tmp_path}", "name=demo"])
    first = RunFolder.create(config)
    first.write_summary(make_summary(steps=1))
    assert RunFolder.create(config).path == tmp_path / "demo-2"
    assert RunFolder.create(config).path == tmp_path / "demo-3"
    assert json.loads((tmp_path / "demo" / "summary.json").read_text()) == SUMMARY | {"steps": 1}


def test_the_resolved_configuration_is_in_the_folder(recipe, tmp_path):
    config = load_config(recipe, [f"runs_folder={tmp_path}", "optimizer.lr=1e-5"])
    folder = RunFolder.create(config)
    assert load_config(folder.path / "config.toml") == config


def test_a_line_of_metrics_is_on_disk_at_once(recipe, tmp_path):
    folder = RunFolder.create(load_config(recipe, [f"runs_folder={tmp_path}"]))
    for step in (1, 2):
        folder.append_step(make_step(step))
        lines = (folder.path / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == list(range(1, step + 1))
    folder.close()


def test_a_folder_that_cannot_be_written_is_an_error_of_the_user(recipe, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot write"):
        RunFolder.create(load_config(recipe, [f"runs_folder={tmp_path}/file"]))


# ---- Going on ----------------------------------------------------------------------------------


def make_folder(recipe, tmp_path, *overrides: str) -> RunFolder:
    return RunFolder.create(load_config(recipe, [f"runs_folder={tmp_path}", *overrides]))


@pytest.mark.parametrize(
    "override",
    [
        "training.steps=500",
        "optimizer.lr=1e-5",
        "training.batch_groups=8",
        "training.max_staleness=5",
        "endpoints.bind=tcp://127.0.0.1:0",
        "checkpoints.every_steps=3",
        "buffer.max_groups=500",
        "rewards.format.on_failure=error",
        "actor.engine=transformers",
    ],
)
def test_what_groups_do_not_depend_on_may_change_when_a_run_goes_on(recipe, tmp_path, override):
    path = make_folder(recipe, tmp_path).path
    folder, config = RunFolder.resume(path, [override])
    assert config != load_config(path / "config.toml")
    # Only when the learner found nothing wrong with it does it hold.
    folder.go_on(config)
    assert load_config(path / "config.toml") == config


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("seed=7", "seed"),
        ("data.train=other.jsonl", "data"),
        ("model.dtype=bfloat16", "model.dtype"),
        ("model.path=elsewhere", "model.path"),
        ("sampling.temperature=0.5", "sampling"),
        ("buffer.durability=memory", "buffer.durability"),
        ("buffer.max_uses=2", "buffer.max_uses"),
        ("rewards.format.weight=2.0", "rewards"),
        ("rewards.format.function=tasks:other", "rewards"),
    ],
)
def test_what_groups_and_batches_depend_on_may_not(recipe, tmp_path, override, key):
    path = make_folder(recipe, tmp_path).path
    with pytest.raises(ConfigError, match=f"^{key} cannot change when a run is resumed"):
        RunFolder.resume(path, [override])


def test_one_learner_works_in_a_folder_at_a_time(recipe, tmp_path):
    first = make_folder(recipe, tmp_path)
    first.claim()
    second = RunFolder(first.path)
    with pytest.raises(ConfigError, match="another learner works in"):
        second.claim()
    first.close()
    second.claim()
    second.close()


def test_a_resume_that_is_refused_leaves_the_run_as_it_was(recipe, tmp_path):
    folder = make_folder(recipe, tmp_path)
    folder.write_summary(make_summary())
    before = (folder.path / "config.toml").read_bytes()
    folder.claim()
    folder.close()
    assert (folder.path / "config.toml").read_bytes() == before
    assert (folder.path / "summary.json").exists()


def test_a_run_that_is_complete_goes_on_only_with_more_steps(recipe, tmp_path):
    folder = make_folder(recipe, tmp_path, "training.steps=5")
    folder.write_summary(make_summary(steps=5))
    with pytest.raises(ConfigError, match=r"is complete, with 5 steps; .* training\.steps=N"):
        RunFolder.resume(folder.path, [])
    RunFolder.resume(folder.path, ["training.steps=6"])
    # One that was stopped while it was evaluated.
    folder.write_summary(make_summary(steps=5, completed=False))
    RunFolder.resume(folder.path, [])
    (folder.path / "summary.json").write_text("{")
    with pytest.raises(ConfigError, match=r"summary\.json is damaged"):
        RunFolder.resume(folder.path, [])


def test_the_run_id_stays(recipe, tmp_path):
    folder = make_folder(recipe, tmp_path)
    assert RunFolder(folder.path).run_id == folder.run_id
    (folder.path / "run.json").write_text("{")
    with pytest.raises(ConfigError, match=r"run\.json is damaged"):
        _ = folder.run_id


def test_a_folder_of_no_run_cannot_be_resumed(tmp_path):
    with pytest.raises(ConfigError, match="is no folder of a run that can be resumed"):
        RunFolder.resume(tmp_path, [])


def test_steps_that_are_trained_again_are_forgotten_and_damaged_lines_too(recipe, tmp_path):
    folder = make_folder(recipe, tmp_path)
    for step in (1, 2, 3):
        folder.append_step(make_step(step))
    folder.close()
    path = folder.path / "metrics.jsonl"
    # What nobody could read at the end of the run goes too.
    path.write_bytes(b'{"step": 1}\n\xff\xfe\n' + path.read_bytes() + b'{"step": 4, "lo')
    again = RunFolder(folder.path)
    again.forget_steps_after(2)
    again.append_step(make_step(3, again=1.0))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == [STEP, STEP | {"step": 2}, STEP | {"step": 3, "again": 1.0}]
    again.close()


def test_half_a_line_does_not_stay_when_the_disk_is_full(recipe, tmp_path):
    folder = make_folder(recipe, tmp_path)
    folder.append_step(make_step(1))
    path = folder.path / "metrics.jsonl"
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Room for five bytes more.
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 5, limits[1]))
    try:
        with pytest.raises(TrainingError, match=r"cannot write .*metrics\.jsonl: File too large"):
            folder.append_step(make_step(2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    folder.close()


def test_what_cannot_be_written_is_an_error_that_says_how_to_go_on(recipe, tmp_path, monkeypatch):
    folder = make_folder(recipe, tmp_path)
    before = (folder.path / "config.toml").read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    expected = rf"cannot write .*: No space left on device; .*gdpo learner --resume {folder.path}"
    for write in (
        lambda: folder.write_summary(make_summary()),
        lambda: folder.write_endpoints(ENDPOINTS),
        lambda: folder.write_control(CONTROL),
        lambda: folder.go_on(load_config(recipe)),
    ):
        with pytest.raises(TrainingError, match=expected):
            write()
    assert (folder.path / "config.toml").read_bytes() == before


def test_an_evaluation_that_cannot_be_written_is_such_an_error_too(recipe, tmp_path):
    folder = make_folder(recipe, tmp_path)
    (folder.path / "evaluations.jsonl").mkdir()
    with pytest.raises(TrainingError, match=r"cannot write .*evaluations\.jsonl: Is a directory"):
        folder.append_evaluation(make_evaluation())


def test_evaluations_of_versions_that_are_made_anew_are_forgotten(recipe, tmp_path):
    folder = make_folder(recipe, tmp_path)
    folder.forget_evaluations_after(4)
    kept, gone = (make_evaluation(due=due, version=due + 1) for due in (3, 4))
    for evaluation in (kept, gone):
        folder.append_evaluation(evaluation)
    with (folder.path / "evaluations.jsonl").open("a") as lines:
        lines.write('{"due": 5, "ver')  # a learner was killed
    folder.forget_evaluations_after(4)
    assert folder.read_evaluations() == [kept]


# ---- Reading what was written ------------------------------------------------------------------


def full_folder(recipe, tmp_path) -> RunFolder:
    """One that holds everything."""
    folder = make_folder(recipe, tmp_path)
    folder.write_endpoints(ENDPOINTS)
    folder.write_control(CONTROL)
    folder.append_evaluation(make_evaluation())
    folder.write_summary(make_summary())
    for step in (1, 2):
        folder.append_step(make_step(step))
    return folder


READERS: dict[str, Callable[[RunFolder], object]] = {
    "run.json": lambda folder: folder.run_id,
    "config.toml": RunFolder.read_config,
    "endpoints.json": RunFolder.read_endpoints,
    "control.json": RunFolder.read_control,
    "evaluations.jsonl": RunFolder.read_evaluations,
    "summary.json": RunFolder.read_summary,
    "metrics.jsonl": RunFolder.read_steps,
}


def test_what_was_written_is_read_back_equal(recipe, tmp_path):
    folder = full_folder(recipe, tmp_path)
    again = RunFolder(folder.path)
    assert again.read_config() == load_config(folder.path / "config.toml")
    assert again.read_endpoints() == ENDPOINTS
    assert again.read_control() == CONTROL
    assert again.read_evaluations() == [make_evaluation()]
    assert again.read_summary() == make_summary()
    assert again.read_steps() == [make_step(1), make_step(2)]
    assert again.num_steps == 2
    assert again.run_id == folder.run_id
    folder.close()


NUMBERS = st.floats(allow_nan=False)
NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)


@given(
    metrics=st.dictionaries(NAMES.filter(lambda name: name not in STEP), NUMBERS, max_size=4),
    rewards=st.dictionaries(NAMES, NUMBERS, max_size=4),
    seconds=NUMBERS,
    difference=st.none() | NUMBERS,
)
def test_a_step_of_any_figures_is_read_back_equal(metrics, rewards, seconds, difference):
    step = make_step(
        rewards=rewards, seconds=seconds, lag0_logprob_difference=difference, **metrics
    )
    with TemporaryDirectory() as path:
        folder = RunFolder(Path(path))
        folder.append_step(step)
        folder.close()
        assert folder.read_steps() == [step]
        [line] = (Path(path) / "metrics.jsonl").read_text().splitlines()
    # The metrics of the loss stand beside the other keys, as they always have.
    assert json.loads(line) == STEP | {
        "rewards": rewards,
        "seconds": seconds,
        "lag0_logprob_difference": difference,
        **metrics,
    }
    assert step.metrics == {"loss": 0.125, "ess": 0.5, **metrics}


def test_a_reward_that_applied_to_nothing_is_read_back_as_that(tmp_path):
    folder = RunFolder(tmp_path)
    folder.append_step(make_step(rewards={"format": math.nan}, loss=math.inf))
    folder.close()
    [step] = folder.read_steps()
    assert math.isnan(step.rewards["format"])
    assert step.metrics["loss"] == math.inf


DAMAGES = {
    "nothing": b"",
    "half": b'{"step": 1, "lo',
    "another type": b"[]\n",
    "another value": b'{"run_id": 1, "steps": "many", "metrics": [], "url": {}}\n',
    "no text": b'{"step": "\xff\xfe"}\n',
    "nested": b"[" * 100_000,
    "a huge number": b'{"step": ' + b"9" * 10_000 + b"}",
}


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_one_clear_line(recipe, tmp_path, name, damage):
    folder = full_folder(recipe, tmp_path)
    if (name, damage) == ("evaluations.jsonl", "nothing"):
        # A run without evaluations has none in it.
        folder.close()
        return
    (folder.path / name).write_bytes(DAMAGES[damage])
    with pytest.raises(ConfigError) as caught:
        READERS[name](RunFolder(folder.path))
    text = str(caught.value)
    assert name in text
    assert text.isprintable()
    assert len(text) < 1000
    folder.close()


@pytest.mark.parametrize("name", READERS)
def test_a_missing_file_is_one_clear_line(tmp_path, name):
    folder = RunFolder(tmp_path)
    if name == "evaluations.jsonl":
        assert folder.read_evaluations() == []
        return
    with pytest.raises(ConfigError, match=re.escape(name)):
        READERS[name](folder)


def test_a_damaged_line_of_metrics_is_named(recipe, tmp_path):
    folder = full_folder(recipe, tmp_path)
    folder.close()
    with (folder.path / "metrics.jsonl").open("a") as lines:
        lines.write('{"step": 3}\n')
    with pytest.raises(ConfigError, match=r"line 3 of .*metrics\.jsonl is damaged: seconds: Field"):
        folder.read_steps()


def test_a_learner_before_is_forgotten(recipe, tmp_path):
    folder = full_folder(recipe, tmp_path)
    folder.close()
    folder.forget_last_learner()
    assert not folder.has_endpoints
    assert not folder.has_summary
