"""The HTTP endpoint of every process, over real sockets."""

import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, Counter
from prometheus_client.parser import text_string_to_metric_families

from protocol.errors import ConfigError
from protocol.observability import Heartbeat, ObservabilityServer
from tests.unit.factories import FakeClock


class Process:
    """What a process would serve, with a clock and a readiness that the test sets."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.heartbeat = Heartbeat("loop", limit_s=10, clock=self.clock)
        self.ready = False
        registry = CollectorRegistry()
        Counter("gdpo_groups", "Groups", ["verdict"], registry=registry).labels("accepted").inc(3)
        self.server = ObservabilityServer(
            registry,
            host="127.0.0.1",
            port=0,
            heartbeats=(self.heartbeat, Heartbeat("other", limit_s=1e9)),
            ready=lambda: self.ready,
            routes={"/status": lambda: {"step": 7}},
            commands={"/double": self.double},
        )

    def double(self, number: Any) -> dict[str, Any]:
        if not isinstance(number, (int, list)):
            raise ConfigError("give a number")
        return {"doubled": 2 * number}

    def post(self, path: str, body: bytes, token: str | None = None) -> tuple[int, dict[str, Any]]:
        """Status and answer."""
        headers = {"Authorization": f"Bearer {self.server.token if token is None else token}"}
        url = f"http://{self.server.address}{path}"
        try:
            reply = urllib.request.urlopen(
                urllib.request.Request(url, data=body, headers=headers), timeout=10
            )
        except urllib.error.HTTPError as error:
            reply = error
        with reply:
            return reply.status, json.load(reply)

    def get(self, path: str) -> tuple[int, str, str]:
        """Status, content type and body."""
        try:
            reply = urllib.request.urlopen(f"http://{self.server.address}{path}", timeout=10)
        except urllib.error.HTTPError as error:
            reply = error
        with reply:
            return reply.status, reply.headers["Content-Type"], reply.read().decode()


@pytest.fixture
def process() -> Iterator[Process]:
    process = Process()
    yield process
    process.server.close()


def test_metrics_are_in_the_format_of_prometheus(process):
    status, content_type, body = process.get("/metrics")
    [family] = [f for f in text_string_to_metric_families(body) if f.name == "gdpo_groups"]
    [sample] = [s for s in family.samples if s.name == "gdpo_groups_total"]
    assert (status, sample.labels, sample.value) == (200, {"verdict": "accepted"}, 3)
    assert content_type.startswith("text/plain")


def test_health_is_the_age_of_the_loops_last_progress(process):
    process.clock.advance(9.5)
    assert process.get("/healthz")[0] == 200
    process.clock.advance(0.5)
    status, content_type, body = process.get("/healthz")
    assert status == 503
    assert json.loads(body)["loop"] == {"age_s": 10, "limit_s": 10}
    assert content_type == "application/json"
    process.heartbeat.beat()
    assert process.get("/healthz")[0] == 200


def test_readiness_is_what_the_process_says(process):
    assert process.get("/readyz")[0] == 503
    process.ready = True
    status, _, body = process.get("/readyz")
    assert (status, json.loads(body)) == (200, {"ready": True})


def test_routes_answer_json_whatever_the_query(process):
    assert process.get("/status") == (200, "application/json", '{"step": 7}\n')
    assert process.get("/status?watch=1")[0] == 200


def test_an_unknown_path_is_answered_with_the_known_ones(process):
    status, _, body = process.get("/metric")
    assert (status, body) == (404, "/metrics /healthz /readyz /status\n")


def serve_on(port: int, host: str = "127.0.0.1") -> ObservabilityServer:
    return ObservabilityServer(
        CollectorRegistry(), host=host, port=port, heartbeats=(), ready=lambda: True
    )


def test_a_port_in_use_is_an_error_of_the_user(process):
    with pytest.raises(
        ConfigError, match=rf"cannot serve metrics on 127.0.0.1:{process.server.port}"
    ):
        serve_on(process.server.port)


@pytest.mark.parametrize(("host", "port"), [("127.0.0.1", 70_000), ("256.0.0.1", 0)])
def test_an_address_that_does_not_exist_is_an_error_of_the_user(host, port):
    with pytest.raises(ConfigError, match=f"cannot serve metrics on {host}:{port}"):
        serve_on(port, host)


def test_a_closed_server_frees_its_port():
    server = serve_on(0)
    server.close()
    serve_on(server.port).close()


def test_a_command_answers_whoever_has_the_token(process):
    assert process.post("/double", b"21") == (200, {"doubled": 42})


@pytest.mark.parametrize("token", ["", "wrong", "\u00e9"])
def test_without_the_token_no_command_is_reached(process, token):
    assert process.post("/double", b"21", token.encode().decode("latin-1")) == (
        401,
        {"error": "the token is wrong"},
    )


def test_every_server_has_its_own_token(process):
    other = Process()
    other.server.close()
    assert other.server.token != process.server.token
    assert len(process.server.token) >= 32


@pytest.mark.parametrize(
    ("path", "body", "status", "problem"),
    [
        ("/triple", b"21", 404, "the commands are: /double"),
        ("/double", b'"many"', 400, "give a number"),
        ("/double", b"{", 400, "Expecting"),
        ("/double", b"\x80", 400, "decode"),
        ("/double", b"[" * 60_000, 400, "recursion"),
        ("/double", b"1" * 70_000, 413, "65536 bytes at most"),
    ],
)
def test_a_bad_command_is_refused_with_its_reason(process, path, body, status, problem):
    got, answer = process.post(path, body)
    assert got == status
    assert problem in answer["error"]
    assert process.post("/double", b"1") == (200, {"doubled": 2})
