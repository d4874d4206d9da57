"""The HTTP endpoint that every process offers: /metrics, /healthz, /readyz and JSON routes.

One small server on a daemon thread. /healthz gives the age of each working loop's last
progress, so a process that answers HTTP while a loop hangs is reported as unhealthy.

Reading is open to whoever reaches the port. A command (POST, JSON both ways) needs the server's
token, which is new in every process, and must come from the same machine: whoever may read the file
that holds the token may command.
"""

import json
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from threading import Thread
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from protocol.errors import AsyncGdpoError, ConfigError

MAX_COMMAND_BYTES = 1 << 16


class Heartbeat:
    """Age of the last progress of a loop; beat from the loop, read from anywhere."""

    def __init__(
        self, loop: str, limit_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.loop = loop
        self.limit_s = limit_s
        self._clock = clock
        self._last = clock()

    def beat(self) -> None:
        """Note that the loop has made progress."""
        self._last = self._clock()

    @property
    def age_s(self) -> float:
        """Seconds since the last progress."""
        return self._clock() - self._last

    @property
    def healthy(self) -> bool:
        """Whether the last progress is recent enough."""
        return self.age_s < self.limit_s


class ObservabilityServer:
    """Serves ``registry`` and the given JSON routes until `close`."""

    def __init__(
        self,
        registry: CollectorRegistry,
        *,
        host: str,
        port: int,
        heartbeats: Sequence[Heartbeat],
        ready: Callable[[], bool],
        routes: Mapping[str, Callable[[], Any]] | None = None,
        commands: Mapping[str, Callable[[Any], Any]] | None = None,
    ) -> None:
        """A command takes what was posted, as it came, and raises `ConfigError` to refuse it."""
        self.token = secrets.token_urlsafe(32)
        site = _Site(
            registry, heartbeats, ready, dict(routes or {}), dict(commands or {}), self.token
        )
        try:
            self._server = ThreadingHTTPServer((host, port), partial(_Handler, site))
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ConfigError(
                f"cannot serve metrics on {host}:{port}: {reason}; choose another port "
                "(endpoints.metrics_port, or --metrics-port of an actor)"
            ) from error
        self._server.daemon_threads = True
        self.port: int = self._server.server_address[1]
        self.address = f"{host}:{self.port}"
        self.command_url = f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{self.port}"  # noqa: S104
        """URL for commands, from this machine."""
        self._thread = Thread(
            target=self._server.serve_forever, args=(0.1,), name="http", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Stop serving, and wait for the server's thread."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@dataclass(frozen=True, slots=True)
class _Site:
    """What is served."""

    registry: CollectorRegistry
    heartbeats: Sequence[Heartbeat]
    ready: Callable[[], bool]
    routes: Mapping[str, Callable[[], Any]]
    commands: Mapping[str, Callable[[Any], Any]]
    token: str = field(repr=False)


class _Handler(BaseHTTPRequestHandler):
    """Answers one connection."""

    timeout = 10

    def __init__(self, site: _Site, *arguments: Any) -> None:
        self._site = site
        # It answers before it returns.
        super().__init__(*arguments)

    def do_GET(self) -> None:
        """Metrics, health, readiness, or a JSON route."""
        path, site = self.path.partition("?")[0], self._site
        if path == "/metrics":
            encode, content_type = choose_encoder(self.headers.get("Accept", ""))
            self._reply(HTTPStatus.OK, encode(site.registry), content_type)
        elif path == "/healthz":
            ages = {
                h.loop: {"age_s": round(h.age_s, 3), "limit_s": h.limit_s} for h in site.heartbeats
            }
            self._reply_json(ages, ok=all(h.healthy for h in site.heartbeats))
        elif path == "/readyz":
            is_ready = site.ready()
            self._reply_json({"ready": is_ready}, ok=is_ready)
        elif path in site.routes:
            self._reply_json(site.routes[path](), ok=True)
        else:
            known = ["/metrics", "/healthz", "/readyz", *site.routes]
            self._reply(HTTPStatus.NOT_FOUND, " ".join(known).encode() + b"\n", "text/plain")

    def do_POST(self) -> None:
        """A command, from this machine and with the token."""
        command = self._site.commands.get(self.path)
        if command is None:
            known = " ".join(self._site.commands)
            self._refuse(HTTPStatus.NOT_FOUND, f"the commands are: {known}")
        elif not self._is_local():
            self._refuse(HTTPStatus.FORBIDDEN, "commands are taken from this machine only")
        elif not self._has_token():
            self._refuse(HTTPStatus.UNAUTHORIZED, "the token is wrong")
        elif (size := self._size()) is None:
            self._refuse(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                f"a command has {MAX_COMMAND_BYTES} bytes at most",
            )
        else:
            self._obey(command, size)

    def _is_local(self) -> bool:
        # The token travels as it is: not between machines.
        client = ip_address(self.client_address[0])
        return client.is_loopback or str(client) == self.connection.getsockname()[0]

    def _has_token(self) -> bool:
        given = self.headers.get("Authorization", "").encode()
        return secrets.compare_digest(given, f"Bearer {self._site.token}".encode())

    def _size(self) -> int | None:
        """Bytes that are posted; None without a number, or with one that is too large."""
        size = self.headers.get("Content-Length", "")
        if not size.isdecimal() or len(size) > 9 or int(size) > MAX_COMMAND_BYTES:
            return None
        return int(size)

    def _obey(self, command: Callable[[Any], Any], size: int) -> None:
        try:
            self._reply_json(command(json.loads(self.rfile.read(size))), ok=True)
        except (ConfigError, ValueError, RecursionError) as error:
            self._refuse(HTTPStatus.BAD_REQUEST, str(error))
        except AsyncGdpoError as error:
            self._refuse(HTTPStatus.SERVICE_UNAVAILABLE, str(error))

    def _refuse(self, status: HTTPStatus, why: str) -> None:
        self.close_connection = True
        body = json.dumps({"error": why}).encode() + b"\n"
        self._reply(status, body, "application/json")

    def _reply_json(self, body: Any, *, ok: bool) -> None:
        status = HTTPStatus.OK if ok else HTTPStatus.SERVICE_UNAVAILABLE
        self._reply(status, json.dumps(body).encode() + b"\n", "application/json")

    def _reply(self, status: HTTPStatus, body: bytes, content_type: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing: a scrape every few seconds is no news."""
