"""The command line: help without heavy imports, checks, and errors of the user in one line."""

import importlib.metadata
import subprocess
import sys
import tomllib
from typing import Any

import pytest

from deploy import USER_ERROR
from deploy.cli import main
from learner.config.file import load_config
from learner.run_folder import RunFolder

HEAVY = ("torch", "transformers", "datasets", "matplotlib", "numpy", "zmq", "pydantic", "rich")
COMMANDS = (
    "run",
    "learner",
    "actor",
    "check",
    "eval",
    "compare",
    "show",
    "set",
    "top",
    "journal",
    "keygen",
    "plot",
)


def python(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=30, **options
    )


@pytest.mark.parametrize("arguments", [["--help"], ["top", "--help"]])
def test_help_imports_nothing_heavy(arguments):
    program = (
        "import sys, deploy.cli\n"
        f"try: deploy.cli.main({arguments})\n"
        f"finally: print('heavy:', sorted(set({HEAVY}) & set(sys.modules)))"
    )
    result = python("-c", program)
    assert result.returncode == 0, result.stderr
    assert result.stdout.endswith("heavy: []\n")


def test_reading_a_configuration_does_not_import_torch(recipe):
    program = (
        "import sys\n"
        "from pathlib import Path\n"
        "from learner.config.file import load_config\n"
        f"load_config(Path({str(recipe)!r}), ['algorithm.weight_cap=3'])\n"
        "assert 'torch' not in sys.modules"
    )
    result = python("-c", program)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_a_help(capsys, command):
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    assert f"gdpo {command}" in capsys.readouterr().out


def test_check_prints_the_resolved_configuration(recipe, capsys):
    assert main(["check", str(recipe), "optimizer.lr=1e-5"]) == 0
    printed = tomllib.loads(capsys.readouterr().out)
    assert printed["optimizer"]["lr"] == 1e-5
    assert printed["deadlines"]["lease_timeout_s"] == 60
    assert printed["data"]["train"] == str(recipe.parent / "tool_calling_tiny" / "train.jsonl")


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("training.steps", "default:  100"),
        ("actor.vllm.gpu_memory_share", "range:    above 0, at most 1"),
        ("optimizer", "lr_schedule     one of"),
        ("[[rewards]]", "on_failure  one of"),
    ],
)
def test_a_key_is_explained_without_a_configuration(capsys, key, expected):
    assert main(["check", "--explain", key]) == 0
    assert expected in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["check"], "give a CONFIG file, or --explain KEY"),
        (
            ["check", "--explain", "training.lr"],
            "unknown key training.lr; did you mean optimizer.lr?",
        ),
        (["check", "--explain", "learning_rate"], "did you mean optimizer.lr?"),
        (["check", "--explain", "lora.rank"], "there is no such setting"),
        (["check", "RECIPE", "learner.steps=3"], "did you mean training.steps?"),
        (["check", "none.toml"], "cannot read none.toml"),
        (["run", "none.toml"], "cannot read none.toml"),
        (["learner", "none.toml"], "cannot read none.toml"),
        (["eval", "none.toml"], "cannot read none.toml"),
        (["plot", "none"], "cannot read none/metrics.jsonl"),
        (["top", "none"], "there is no run folder none; write runs/NAME or http://HOST:PORT"),
        (["top", "tcp://127.0.0.1:5555"], "write http://HOST:PORT"),
        (["top", "http://127.0.0.1:65536"], "write http://HOST:PORT"),
        (["top", "http://user@host/x:1"], "write http://HOST:PORT"),
        (["set", "none", "rewards.format.weight=1"], "no learner to command in none"),
        (["set", "none", "optimizer.lr=1"], "cannot change in a run; what can: rewards."),
        (["set", "none", "weight"], "cannot change in a run; what can: rewards."),
        (["check", "RECIPE", "optimizer.lrr=1"], "did you mean optimizer.lr?"),
        (["check", "RECIPE", "lr"], "is no override"),
        (
            ["check", "RECIPE", "rewards.format.function=actors.tasks.tool_calling:none"],
            "defines no function none",
        ),
        (["check", "RECIPE", "rewards.format.function=os:system"], "module os is not allowed"),
        (["check", "RECIPE", "model.path=./none"], "model.path = './none': no such folder"),
        (["check", "RECIPE", "data.train=none.jsonl"], "/none.jsonl"),
        (["check", "RECIPE", "data.heldout=none.jsonl"], "no such data file"),
        (["check", "RECIPE", "sampling.max_tokens=4096"], "exceeds the model's 256 positions"),
        (["check", "RECIPE", "endpoints.bind=127.0.0.1:5555"], "write tcp://HOST:PORT"),
    ],
)
def test_an_error_of_the_user_is_one_line(
    recipe, tmp_path, monkeypatch, capsys, arguments, problem
):
    monkeypatch.chdir(tmp_path)
    code = main([str(recipe) if argument == "RECIPE" else argument for argument in arguments])
    printed = capsys.readouterr()
    assert code == 2
    assert printed.out == ""
    [line] = printed.err.splitlines()
    assert line.startswith("gdpo: error: ")
    assert problem in line


@pytest.mark.parametrize("command", ["run", "learner"])
def test_what_stands_first_after_resume_is_an_override_as_it_was_written(
    recipe, tmp_path, capsys, command
):
    folder = RunFolder.create(load_config(recipe, [f"runs_folder={tmp_path}"]))
    arguments = [command, "--resume", str(folder.path), "endpoints.bind=tcp://127.0.0.1:99999"]
    assert main(arguments) == USER_ERROR
    assert "'tcp://127.0.0.1:99999'" in capsys.readouterr().err


def test_a_learner_of_one_process_is_not_one_of_several(recipe, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert main(["learner", str(recipe)]) == USER_ERROR
    assert "torchrun --nproc-per-node N -m learner CONFIG" in capsys.readouterr().err


def test_a_process_prints_no_traceback_for_an_error_of_the_user(tmp_path):
    result = python("-m", "deploy", "check", str(tmp_path / "none.toml"))
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert "Traceback" not in result.stderr


def test_the_version_is_that_of_the_package(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"async-gdpo {importlib.metadata.version('async-gdpo')}\n"


def test_without_a_command_the_usage_is_shown(capsys):
    with pytest.raises(SystemExit) as caught:
        main([])
    assert caught.value.code == 2
    assert "usage: gdpo" in capsys.readouterr().err


def test_an_interrupt_is_an_exit_code_and_no_traceback(monkeypatch, capsys):
    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr("deploy.commands.operate._check", interrupt)
    assert main(["check", "recipe.toml"]) == 130
    assert capsys.readouterr().err == ""
