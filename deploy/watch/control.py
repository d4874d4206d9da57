"""``gdpo set``: change what the rewards count in a run that is going on.

The run folder has the learner's address and a token that only its user can read.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from rich.console import Console
from rich.table import Table

from deploy.watch.display import add_row
from deploy.watch.http import post_json
from learner.config.file import parse_override
from learner.records import RewardsFrom, first_problem
from learner.run_folder import RunFolder
from learner.status import label
from protocol.errors import ConfigError, PeerLost, Refused

TIMEOUT_S = 10.0
EXAMPLE = "rewards.NAME.weight=0.5, rewards.NAME.when={...} or rewards.NAME.always=true"


def set_rewards(run: Path, assignments: Sequence[str]) -> None:
    """Apply all of ``rewards.NAME.FIELD=value`` or, if one is refused, none; print what holds then.

    Raises `ConfigError`.
    """
    updates: dict[str, dict[str, Any]] = {}
    for assignment in assignments:
        parts, value = parse_override(assignment) if "=" in assignment else ([], None)
        if len(parts) != 3 or parts[0] != "rewards":
            raise ConfigError(f"{assignment!r} cannot change in a run; what can: {EXAMPLE}")
        updates.setdefault(parts[1], {})[parts[2]] = value
    now = _command(run, updates)
    table = Table(title=f"from step {now.from_step} on")
    for column in ("reward", "weight", "counts"):
        table.add_column(column, justify="right" if column == "weight" else "left")
    for name, reward in now.rewards.items():
        when = reward.when
        counts = f"where {when.reward} >= {when.at_least:g}" if when else "always"
        add_row(table, label(name), f"{reward.weight:g}", label(counts))
    Console(highlight=False).print(table)


def _command(run: Path, updates: dict[str, dict[str, Any]]) -> RewardsFrom:
    """Tell the learner of a run folder; raises `ConfigError` with its own words."""
    control = RunFolder(run).read_control()
    try:
        answer = post_json(
            f"{control.url}/rewards", updates, token=control.token, timeout_s=TIMEOUT_S
        )
        return RewardsFrom.model_validate(answer)
    except Refused as error:
        raise ConfigError(str(error)) from error
    except PeerLost as error:
        raise ConfigError(f"the learner of {run} is gone: {error}") from error
    except ValidationError as error:
        raise ConfigError(f"no learner answers for {run}: {first_problem(error)}") from error
