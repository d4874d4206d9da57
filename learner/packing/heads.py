"""The head of a causal language model of transformers: what it does to hidden states."""

from typing import Any

import gdpo


def head_of(model: Any) -> gdpo.Head:
    """The model's head with the scale and the cap that its own forward pass applies.

    Families differ in how they name these: `learner.packing.choice` compares what comes of it.
    """
    linear, config = model.get_output_embeddings(), model.config.get_text_config()
    scale = 1.0
    if divisor := getattr(config, "logits_scaling", None):  # Granite
        scale /= divisor
    for owner, name in (
        (model, "logit_scale"),
        (config, "lm_head_multiplier"),
    ):  # Cohere, Falcon-H1
        factor = getattr(owner, name, None)
        scale *= 1.0 if factor is None else float(factor)
    return gdpo.Head(
        linear.weight,
        bias_V=getattr(linear, "bias", None),
        scale=scale,
        softcap=getattr(config, "final_logit_softcapping", None),
    )
