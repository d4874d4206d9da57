"""What may change in a configuration when its run goes on."""

from typing import Any

from learner.config.run import RunConfig
from protocol.errors import ConfigError

_FIXED = (
    "model.path",
    "model.dtype",
    "data",
    "seed",
    "sampling",
    "optimizer.kind",
    "optimizer.master_weights",
    "rewards",
    "buffer.durability",
    "buffer.max_uses",
)
"""What must stay as it was: groups, prompts, batches or checkpoints of a run depend on it."""


def check_resumable(before: RunConfig, config: RunConfig) -> None:
    """Raise `ConfigError` if a run of ``before`` cannot go on as ``config``."""
    for key in _FIXED:
        if _at(before, key) != _at(config, key):
            raise ConfigError(f"{key} cannot change when a run is resumed; start a new one")


def _at(config: RunConfig, key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    if key == "rewards":
        # What the failure of a reward means has no influence on groups that came in.
        return [reward.model_copy(update={"on_failure": "error"}) for reward in value]
    return value
