"""`gdpo set`: what it makes of an answer, and of a folder without a learner."""

import json
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from deploy.cli import main
from learner.records import Control
from learner.run_folder import RunFolder

ANSWER = {
    "from_step": 4,
    "rewards": {
        "format": {"weight": 0.5, "when": None},
        "correctness": {"weight": 2.0, "when": {"reward": "format", "at_least": 1.0}},
    },
}


@pytest.fixture
def answering(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Makes a run folder whose learner answers every command with the same."""
    servers: list[ThreadingHTTPServer] = []

    def start(body: bytes, code: int = 200) -> Path:
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["Content-Length"]))
                self.send_response(code)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}"
        RunFolder(tmp_path).write_control(Control(url=url, token="secret"))
        return tmp_path

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_what_holds_is_a_table(answering, capsys):
    folder = answering(json.dumps(ANSWER).encode())
    assert main(["set", str(folder), "rewards.format.weight=0.5"]) == 0
    shown = capsys.readouterr().out
    for part in ("from step 4 on", "0.5", "always", "where format >= 1"):
        assert part in shown


def test_a_name_is_no_markup_and_no_command_to_the_terminal(answering, capsys):
    rewards = {"[red]a[/]\x1b[2J": {"weight": 1.0, "when": None}}
    folder = answering(json.dumps(ANSWER | {"rewards": rewards}).encode())
    assert main(["set", str(folder)]) == 0
    assert r"[red]a[/]\x1b[2J" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("body", "code", "problem"),
    [
        (b"", 200, "something else answers"),
        (b"[" * 100_000, 200, "something else answers"),
        (b"[]", 200, "something else answers"),
        (b"{}", 200, "from_step: Field required"),
        (b'{"from_step": "4", "rewards": {}}', 200, "from_step: Input should be"),
        (b'{"from_step": 4, "rewards": {"a": {}}}', 200, "rewards.a.weight: Field required"),
        (b'{"error": "the run is ending: SIGTERM"}', 503, "the run is ending: SIGTERM"),
        (b"not here", 404, "answers 404"),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_a_strange_answer_is_one_line(answering, capsys, body, code, problem):
    assert main(["set", str(answering(body, code))]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert problem in line


@pytest.mark.parametrize(
    ("control", "problem"),
    [
        (None, "no learner to command in"),
        (b"{", "control.json is damaged"),
        (b'{"url": 1, "token": "t"}', "control.json is damaged: url"),
        (b'{"url": "\xff", "token": "t"}', "control.json is damaged"),
    ],
)
def test_a_folder_without_a_learner_is_an_error_of_the_user(tmp_path, capsys, control, problem):
    if control is not None:
        (tmp_path / "control.json").write_bytes(control)
    assert main(["set", str(tmp_path)]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert problem in line
