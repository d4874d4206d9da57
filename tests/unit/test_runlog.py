"""Run folders: new for every run, never half a file."""

import json

import pytest

from learner.config_file import load_config
from learner.runlog import RunFolder
from protocol.errors import ConfigError


def test_an_earlier_run_of_the_same_name_is_never_touched(recipe, tmp_path):
    config = load_config(recipe, [f"runs_folder={tmp_path}", "name=demo"])
    first = RunFolder.create(config)
    first.write_summary({"step": 1})
    assert RunFolder.create(config).path == tmp_path / "demo-2"
    assert RunFolder.create(config).path == tmp_path / "demo-3"
    assert json.loads((tmp_path / "demo" / "summary.json").read_text()) == {"step": 1}


def test_the_resolved_configuration_is_in_the_folder(recipe, tmp_path):
    config = load_config(recipe, [f"runs_folder={tmp_path}", "learner.lr=1e-5"])
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
