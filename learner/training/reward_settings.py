"""Weights and conditions of the rewards, which may change between two training batches.

Raw scores are in the buffer and advantages are computed when a batch is cut, so a change needs no
new rollouts: it holds from the next batch on, whenever its groups were sampled.

    configuration ──┐
    schedule ───────┼──► setting of step n ──► advantages of step n
    command ────────┘    later changes win; a command holds until the schedule says otherwise
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from threading import Lock
from typing import Any, Literal, Self

from pydantic import ValidationError

import gdpo
from learner.state import RewardState
from protocol.config import RewardConfig, RewardUpdate, When
from protocol.errors import ConfigError

log = logging.getLogger("learner")


@dataclass(frozen=True, slots=True)
class RewardSetting:
    """What the rewards count in one batch: the values in force."""

    weights: Mapping[str, float]
    """Weight of each reward by its name, in the order of the configuration."""
    when: Mapping[str, When | None]
    """Condition of each reward by its name, None without, in the same order."""

    @property
    def conditions(self) -> list[gdpo.RewardCondition]:
        """The conditions by index, for `gdpo.compute_advantages`."""
        names = list(self.weights)
        return [
            gdpo.RewardCondition(names.index(name), names.index(when.reward), when.at_least)
            for name, when in self.when.items()
            if when
        ]

    def updated(self, name: str, update: RewardUpdate) -> "RewardSetting":
        """The setting after a change to one reward."""
        weights, conditions = dict(self.weights), dict(self.when)
        if update.weight is not None:
            weights[name] = update.weight
        if update.when is not None or update.always:
            conditions[name] = update.when
        return RewardSetting(weights, conditions)

    @classmethod
    def from_json(cls, tree: Mapping[str, Mapping[str, Any]]) -> Self:
        """The inverse of `as_json`."""
        whens = {name: entry["when"] for name, entry in tree.items()}
        return cls(
            {name: entry["weight"] for name, entry in tree.items()},
            {name: When.model_validate(when) if when else None for name, when in whens.items()},
        )

    def as_json(self) -> dict[str, dict[str, Any]]:
        """Weight and condition (or None) of each reward, by name."""
        return {
            name: {"weight": weight, "when": when.model_dump() if when else None}
            for (name, weight), when in zip(self.weights.items(), self.when.values(), strict=True)
        }


@dataclass(frozen=True, slots=True)
class RewardChange:
    """One change, for the summary."""

    from_step: int
    source: Literal["schedule", "command"]
    rewards: dict[str, dict[str, Any]]
    """The whole setting after it."""


class RewardSchedule:
    """What changes the setting from step to step; one thread trains, another may command."""

    def __init__(self, rewards: Sequence[RewardConfig], steps: int) -> None:
        """``steps`` is the number of the run's last step."""
        self._schedule = [(u.from_step, r.name, u) for r in rewards for u in r.schedule]
        self._schedule.sort(key=lambda entry: entry[0])
        self._last_step = steps
        self._lock = Lock()
        self._current = RewardSetting(
            {reward.name: reward.weight for reward in rewards},
            {reward.name: reward.when for reward in rewards},
        )
        self._step = self._followed = 0
        self.num_commands = 0
        self.record: Callable[[int, Any], None] = lambda from_step, updates: None
        """Called with each command before it is applied: it puts it where it is not lost."""
        self.changes: list[RewardChange] = []

    def state(self) -> RewardState:
        """What `restore` takes back."""
        with self._lock:
            changes = tuple(asdict(change) for change in self.changes)
            return RewardState(self._current.as_json(), self._followed, changes, self.num_commands)

    def restore(self, state: RewardState, step: int) -> None:
        """Be as after ``step``, when `state` was taken."""
        self._step, self.num_commands = step, state.commands
        self._followed = state.followed
        self._schedule = [entry for entry in self._schedule if entry[0] > state.followed]
        self._current = RewardSetting.from_json(state.setting)
        self.changes = [RewardChange(**change) for change in state.changes]

    def begin(self, step: int) -> RewardSetting:
        """The setting of ``step`` (from 1), with what is scheduled up to it."""
        with self._lock:
            self._step = step
            self._follow_schedule(step)
            return self._current

    def upcoming(self, step: int) -> RewardSetting:
        """What `begin` would return for ``step`` now; a command may still change it."""
        with self._lock:
            setting = self._current
            for from_step, name, update in self._schedule:
                if from_step <= step:
                    setting = setting.updated(name, update)
            return setting

    def command(self, updates: Any) -> dict[str, Any]:
        """Apply ``{reward: {"weight": ..., "when": ...}}``, all or nothing, from the next step on.

        Returns that step and the whole setting. Raises `ConfigError` for what nobody validated
        yet: it came over the network.
        """
        if not isinstance(updates, dict):
            raise ConfigError("give the changes by reward")
        with self._lock:
            checked = {name: self._validated(name, fields) for name, fields in updates.items()}
            step = self._step + 1
            if step > self._last_step:
                raise ConfigError("the last batch is in training: none is left to change")
            if updates:
                self.record(step, updates)
                self.num_commands += 1
            # What is scheduled for that step comes first, or it would undo the command.
            self._follow_schedule(step)
            setting = self._current
            for name, update in checked.items():
                setting = setting.updated(name, update)
            self._replace(setting, step, "command")
            return {"from_step": step, "rewards": setting.as_json()}

    def _follow_schedule(self, step: int) -> None:
        self._followed = step
        setting = self._current
        while self._schedule and self._schedule[0][0] <= step:
            _, name, update = self._schedule.pop(0)
            setting = setting.updated(name, update)
        self._replace(setting, step, "schedule")

    def _validated(self, name: str, fields: Any) -> RewardUpdate:
        known = ", ".join(self._current.weights)
        if name not in self._current.weights:
            raise ConfigError(f"no reward is named {name!r}; the rewards are {known}")
        try:
            update = RewardUpdate.model_validate(fields)
        except ValidationError as error:
            problem = error.errors()[0]
            text = problem["msg"]
            if problem["type"] in ("extra_forbidden", "model_type"):
                text = "that is not one of the keys, or not of its type"
            where = ".".join(str(part) for part in (name, *problem["loc"][:1]))
            raise ConfigError(
                f"rewards.{where}: {text}; what can change: weight = NUMBER, "
                'when = { reward = "NAME", at_least = NUMBER }, always = true'
            ) from error
        if update.when and update.when.reward not in self._current.weights:
            raise ConfigError(
                f"rewards.{name}.when names {update.when.reward!r}; the rewards are {known}"
            )
        return update

    def _replace(
        self, setting: RewardSetting, from_step: int, source: Literal["schedule", "command"]
    ) -> None:
        if setting == self._current:
            return
        self._current = setting
        self.changes.append(RewardChange(from_step, source, setting.as_json()))
        log.info("rewards from step %d on, by %s: %s", from_step, source, describe(setting))


def describe(setting: RewardSetting) -> str:
    """One line for people."""
    return ", ".join(
        f"{name} x {weight:g}" + (f" where {when.reward} >= {when.at_least:g}" if when else "")
        for (name, weight), when in zip(setting.weights.items(), setting.when.values(), strict=True)
    )
