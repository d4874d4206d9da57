"""Sections ``[model]``, ``[data]`` and ``[eval]``: what a run is made from."""

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from protocol.config import StrictModel
from protocol.messages import MAX_TEMPERATURE


class ModelConfig(StrictModel):
    """The policy. The learner loads it; actors get its configuration and weights over the wire."""

    path: str
    """Hub name, or a folder with config, safetensors and tokenizer files."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type that the learner computes in; ``auto``: float32 for a model whose files say so, else
    bfloat16, of which the optimiser updates a float32 copy (``optimizer.master_weights``)."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """Implementation of attention in transformers; ``flash_attention_2`` needs its package."""
    device: str = "auto"
    """Device of the learner as torch names it, such as ``cuda:1``; ``auto``: a GPU where there is
    one, else the CPU."""


class DataConfig(StrictModel):
    """Anything `datasets` loads: a hub name, or a .jsonl, .json, .parquet or .csv file."""

    train: str
    """Prompts to train on, with a ``prompt`` column; all other columns reach the reward functions
    by name."""
    train_split: str = "train"
    """Split of ``train`` to use; a file has the one called ``train``."""
    heldout: str | None = None
    """Prompts for the evaluation before and after training; None for no evaluation."""
    heldout_split: str = "train"
    """Split of ``heldout`` to use."""


class EvalConfig(StrictModel):
    """Evaluation on held-out prompts, before the first step and after the last."""

    prompts: PositiveInt = 128
    """Prompts evaluated: the first ones of the data set."""
    num_rollouts: PositiveInt = 4
    """Rollouts per prompt."""
    temperature: Annotated[float, Field(ge=0, le=MAX_TEMPERATURE)] = 1.0
    """Sampling temperature; 0 takes the likeliest token."""
    timeout_s: PositiveFloat = 600.0
    """Seconds that one evaluation may take; what is missing by then is left out."""
