"""Sections ``[model]``, ``[data]`` and ``[eval]``: what a run is made from."""

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from protocol.config import StrictModel
from protocol.messages import MAX_TEMPERATURE

HELDOUT = "heldout"
"""Name of the set of ``data.heldout``."""


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
    """Prompts to evaluate on; None: on those of ``eval.sets`` only, if there are any."""
    heldout_split: str = "train"
    """Split of ``heldout`` to use."""


SetName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]


class PassWhen(StrictModel):
    """Which rollouts pass, for pass@k."""

    reward: str
    """Name of the reward that decides."""
    at_least: float
    """Score from which a rollout passes."""


class EvalSet(StrictModel):
    """A set of held-out prompts beside ``data.heldout``, or those sampled in another way.

    What is not given is as in ``[eval]``.
    """

    name: SetName
    """Name of the set in metrics, plots and overrides; ``data.heldout`` is called heldout."""
    data: str | None = None
    """Hub name or file, as in ``[data]``; None: that of ``data.heldout``."""
    split: str = "train"
    """Split of ``data`` to use."""
    prompts: PositiveInt | None = None
    """Prompts evaluated: the first ones of the data set."""
    num_rollouts: Annotated[int, Field(ge=1, le=65_536)] | None = None
    """Rollouts per prompt; 1 where ``temperature`` is 0, which makes all of them the same."""
    temperature: Annotated[float, Field(ge=0, le=MAX_TEMPERATURE)] | None = None
    """Sampling temperature; 0 takes the likeliest token."""
    pass_at: tuple[PositiveInt, ...] | None = None
    """The k of pass@k; not given: those of ``[eval]`` that ``num_rollouts`` suffices for."""


class EvalConfig(StrictModel):
    """Evaluation on held-out prompts: before the first step, after the last, and in between."""

    every_steps: NonNegativeInt = 0
    """Steps from one evaluation to the next, while training goes on; 0: only before the first step
    and after the last."""
    prompts: PositiveInt = 128
    """Prompts evaluated: the first ones of the data set."""
    num_rollouts: Annotated[int, Field(ge=1, le=65_536)] = 4
    """Rollouts per prompt."""
    temperature: Annotated[float, Field(ge=0, le=MAX_TEMPERATURE)] = 1.0
    """Sampling temperature; 0 takes the likeliest token."""
    timeout_s: PositiveFloat = 600.0
    """Seconds that one evaluation may take; what is missing by then is left out."""
    pass_when: PassWhen | None = None
    """None: no pass@k is computed."""
    pass_at: tuple[PositiveInt, ...] = (1,)
    """The k of pass@k, the chance that one of k rollouts of a prompt passes: without bias if
    ``num_rollouts`` is k at least."""
    sets: tuple[EvalSet, ...] = ()


@dataclass(frozen=True, slots=True)
class HeldoutSet:
    """One set of held-out prompts, with everything that its evaluation depends on."""

    name: str
    source: str
    split: str
    prompts: int
    num_rollouts: int
    temperature: float
    pass_at: tuple[int, ...]
    """Empty where no pass@k is computed."""


def heldout_sets(data: DataConfig, config: EvalConfig) -> tuple[HeldoutSet, ...]:
    """Return the sets to evaluate, ``data.heldout`` first; raises `ValueError` for wrong ones."""
    first = (EvalSet(name=HELDOUT),) if data.heldout else ()
    sets = tuple(_resolved(given, data, config) for given in (*first, *config.sets))
    names = [heldout.name for heldout in sets]
    if twice := [name for name in names if names.count(name) > 1]:
        hint = " (which is that of data.heldout)" if twice[0] == HELDOUT and first else ""
        raise ValueError(f"two of eval.sets have the name {twice[0]!r}{hint}; give each its own")
    return sets


def _resolved(given: EvalSet, data: DataConfig, config: EvalConfig) -> HeldoutSet:
    where = "eval" if given == EvalSet(name=HELDOUT) else f"eval.sets.{given.name}"
    source, split = (given.data, given.split) if given.data else (data.heldout, data.heldout_split)
    if source is None:
        raise ValueError(f"{where}: neither its data nor data.heldout is set")
    num_rollouts = given.num_rollouts or (1 if given.temperature == 0 else config.num_rollouts)
    pass_at = given.pass_at
    if pass_at is None:
        inherits = where != "eval"
        pass_at = tuple(k for k in config.pass_at if not inherits or k <= num_rollouts)
    elif config.pass_when is None:
        raise ValueError(f"{where}.pass_at needs eval.pass_when: which rollouts pass?")
    if config.pass_when is not None and max(pass_at, default=0) > num_rollouts:
        raise ValueError(
            f"{where}.pass_at = {max(pass_at)} needs {where}.num_rollouts of at least as many; "
            f"they are {num_rollouts}"
        )
    return HeldoutSet(
        name=given.name,
        source=source,
        split=split,
        prompts=given.prompts or config.prompts,
        num_rollouts=num_rollouts,
        temperature=config.temperature if given.temperature is None else given.temperature,
        pass_at=tuple(sorted(set(pass_at))) if config.pass_when is not None else (),
    )
