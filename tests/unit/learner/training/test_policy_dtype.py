"""The type that the learner computes in, when nobody says."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from learner.config.file import load_config
from learner.training.policy import load_policy, with_dtype


def folder_of(recipe: Path, target: Path, dtype: str | None) -> Path:
    """The demo's model, whose files say that its weights have this type."""
    base = Path(load_config(recipe, []).model.path)
    shutil.copytree(base, target)
    config = json.loads((target / "config.json").read_text())
    config = {key: value for key, value in config.items() if key not in ("dtype", "torch_dtype")}
    if dtype is not None:
        config["torch_dtype"] = dtype
    (target / "config.json").write_text(json.dumps(config))
    return target


@pytest.mark.parametrize(
    ("dtype", "chosen"),
    [
        ("float32", "float32"),
        ("float64", "float32"),
        ("bfloat16", "bfloat16"),
        ("float16", "bfloat16"),
        (None, "float32"),
    ],
)
def test_it_is_that_of_the_models_files(recipe, tmp_path, dtype, chosen):
    model = folder_of(recipe, tmp_path / "model", dtype)
    config = load_config(recipe, [f"model.path={model}"])
    resolved = with_dtype(config)
    assert resolved.model.dtype == resolved.for_actors().dtype == chosen
    policy = load_policy(config)
    assert policy.model.dtype == getattr(torch, chosen)
    assert {spec.dtype for spec in policy.specs} == {chosen}


def test_what_the_user_says_counts(recipe, tmp_path):
    model = folder_of(recipe, tmp_path / "model", "bfloat16")
    config = load_config(recipe, [f"model.path={model}", "model.dtype=float32"])
    assert with_dtype(config) is config
    assert load_policy(config).model.dtype == torch.float32
