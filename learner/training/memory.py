"""Layers of a transformers model that keep fewer activations, or are compiled.

Both leave the model in evaluation mode, in which no dropout is active, and neither changes the
names of its parameters. A copy of the model has them too, with its own weights.
"""

from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from learner.config.training import TrainingConfig
from learner.packing.budget import Budget, bytes_per_token, token_budget
from learner.packing.forward import Forward
from protocol.errors import ConfigError


def prepared(
    model: Any,
    forward: Forward,
    longest: int,
    training: TrainingConfig,
    *,
    masters: bool = True,
    ranks: int = 1,
) -> Budget:
    """Do to the layers what the configuration says; returns the tokens of a pass.

    ``masters`` and ``ranks`` are those of `token_budget`: none of them has memory yet.

    Raises `ConfigError` for a model whose layers are not told apart.
    """
    recomputed = 0.0
    if training.activation_checkpointing:
        # The backward pass computes one layer after the other again.
        recomputed = bytes_per_token(model, forward, longest) / len(layers_of(model))
    prepare_layers(model, checkpointed=training.activation_checkpointing, compiled=training.compile)
    if tokens := training.microbatch_tokens:
        return Budget(most=tokens, quick=tokens)
    return token_budget(
        model, forward, longest, recomputed_bytes=recomputed, masters=masters, ranks=ranks
    )


def prepare_layers(model: Any, *, checkpointed: bool, compiled: bool) -> None:
    """Wrap the forward pass of each layer.

    ``compiled``: by ``torch.compile`` at its first call, for any number of tokens; one code for all
    layers that are alike.

    ``checkpointed``: only what goes into a layer is kept, and the rest computed again in the
    backward pass. transformers' own switch does so in training mode alone, which is the mode of
    dropout too: some layers have it themselves (OPT).

    Raises `ConfigError` for a model whose layers are not told apart.
    """
    for layer in layers_of(model) if checkpointed or compiled else ():
        if compiled:
            # First: a checkpoint that is compiled may call nothing that is not, as attention is.
            forward = torch.compile(type(layer).forward, dynamic=True)
            layer.forward = MethodType(forward, layer)
        if checkpointed:
            # Without dropout there is nothing random to repeat.
            layer.forward = partial(
                checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False
            )


def layers_of(model: Any) -> list[nn.Module]:
    """The layers that transformers itself would checkpoint, outermost ones only.

    Raises `ConfigError` for a model whose layers are not told apart.
    """
    found: list[nn.Module] = []
    inside: set[nn.Module] = set()
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer) and module not in inside:
            found.append(module)
            inside.update(module.modules())
    if not found:
        raise ConfigError(
            f"{type(model).__name__} has no layers that transformers can checkpoint; turn "
            "training.activation_checkpointing and training.compile off, and train it on one rank"
        )
    return found
