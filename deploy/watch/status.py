"""Asking a learner for its status, with care: whatever answers at a port may lie."""

from typing import Any

from pydantic import ValidationError

from deploy.watch.http import get_json
from learner.records import first_problem
from learner.status import FROM_A_PORT, Status
from protocol.errors import BadMessage

TIMEOUT_S = 2.0


def read_status(answer: Any) -> Status:
    """Return decoded JSON as a status; raises `BadMessage` if it is none."""
    try:
        return Status.model_validate(answer, context=FROM_A_PORT)
    except ValidationError as error:
        raise BadMessage(f"no status of a learner: {first_problem(error)}") from error


def fetch_status(address: str) -> Status:
    """Return the status of the learner at ``http://HOST:PORT``.

    Raises `PeerLost` if none answers, `Refused` or `BadMessage` if something else does.
    """
    return read_status(get_json(f"{address}/status", TIMEOUT_S))
