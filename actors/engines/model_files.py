"""The model's files from the welcome: configuration and tokenizer, no weights."""

import re
from collections.abc import Sequence
from pathlib import Path

from transformers import AutoConfig, GenerationConfig

from protocol.errors import BadMessage, ConfigError
from protocol.messages import MODEL_FILE_SUFFIXES

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def write_model_files(folder: Path, names: Sequence[str], contents: list[memoryview]) -> None:
    """Write what the learner sent; raises `BadMessage`."""
    if len(names) != len(contents):
        raise BadMessage(f"the welcome names {len(names)} files and brings {len(contents)}")
    if len(set(names)) < len(names):
        raise BadMessage("the welcome brings two files of one name")
    for name, content in zip(names, contents, strict=True):
        # The names come from the network: never leave the folder.
        if not _NAME.fullmatch(name) or not name.endswith(MODEL_FILE_SUFFIXES):
            raise BadMessage(f"the welcome brings a file named {name!r}")
        (folder / name).write_bytes(content)


def end_ids(folder: Path) -> frozenset[int]:
    """End-of-sequence ids from generation_config.json where there is one, else from config.json."""
    ids = AutoConfig.from_pretrained(folder, trust_remote_code=False).eos_token_id
    if (folder / "generation_config.json").exists():
        ids = GenerationConfig.from_pretrained(folder).eos_token_id or ids
    if ids is None:
        raise ConfigError("the model's configuration names no eos_token_id; add it to config.json")
    return frozenset([ids] if isinstance(ids, int) else ids)
