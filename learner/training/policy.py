"""The policy: loading it, what actors need of it, and writing it as a checkpoint."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from learner.config.run import RunConfig
from protocol.errors import ConfigError, brief
from protocol.messages import MODEL_FILE_SUFFIXES
from protocol.weights import TensorSpec, layout

_FILES = ("config.json", "generation_config.json", "chat_template.jinja")
_TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges*",
)
_HUB_PATTERNS = ("*.json", "*.jinja", "*.txt", "*.model", "*.safetensors")


@dataclass(frozen=True, slots=True, eq=False)
class Policy:
    """The model in training and the files that describe it."""

    model: Any
    folder: Path
    files: dict[str, bytes]
    """Configuration and tokenizer files by name, as actors get them."""
    files_digest: str
    specs: list[TensorSpec]
    """Layout of the packed weights, in the actors' type."""

    @property
    def manifest(self) -> tuple[tuple[str, str, tuple[int, ...]], ...]:
        """Name, type and shape of each packed tensor, in order."""
        return tuple((spec.name, spec.dtype, spec.shape) for spec in self.specs)

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding, which may be more than the tokenizer's tokens."""
        return int(self.model.get_input_embeddings().num_embeddings)

    def save(self, target: Path, weights: dict[str, torch.Tensor]) -> None:
        """Write these weights of the model with its tokenizer in Hugging Face form."""
        self.model.save_pretrained(target, state_dict=weights)
        for name, content in self.files.items():
            if name not in ("config.json", "generation_config.json"):
                (target / name).write_bytes(content)


def load_policy(config: RunConfig, weights: Path | None = None) -> Policy:
    """Load the model and its files; raises `ConfigError`.

    ``weights`` is the folder of a checkpoint's model, whose weights take the place of the model's.
    """
    config = with_dtype(config)
    folder = _folder(config.model.path)
    model = load_model(config, weights or folder)
    _check_lengths(config, model.config)
    _check_buffers(config, model)
    files = {path.name: path.read_bytes() for path in _model_files(folder)}
    if not any(name.startswith("tokenizer") for name in files):
        raise ConfigError(f"model.path = {config.model.path!r} holds no tokenizer files")
    dtype = config.for_actors().dtype
    manifest = [(name, dtype, tuple(p.shape)) for name, p in model.named_parameters()]
    return Policy(
        model=model,
        folder=folder,
        files=files,
        files_digest=_files_digest(files),
        specs=layout(manifest),
    )


def with_dtype(config: RunConfig) -> RunConfig:
    """The configuration with the type that ``model.dtype = "auto"`` means; raises `ConfigError`."""
    if config.model.dtype != "auto":
        return config
    dtype = _model_config(_folder(config.model.path)).dtype
    dtype = "float32" if dtype in (None, torch.float32, torch.float64) else "bfloat16"
    return config.model_copy(update={"model": config.model.model_copy(update={"dtype": dtype})})


def load_model(config: RunConfig, folder: Path) -> Any:
    """The model in ``folder``, as ``config.model`` says; raises `ConfigError`."""
    config = with_dtype(config)
    # Its bars would tear our own display.
    transformers.utils.logging.disable_progress_bar()
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=getattr(torch, config.model.dtype),
            attn_implementation=config.model.attention,
            trust_remote_code=False,
        )
        model.to(_device(config.model.device))
    except Exception as error:
        # Damaged files, unknown architectures and devices each raise something of their own.
        raise ConfigError(f"the model in {folder}: {brief(error)}") from error
    # Without dropout, so that log-probabilities are those of the sampled policy.
    return model.eval()


def load_tokenizer(policy: Policy) -> Any:
    """The tokenizer of its files; raises whatever its parsers do."""
    return AutoTokenizer.from_pretrained(policy.folder, trust_remote_code=False)


def check_model(config: RunConfig) -> None:
    """Check what needs no weights; raises `ConfigError`. The hub is not asked."""
    path = config.model.path
    if not Path(path).is_dir() and not _names_folder(path):
        return
    _check_lengths(config, _model_config(_folder(path)))


def _names_folder(path: str) -> bool:
    """Whether a path means a folder and not a model of the hub."""
    return path.startswith((".", "/", "~"))


def _folder(path: str) -> Path:
    if Path(path).is_dir():
        return Path(path)
    if _names_folder(path):
        raise ConfigError(f"model.path = {path!r}: no such folder")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path, allow_patterns=list(_HUB_PATTERNS)))
    except Exception as error:
        raise ConfigError(
            f"model.path = {path!r} is no folder, and the hub does not give it: {brief(error)}"
        ) from error


def _model_config(folder: Path) -> Any:
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        raise ConfigError(f"the model in {folder}: {brief(error)}") from error


def _model_files(folder: Path) -> list[Path]:
    found = {path for pattern in (*_FILES, *_TOKENIZER_FILES) for path in folder.glob(pattern)}
    return sorted(path for path in found if path.is_file() and path.suffix in MODEL_FILE_SUFFIXES)


def _files_digest(files: dict[str, bytes]) -> str:
    whole = hashlib.blake2b(digest_size=16)
    for name, content in sorted(files.items()):
        whole.update(name.encode() + b"\0" + hashlib.blake2b(content).digest())
    return whole.hexdigest()


def _check_lengths(config: RunConfig, model_config: Any) -> None:
    longest = getattr(model_config, "max_position_embeddings", None)
    needed = config.sampling.max_prompt_tokens + config.sampling.max_tokens
    if longest is not None and needed > longest:
        raise ConfigError(
            f"sampling.max_prompt_tokens + sampling.max_tokens = {needed} exceeds the model's "
            f"{longest} positions; lower one of them"
        )


def _check_buffers(config: RunConfig, model: Any) -> None:
    """Refuse persistent buffers, which actors would lack: only parameters are trained and sent."""
    buffers = {name for name, _ in model.named_buffers()} & model.state_dict().keys()
    if buffers:
        raise ConfigError(
            f"model.path = {config.model.path!r}: its weights contain buffers "
            f"({', '.join(sorted(buffers)[:3])}), which are not sent to actors"
        )


def _device(device: str) -> str:
    if device != "auto":
        return device
    return "cuda" if torch.cuda.is_available() else "cpu"
