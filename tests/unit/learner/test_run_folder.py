"""Run folders: new for every run, never half a file."""

import json
import os
import resource

import pytest

from learner.config.file import load_config
from learner.run_folder import RunFolder
from protocol.errors import ConfigError, TrainingError


def test_an_earlier_run_of_the_same_name_is_never_touched(recipe, tmp_path):
    config = load_config(recipe, [f"runs_folder={tmp_path}", "name=demo"])
    first = RunFolder.create(config)
    first.write_summary({"step": 1})
    assert RunFolder.create(config).path == tmp_path / "demo-2"
    assert RunFolder.create(config).path == tmp_path / "demo-3"
    assert json.loads((tmp_path / "demo" / "summary.json").read_text()) == {"step": 1}


def test_the_resolved_configuration_is_in_the_folder(recipe, tmp_path):
    config = load_config(recipe, [f"runs_folder={tmp_path}", "optimizer.lr=1e-5"])
    folder = RunFolder.create(config)
    assert load_config(folder.path / "config.toml") == config


def test_a_line_of_metrics_is_on_disk_at_once(recipe, tmp_path):
    folder = RunFolder.create(load_config(recipe, [f"runs_folder={tmp_path}"]))
    for step in (1, 2):
        folder.append_step({"step": step})
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
    first.take()
    second = RunFolder(first.path)
    with pytest.raises(ConfigError, match="another learner works in"):
        second.take()
    first.close()
    second.take()
    second.close()


def test_a_resume_that_is_refused_leaves_the_run_as_it_was(recipe, tmp_path):
    folder = make_folder(recipe, tmp_path)
    folder.write_summary({"step": 1})
    before = (folder.path / "config.toml").read_bytes()
    folder.take()
    folder.close()
    assert (folder.path / "config.toml").read_bytes() == before
    assert (folder.path / "summary.json").exists()


def test_a_run_that_is_complete_goes_on_only_with_more_steps(recipe, tmp_path):
    folder = make_folder(recipe, tmp_path, "training.steps=5")
    folder.write_summary({"steps": 5, "completed": True})
    with pytest.raises(ConfigError, match=r"is complete, with 5 steps; .* training\.steps=N"):
        RunFolder.resume(folder.path, [])
    RunFolder.resume(folder.path, ["training.steps=6"])
    # One that was stopped while it was evaluated.
    folder.write_summary({"steps": 5, "completed": False})
    RunFolder.resume(folder.path, [])
    (folder.path / "summary.json").write_text("{")
    with pytest.raises(ConfigError, match=r"summary\.json is damaged"):
        RunFolder.resume(folder.path, [])


def test_the_run_id_stays(recipe, tmp_path):
    folder = make_folder(recipe, tmp_path)
    assert RunFolder(folder.path).run_id == folder.run_id
    (folder.path / "run.json").write_text("{")
    with pytest.raises(ConfigError, match=r"run\.json is missing or damaged"):
        _ = folder.run_id


def test_a_folder_of_no_run_cannot_be_resumed(tmp_path):
    with pytest.raises(ConfigError, match="is no folder of a run that can be resumed"):
        RunFolder.resume(tmp_path, [])


def test_steps_that_are_trained_again_are_forgotten_and_half_a_line_too(recipe, tmp_path):
    folder = make_folder(recipe, tmp_path)
    for step in (1, 2, 3):
        folder.append_step({"step": step})
    folder.close()
    path = folder.path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 4, "lo')
    again = RunFolder(folder.path)
    again.forget_steps_after(2)
    again.append_step({"step": 3, "again": True})
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == [{"step": 1}, {"step": 2}, {"step": 3, "again": True}]
    again.close()


def test_half_a_line_does_not_stay_when_the_disk_is_full(recipe, tmp_path):
    folder = make_folder(recipe, tmp_path)
    folder.append_step({"step": 1})
    path = folder.path / "metrics.jsonl"
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Room for five bytes more.
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 5, limits[1]))
    try:
        with pytest.raises(TrainingError, match=r"cannot write .*metrics\.jsonl: File too large"):
            folder.append_step({"step": 2, "text": "x" * 100})
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
        lambda: folder.write_summary({}),
        lambda: folder.write_endpoints("a", "b"),
        lambda: folder.write_control("a", "b"),
        lambda: folder.write_evaluation({}),
        lambda: folder.go_on(load_config(recipe)),
    ):
        with pytest.raises(TrainingError, match=expected):
            write()
    assert (folder.path / "config.toml").read_bytes() == before
