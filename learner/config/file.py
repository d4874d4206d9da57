"""Reading a configuration: a TOML file, then ``key.sub=value`` overrides."""

import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from learner.config.run import RunConfig
from learner.config.schema import unknown
from protocol.errors import ConfigError


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a TOML file and apply ``key.sub=value`` overrides; raises `ConfigError`.

    The name defaults to the file's; paths of models, data and keys that exist relative to the file
    are made absolute, others are left for the hub.
    """
    try:
        tree = tomllib.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is no valid TOML: {error}") from error
    for override in overrides:
        _override(tree, override)
    tree.setdefault("name", path.stem)
    _resolve_paths(tree, path.parent)
    try:
        config = RunConfig.model_validate(tree)
    except ValidationError as error:
        problems = "; ".join(text for problem in error.errors() for text in _explain(dict(problem)))
        raise ConfigError(f"{path}: {problems}") from error
    config.pacing()
    return config


def parse_override(override: str) -> tuple[list[str], Any]:
    """Split ``key.sub=value`` into the parts of its key and its value; raises `ConfigError`.

    A value is TOML, or a string where it is not.
    """
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise ConfigError(
            f"{override!r} is no override; write key.sub=value, e.g. optimizer.lr=1e-6"
        )
    try:
        return parts, tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        return parts, text.strip()


def _override(tree: dict[str, Any], override: str) -> None:
    parts, value = parse_override(override)
    node: Any = tree
    for part in parts[:-1]:
        node = _child(node, part, override)
    if not isinstance(node, dict):
        raise ConfigError(f"{override!r}: {'.'.join(parts[:-1])} holds no keys")
    node[parts[-1]] = value


def _child(node: Any, part: str, override: str) -> Any:
    """Descend one level; a reward, or a set of prompts, goes by its name."""
    if isinstance(node, list):
        named = [item for item in node if isinstance(item, dict) and item.get("name") == part]
        if not named:
            names = ", ".join(str(item.get("name")) for item in node if isinstance(item, dict))
            raise ConfigError(f"{override!r}: nothing is named {part!r}; there are {names}")
        return named[0]
    if not isinstance(node, dict):
        raise ConfigError(f"{override!r}: {part!r} is below a plain value")
    return node.setdefault(part, {})


def _resolve_paths(tree: dict[str, Any], folder: Path) -> None:
    evaluation = tree.get("eval")
    sets = evaluation.get("sets") if isinstance(evaluation, dict) else None
    for section, table, keys in (
        ("model", tree.get("model"), ("path",)),
        ("data", tree.get("data"), ("train", "heldout")),
        *(("eval.sets", table, ("data",)) for table in (sets if isinstance(sets, list) else ())),
        ("keys", tree.get("keys"), ("secret", "allowed", "actor")),
    ):
        for key in keys:
            if isinstance(table, dict) and isinstance(table.get(key), str):
                try:
                    candidate = folder / Path(table[key]).expanduser()
                except RuntimeError as error:
                    raise ConfigError(f"{section}.{key} = {table[key]!r}: {error}") from error
                if candidate.exists():
                    table[key] = str(candidate.resolve())


def _explain(problem: dict[str, Any]) -> Iterator[str]:
    """Say what is wrong; an unknown section counts key by key."""
    location = [str(part) for part in problem["loc"]]
    where = ".".join(location)
    if problem["type"] == "extra_forbidden":
        keys = problem["input"] if isinstance(problem["input"], dict) else {}
        yield from (unknown([*location, key]) for key in keys)
        if not keys:
            yield unknown(location)
    elif problem["type"] == "missing":
        yield f"{where} is missing"
    else:
        message = problem["msg"].removeprefix("Value error, ")
        yield f"{where}: {message}" if where else message
