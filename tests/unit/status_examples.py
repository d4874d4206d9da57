"""What a learner says at /status: before its first step, and in the middle of training."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

WEIGHTS: dict[str, Any] = {
    "backend": "gloo",
    "push_every": 1,
    "pushes": 40,
    "num_bytes": 1_200_000,
    "stream_share": 0.003,
    "stream_bytes": 123_456,
    "stream_plain_bytes": 400_000,
    "epochs": [
        {
            "epoch": 6,
            "backend": "gloo",
            "members": [1, 4, 5],
            "first_version": 20,
            "pushes": 14,
            "form_seconds": 0.03,
            "ended": "actor 5 late",
        },
        {
            "epoch": 7,
            "backend": "gloo",
            "members": [1, 2, 3, 4, 9],
            "first_version": 34,
            "pushes": 6,
            "form_seconds": 1.25,
            "ended": "",
        },
    ],
    "last_pushes": [
        {
            "version": 39,
            "epoch": 7,
            "routes": {"collective": 3, "stream": 1},
            "phases": {"pack": 0.01, "join": 0.0, "broadcast": 2.1, "confirm": 0.1},
            "seconds": 2.21,
            "evicted": {"4": "silent"},
            "behind": [6, 7],
        },
        {
            "version": 40,
            "epoch": 7,
            "routes": {"collective": 3, "stream": 0},
            "phases": {"pack": 0.01, "broadcast": 0.1, "confirm": 0.1},
            "seconds": 0.21,
            "evicted": {},
            "behind": [],
        },
    ],
    "evictions": {"late": 3, "gone": 2},
}

EARLY: dict[str, Any] = {
    "run": "tiny",
    "phase": "evaluating before",
    "step": 0,
    "steps": 100,
    "seconds_left": None,
    "rewards": {},
    "last_step": None,
    "evaluating": {"version": -1, "prompts_done": 0, "prompts": 128},
    "evaluation": None,
    "tokens_generated_per_s": 0.0,
    "tokens_trained_per_s": 0.0,
    "staleness_mean": None,
    "staleness_max": None,
    "max_staleness": 2,
    "buffer_groups": 0,
    "buffer_bytes": 0,
    "batch_groups": 32,
    "groups_refilled": 0,
    "actors_live": 0,
    "actors_wanted": None,
    "actor_idle_share": 0.0,
    "learner_wait_share": 0.0,
    "connections_refused": {},
    "messages_refused": {},
    "bottleneck": None,
    "weights": WEIGHTS,
    "actors": [],
}
RUNNING: dict[str, Any] = EARLY | {
    "phase": "training",
    "step": 40,
    "seconds_left": 3725.4,
    "rewards": {"format": 0.51234, "correctness": -0.25},
    "last_step": {
        "mean_length": 1234.56,
        "min_length": 3.0,
        "max_length": 2048.0,
        "clipped_ratio": 0.0625,
        "frac_reward_zero_std": 0.125,
        "entropy": 0.98765,
        "learning_rate": 2.5e-6,
    },
    "evaluating": {"version": 40, "prompts_done": 12, "prompts": 256},
    "evaluation": {
        "version": 20,
        "seconds": 12.5,
        "sets": {
            "heldout": {"format": 0.75, "correctness": None},
            "greedy": {"format": 1.0, "correctness": 0.5, "pass@1": 0.625},
        },
    },
    "tokens_generated_per_s": 12345.6,
    "tokens_trained_per_s": 999.4,
    "staleness_mean": 0.75,
    "staleness_max": 2,
    "buffer_groups": 17,
    "buffer_bytes": 1_540_000,
    "actors_live": 2,
    "actors_wanted": 3,
    "actor_idle_share": 0.05,
    "learner_wait_share": 0.405,
    "bottleneck": "actors",
}

ACTORS = [
    {
        "number": 1,
        "host": "gpu1",
        "pid": 11,
        "version": 40,
        "route": "collective",
        "evaluates": False,
        "leases": 8,
        "groups": 612,
        "check": "passed",
        "check_difference": 1e-6,
        "difference_mean": 1e-6,
        "difference_largest": 1e-6,
        "idle_share": 0.05,
        "stalled_share": 0.012,
        "silent_s": 0.1,
        "newer": "what a newer learner says besides",
    },
    {
        "number": 6,
        "host": "gpu7.example.org",
        "pid": 12,
        "version": 36,
        "route": "stream",
        "evaluates": False,
        "leases": 2,
        "groups": 9,
        "check": "passed",
        "check_difference": 1e-6,
        "difference_mean": 1e-6,
        "difference_largest": 1e-6,
        "idle_share": 0.5,
        "stalled_share": 0.25,
        "silent_s": 3.24,
        "newer": "what a newer learner says besides",
    },
    {
        "number": 7,
        "host": "gpu8",
        "pid": 13,
        "version": -1,
        "route": "",
        "evaluates": False,
        "leases": 0,
        "groups": 0,
        "check": "due",
        "check_difference": None,
        "difference_mean": None,
        "difference_largest": None,
        "idle_share": None,
        "stalled_share": None,
        "silent_s": 0.2,
        "newer": "what a newer learner says besides",
    },
]
WATCHED = RUNNING | {"actors": ACTORS, "actors_live": 3}


class StatusServer:
    """A learner that answers every question with ``body``."""

    def __init__(self, body: bytes, code: int = 200) -> None:
        server = self
        self.body = body
        self.paths: list[str] = []

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                server.paths.append(self.path)
                self.send_response(code)
                self.end_headers()
                self.wfile.write(server.body)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self._server.server_address[1]}"
        Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@contextmanager
def status_servers() -> Iterator[Callable[..., StatusServer]]:
    """Start servers with the status (or the bytes) and the code that they answer with."""
    servers: list[StatusServer] = []

    def start(body: Any = WATCHED, code: int = 200) -> StatusServer:
        servers.append(
            StatusServer(body if isinstance(body, bytes) else json.dumps(body).encode(), code)
        )
        return servers[-1]

    yield start
    for server in servers:
        server.close()
