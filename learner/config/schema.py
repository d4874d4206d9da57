"""What can be set: every section and key with its type, range, default and meaning.

All of it is read from the schema of `learner.config.run.RunConfig`, where the docstring under a
field is its meaning.
"""

import difflib
import json
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from learner.config.run import RunConfig
from protocol.errors import ConfigError

_SYNONYMS = {
    "learning_rate": "optimizer.lr",
    "max_norm": "optimizer.max_grad_norm",
    "grad_clip": "optimizer.max_grad_norm",
    "batch_size": "training.batch_groups",
    "max_steps": "training.steps",
    "num_steps": "training.steps",
    "micro_batch_size": "training.microbatch_tokens",
    "num_generations": "sampling.num_rollouts",
    "group_size": "sampling.num_rollouts",
    "max_new_tokens": "sampling.max_tokens",
    "max_completion_length": "sampling.max_tokens",
    "max_prompt_length": "sampling.max_prompt_tokens",
    "kl_coef": "algorithm.kl_coefficient",
    "beta": "algorithm.kl_coefficient",
    "entropy_coef": "algorithm.entropy_coefficient",
    "tensor_parallel_size": "actor.vllm.tensor_parallel",
    "gpu_memory_utilization": "actor.vllm.gpu_memory_share",
    "num_actors": "launch.actors",
    "save_steps": "checkpoints.every_steps",
}
"""What other programs call a setting of this one."""

_MAX_GUESSES = 3


@dataclass(frozen=True, slots=True)
class Key:
    """One setting."""

    section: str
    """Dotted path of its section, empty for a key outside of any."""
    name: str
    type: str
    range: str
    """Limits on the value in words, empty where there are none."""
    default: str
    """Value as TOML; ``none`` for one that is not set, ``required`` where there is no default."""
    meaning: str

    @property
    def path(self) -> str:
        """Dotted path, as in an override."""
        return f"{self.section}.{self.name}" if self.section else self.name


@dataclass(frozen=True, slots=True)
class Section:
    """One table of the configuration file."""

    path: str
    """Dotted path, empty for what stands before the first section."""
    header: str
    """Header as it stands in the file: ``[training]``, or ``[[rewards]]`` for a list."""
    meaning: str
    keys: tuple[Key, ...]


@cache
def sections() -> tuple[Section, ...]:
    """List every section in the order of the configuration, a nested one after its parent."""
    schema = RunConfig.model_json_schema()
    return tuple(_sections("", "", schema, schema["description"], schema["$defs"]))


def explain(path: str) -> str:
    """Describe a key, or list the keys of a section; raises `ConfigError` if there is none."""
    parts = path.strip("[] ").split(".")
    wanted = ".".join(_plain(parts))
    for section in sections():
        if section.path == wanted and wanted:
            return _section_text(section)
        for key in section.keys:
            if key.path == wanted:
                return _key_text(key, section)
    raise ConfigError(unknown(parts))


def unknown(location: Sequence[str]) -> str:
    """Say that there is no such key, and which known ones are near it."""
    where = ".".join(location)
    if near := nearest(location):
        return f"unknown key {where}; did you mean {' or '.join(near)}?"
    return f"unknown key {where}: there is no such setting, and none with a name like it"


def nearest(location: Sequence[str]) -> list[str]:
    """Find known keys near an unknown one, best first; empty where none is."""
    *tables, name = _plain(location)
    if name in _SYNONYMS:
        return [_SYNONYMS[name]]
    every = [key for section in sections() for key in section.keys]
    if elsewhere := [key.path for key in every if key.name == name]:
        return elsewhere[:_MAX_GUESSES]
    if name and (same := [section.header for section in sections() if section.path == name]):
        return same
    if beside := _alike(name, _names_in(".".join(tables))):
        return [".".join((*location[:-1], beside))]
    if other := _alike(name, [key.name for key in every]):
        return [key.path for key in every if key.name == other][:_MAX_GUESSES]
    section = _alike(location[0], [section.path for section in sections()])
    return [f"a key of [{section}]"] if section and section != location[0] else []


def _alike(name: str, known: Sequence[str]) -> str | None:
    if near := difflib.get_close_matches(name, known, n=1, cutoff=0.75):
        return near[0]
    parts = [other for other in known if len(name) >= 4 and name in other.split("_")]
    return parts[0] if parts else None


def _names_in(path: str) -> list[str]:
    """Names of keys and sections directly in a section."""
    keys = [key.name for section in sections() if section.path == path for key in section.keys]
    prefix = f"{path}." if path else ""
    inner = [section.path.removeprefix(prefix) for section in sections() if section.path != path]
    return keys + [name for name in inner if name and "." not in name]


def _plain(location: Sequence[str]) -> list[str]:
    """Leave out which of several rewards or changes is meant: its position or its name."""
    parts = [*(part for part in location[:-1] if not part.isdigit()), location[-1]]
    if len(parts) > 2 and parts[0] == "rewards" and parts[1] not in _names_in("rewards"):
        del parts[1]
    return parts


# ---- Text --------------------------------------------------------------------------------------


def _section_text(section: Section) -> str:
    lines = [section.header, *_wrap(section.meaning), ""]
    width = max((len(key.name) for key in section.keys), default=0)
    lines += [f"  {key.name:{width}}  {key.type}; {_or_default(key)}" for key in section.keys]
    inner = [s.path for s in sections() if s.path.startswith(f"{section.path}.")]
    lines += [f"  and section {path}" for path in inner]
    return "\n".join(lines)


def _key_text(key: Key, section: Section) -> str:
    where = section.header or "none: it stands before the first section"
    lines = [key.path, *_wrap(key.meaning), ""]
    lines += [f"  type:     {key.type}"]
    lines += [f"  range:    {key.range}"] if key.range else []
    return "\n".join([*lines, f"  default:  {key.default}", f"  section:  {where}"])


def _wrap(text: str) -> list[str]:
    text = text.replace("``", "`")
    return textwrap.wrap(text, 78, initial_indent="  ", subsequent_indent="  ")


# ---- The schema --------------------------------------------------------------------------------


def _sections(
    path: str, header: str, table: dict[str, Any], meaning: str, known: dict[str, Any]
) -> Iterator[Section]:
    keys: list[Key] = []
    inner: list[Section] = []
    for name, field in table["properties"].items():
        below, is_list = _table(field, known)
        if below is None:
            keys.append(_key(path, name, field, required=name in table.get("required", ())))
            continue
        child = f"{path}.{name}" if path else name
        about = [below["description"], *([field["description"]] if "description" in field else [])]
        inner += _sections(
            child, f"[[{child}]]" if is_list else f"[{child}]", below, " ".join(about), known
        )
    yield Section(path, header, " ".join(meaning.split()), tuple(keys))
    yield from inner


def _table(field: dict[str, Any], known: dict[str, Any]) -> tuple[dict[str, Any] | None, bool]:
    """Find the table that a field holds, alone or in a list; None for a plain value."""
    node, is_list = _value(field), False
    if node.get("type") == "array" and "$ref" in node.get("items", {}):
        node, is_list = node["items"], True
    if "$ref" not in node:
        return None, False
    return known[node["$ref"].rpartition("/")[2]], is_list


def _value(field: dict[str, Any]) -> dict[str, Any]:
    """Schema of the value where there is one: without the choice of none."""
    choices = field.get("anyOf", [field])
    return next(choice for choice in choices if choice.get("type") != "null")


def _key(section: str, name: str, field: dict[str, Any], *, required: bool) -> Key:
    value = _value(field)
    default = "required" if required else _default(field["default"])
    if (section, name) == ("", "name"):
        default = "the file's name"  # `learner.config.file` sets it.
    meaning = " ".join(field["description"].split())
    return Key(section, name, _type(value), _range(value), default, meaning)


def _type(value: dict[str, Any]) -> str:
    if "enum" in value:
        return "one of " + ", ".join(json.dumps(choice) for choice in value["enum"])
    if value["type"] == "array":
        if "prefixItems" not in value:
            return f"list, each a {_type(value['items'])}"
        items = value["prefixItems"]
        return f"list of {len(items)} values, each a {_type(items[0])}"
    if value.get("format") == "ipv4":
        return "IPv4 address"
    names = {
        "string": "text",
        "integer": "whole number",
        "boolean": "true or false",
        "object": "table",
    }
    return names.get(value["type"], str(value["type"]))


def _range(value: dict[str, Any]) -> str:
    if value.get("type") == "array":
        return f"each {_range(value.get('prefixItems', [value.get('items')])[0])}"
    words = {
        "exclusiveMinimum": "above",
        "minimum": "at least",
        "exclusiveMaximum": "below",
        "maximum": "at most",
        "multipleOf": "a multiple of",
        "pattern": "matches",
    }
    limits = [f"{text} {value[limit]}" for limit, text in words.items() if limit in value]
    return ", ".join(limits)


def _or_default(key: Key) -> str:
    return key.default if key.default == "required" else f"default {key.default}"


def _default(value: Any) -> str:
    return "none" if value is None else json.dumps(value)
