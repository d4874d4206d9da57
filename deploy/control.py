"""``gdpo set``: change what the rewards count in a run that is going on.

The run folder has the learner's address and a token that only its user can read.
"""

import json
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from learner.config import parse_override
from protocol.errors import ConfigError

TIMEOUT_S = 10.0
EXAMPLE = "rewards.NAME.weight=0.5 or rewards.NAME.when=always"


def set_rewards(run: Path, assignments: Sequence[str]) -> None:
    """Apply all of ``rewards.NAME.FIELD=value`` or, if one is refused, none; print what holds then.

    Raises `ConfigError`.
    """
    updates: dict[str, dict[str, Any]] = {}
    for assignment in assignments:
        parts, value = parse_override(assignment)
        if len(parts) != 3 or parts[0] != "rewards":
            raise ConfigError(f"{assignment!r} cannot change in a run; what can: {EXAMPLE}")
        updates.setdefault(parts[1], {})[parts[2]] = value
    answer = _post(run, "/rewards", updates)
    table = Table(title=f"from step {answer['from_step']} on")
    for column in ("reward", "weight", "counts"):
        table.add_column(column, justify="right" if column == "weight" else "left")
    for name, setting in answer["rewards"].items():
        when = setting["when"]
        counts = f"where {when['reward']} >= {when['at_least']:g}" if when else "always"
        table.add_row(name, f"{setting['weight']:g}", counts)
    Console(highlight=False).print(table)


def _post(run: Path, path: str, body: Any) -> dict[str, Any]:
    """Post to the learner of a run folder; raises `ConfigError` with its own words."""
    try:
        control = json.loads((run / "control.json").read_text())
    except OSError as error:
        raise ConfigError(
            f"no learner to command in {run}: {error.strerror} ({run / 'control.json'}); give "
            "the folder of a run that is going on"
        ) from error
    # The learner wrote this URL: always http:// to its metrics endpoint.
    request = urllib.request.Request(  # noqa: S310
        control["url"] + path,
        data=json.dumps(body, default=str).encode(),
        headers={"Authorization": f"Bearer {control['token']}", "Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:  # noqa: S310
            answer: dict[str, Any] = json.load(response)
            return answer
    except urllib.error.HTTPError as error:
        raise ConfigError(json.load(error)["error"]) from error
    except OSError as error:
        raise ConfigError(
            f"the learner of {run} does not answer at {control['url']}: {error}"
        ) from error
