"""Tiny random models of the families of transformers, with all that sets one apart from another.

Windows are shorter than the sequences, caps bite, and nothing random is 0 or 1: neither norms nor
biases nor sinks. Several programs and tests compare ways of computing on them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

VOCAB_SIZE = 97
WINDOW = 16
_SHAPE = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
_LOCAL_AND_GLOBAL = {
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention"],
}
_LINEAR_AND_FULL = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
_NOISE = 0.1


@dataclass(frozen=True)
class Family:
    """A kind of model, and how the learner is to compute it."""

    name: str
    kind: str
    """Its name in transformers."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    packed: bool = True
    """Whether its sequences are packed; padded, if not."""
    one_by_one: bool = False
    """Whether not even padding leaves it as it is."""


FAMILIES = (
    Family("Qwen2, tied", "qwen2", {"tie_word_embeddings": True}),
    Family("Qwen2", "qwen2", {"tie_word_embeddings": False}),
    Family(
        "Qwen2, window",
        "qwen2",
        {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    ),
    Family("Qwen3", "qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
    Family("Qwen3-MoE", "qwen3_moe", _EXPERTS | {"num_experts": 4, "head_dim": 16}),
    Family("Llama", "llama", {"tie_word_embeddings": False}),
    Family("SmolLM2 (Llama, tied)", "llama", {"tie_word_embeddings": True}),
    Family("Mistral, window", "mistral", {"sliding_window": WINDOW}),
    Family(
        "Gemma 2, window, caps",
        "gemma2",
        _LOCAL_AND_GLOBAL
        | {
            "head_dim": 16,
            "query_pre_attn_scalar": 24,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
        },
    ),
    Family(
        "Gemma 3, window",
        "gemma3_text",
        _LOCAL_AND_GLOBAL | {"head_dim": 16, "query_pre_attn_scalar": 24},
    ),
    Family(
        "gpt-oss, window, sinks",
        "gpt_oss",
        _LOCAL_AND_GLOBAL | {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16},
    ),
    Family("Phi-3", "phi3"),
    Family("OLMo 2", "olmo2"),
    Family(
        "Granite, scaled head",
        "granite",
        {
            "logits_scaling": 4.0,
            "attention_multiplier": 0.2,
            "residual_multiplier": 0.7,
            "embedding_multiplier": 3.0,
        },
    ),
    Family("Cohere, scaled head", "cohere", {"logit_scale": 0.3}),
    Family("SmolLM3", "smollm3", {"num_hidden_layers": 4}),
    Family("GPT-2", "gpt2", {"n_inner": 96}),
    Family(
        "DeepSeek-V2 (values of another size)",
        "deepseek_v2",
        _EXPERTS
        | {
            "n_routed_experts": 4,
            "n_group": 1,
            "topk_group": 1,
            "q_lora_rank": 24,
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 16,
            "qk_rope_head_dim": 8,
            "v_head_dim": 12,
            "first_k_dense_replace": 1,
            "num_key_value_heads": 4,
        },
    ),
    Family("BLOOM (ALiBi)", "bloom", packed=False),
    Family("Falcon-Mamba", "falcon_mamba", {"state_size": 8}, packed=False),
    Family(
        "Qwen3-Next (linear)",
        "qwen3_next",
        _EXPERTS | _LINEAR_AND_FULL | {"num_experts": 4, "head_dim": 16},
        packed=False,
    ),
    Family(
        "Phi-3, longrope",
        "phi3",
        {
            "original_max_position_embeddings": 32,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "short_factor": [1.0] * 8,
                "long_factor": [1.5 + 0.3 * i for i in range(8)],
            },
        },
        packed=False,
        one_by_one=True,
    ),
)
"""Those that are tried; the last ones are not to be packed."""


def make_family(family: Family, seed: int = 0) -> Any:
    """Return a model of a family in float32, the same every time."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family.kind, **{**_SHAPE, **family.settings})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(_NOISE * torch.randn_like(parameter))
    return model
