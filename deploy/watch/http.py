"""Talking to a learner's HTTP endpoint: JSON both ways, and never through a proxy."""

import http.client
import json
import urllib.error
import urllib.request
from typing import IO, Any

from protocol.errors import PeerLost, Refused

MAX_ANSWER_BYTES = 1 << 24

# A proxy of the environment is for the world outside, and would get to see the token.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def get_json(url: str, timeout_s: float) -> dict[str, Any]:
    """Return what a page says.

    Raises `PeerLost` if nothing answers, or something else than one of our processes does.
    """
    return _open(urllib.request.Request(url), timeout_s)  # noqa: S310


def post_json(url: str, body: Any, *, token: str, timeout_s: float) -> dict[str, Any]:
    """Post a command and return the answer.

    Raises `Refused` with the other side's words, and what `get_json` does.
    """
    request = urllib.request.Request(  # noqa: S310
        url,
        data=json.dumps(body, default=str).encode(),
        headers={"Authorization": f"Bearer {token}", "Content-Type": "application/json"},
    )
    return _open(request, timeout_s)


def _open(request: urllib.request.Request, timeout_s: float) -> dict[str, Any]:
    try:
        with _OPENER.open(request, timeout=timeout_s) as response:
            answer = _decode(response)
    except urllib.error.HTTPError as error:
        raise Refused(_reason(error)) from error
    except urllib.error.URLError as error:
        raise PeerLost(f"nothing answers at {request.full_url}: {error.reason}") from error
    except (OSError, http.client.HTTPException) as error:
        raise PeerLost(f"nothing answers at {request.full_url}: {error}") from error
    except (ValueError, RecursionError) as error:
        raise PeerLost(f"something else answers at {request.full_url}") from error
    if not isinstance(answer, dict):
        raise PeerLost(f"something else answers at {request.full_url}")
    return answer


def _decode(response: IO[bytes]) -> Any:
    """Decode; raises ``ValueError`` or ``RecursionError`` for what we would never say."""
    body = response.read(MAX_ANSWER_BYTES + 1)
    if len(body) > MAX_ANSWER_BYTES:
        raise ValueError(f"more than {MAX_ANSWER_BYTES} bytes")
    return json.loads(body)


def _reason(error: urllib.error.HTTPError) -> str:
    try:
        return str(_decode(error)["error"])
    except (
        OSError,
        http.client.HTTPException,
        ValueError,
        RecursionError,
        KeyError,
        TypeError,
    ):
        return f"{error.url} answers {error.code} {error.reason}"
