"""What users get wrong: one clear line, a non-zero exit, no stack trace."""

import socket

import pytest

from tests.integration.processes import QUICK, RECIPE, System

pytestmark = pytest.mark.timeout(90)


def assert_one_line(system: System, arguments: list[str], *expected: str) -> None:
    process = system.gdpo("command", *arguments)
    assert process.wait(60) != 0, process.output
    assert "Traceback" not in process.output
    errors = [line for line in process.output.splitlines() if "error:" in line]
    assert len(errors) == 1, process.output
    for text in expected:
        assert text in errors[0]


@pytest.mark.parametrize("command", ["run", "learner", "check"])
def test_an_unknown_key_names_the_nearest_known_one(system, command):
    assert_one_line(
        system,
        [command, str(RECIPE), *QUICK, "training.bach_groups=8"],
        "unknown key training.bach_groups",
        "did you mean training.batch_groups?",
    )


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        ("actors.tasks.tool_calling:no_such", "defines no function no_such"),
        ("actors.tasks.no_such:reward", "No module named"),
        ("email.mime.text:reward", "--allow-rewards email.mime.text"),
        ("broken_rewards:reward", "division by zero"),
    ],
)
def test_a_reward_function_that_does_not_import(system, function, expected):
    (system.folder / "broken_rewards.py").write_text("1 / 0\n")
    assert_one_line(
        system, ["run", str(RECIPE), *QUICK, f"rewards.format.function={function}"], expected
    )


def test_rewards_without_any_signal_do_not_generate_for_ever(system):
    (system.folder / "same_for_all.py").write_text(
        "def reward(completions, **columns):\n    return [1.0] * len(completions)\n"
    )
    assert_one_line(
        system,
        [
            "run",
            str(RECIPE),
            *QUICK,
            "algorithm.no_signal=refill",
            "algorithm.max_refills=2",
            "rewards.format.function=same_for_all:reward",
            "rewards.correctness.function=same_for_all:reward",
        ],
        "groups without signal, more than algorithm.max_refills = 2 batches of them",
        'set algorithm.no_signal = "keep"',
    )


def test_a_learner_that_is_not_there(system):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    assert_one_line(
        system,
        ["actor", "--learner", url, "--connect-timeout", "1"],
        f"no learner answers at {url} within 1 s",
    )


@pytest.mark.parametrize("url", ["127.0.0.1:5555", "tcp://", "tcp://host", "http://host:1"])
def test_an_address_that_is_none(system, url):
    assert_one_line(system, ["actor", "--learner", url], "write tcp://HOST:PORT")


def test_a_port_that_is_taken(system):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert_one_line(
            system,
            ["run", str(RECIPE), *QUICK, f"endpoints.bind=tcp://127.0.0.1:{port}"],
            f"cannot listen on tcp://127.0.0.1:{port}",
        )
        assert_one_line(
            system,
            ["run", str(RECIPE), *QUICK, f"endpoints.metrics_port={port}"],
            f"cannot serve metrics on 127.0.0.1:{port}",
        )


def test_listening_beyond_this_machine_without_encryption(system):
    assert_one_line(
        system,
        ["run", str(RECIPE), *QUICK, "endpoints.bind=tcp://0.0.0.0:5555"],
        "reachable from other machines",
    )


def test_a_model_and_data_that_are_not_there(system):
    assert_one_line(system, ["run", str(RECIPE), *QUICK, "model.path=./nowhere"], "no such folder")
    assert_one_line(
        system, ["run", str(RECIPE), *QUICK, "data.train=nothing.jsonl"], "no such data file"
    )


def test_a_learner_that_cannot_begin_leaves_no_run_folder(system):
    before = sorted(system.folder.glob("runs/*"))
    for mistake, words in (
        ("model.path=./nowhere", "no such folder"),
        ("sampling.max_tokens=4096", "exceeds the model's"),
    ):
        assert_one_line(system, ["learner", str(RECIPE), *QUICK, mistake], words)
    assert sorted(system.folder.glob("runs/*")) == before


def test_an_empty_data_set_ends_the_run(system):
    (system.folder / "empty.jsonl").write_text("")
    assert_one_line(
        system, ["run", str(RECIPE), *QUICK, f"data.train={system.folder}/empty.jsonl"], "empty"
    )


def test_a_reward_that_always_raises_ends_the_run_with_its_words(system):
    (system.folder / "bad_rewards.py").write_text(
        "def reward(prompts, completions, completion_ids, **columns):\n"
        "    raise KeyError('no such column')\n"
    )
    assert_one_line(
        system,
        ["run", str(RECIPE), *QUICK, "rewards.format.function=bad_rewards:reward"],
        "groups failed in a row",
        "reward 'format' raised KeyError",
        "(bad_rewards.py, line 2)",
    )
