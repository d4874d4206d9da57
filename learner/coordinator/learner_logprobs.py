"""What the learner's model code computes with the weights of any snapshot, in CPU memory.

Shapes: N tokens.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from learner.coordinator.agreement import TokenScores
from learner.packing.attention import PACKED
from learner.packing.budget import Budget
from learner.packing.forward import Forward, Way
from learner.packing.rows import Rows
from learner.packing.split import Work, split
from learner.packing.trees import tree_of
from learner.training.policy import Policy
from learner.weights.snapshots import Snapshot
from protocol.errors import ConfigError, brief
from protocol.groups import Group
from transfer.views import view

ENOUGH_TOKENS = 128
"""Rollouts beyond those that have so many tokens are not computed."""
_PASS = Budget(most=1024, quick=1024)
_CPU = torch.device("cpu")
_Places = list[tuple[torch.nn.Module, str, str]]
"""Modules, the names of parameters in them, and the names that these have in a snapshot."""


class LearnerLogprobs:
    """A model without weights of its own: each layer has a snapshot's while it computes.

    So no second copy of the model is needed, whatever type it computes in. For one thread.
    """

    def __init__(self, policy: Policy, way: Way) -> None:
        """``way`` is the trainer's. Raises `ConfigError` if the model cannot be built empty."""
        self._way = way
        self._specs = {spec.name: spec for spec in policy.specs}
        # A copy: what is set in it below would reach into the model in training.
        config = copy.deepcopy(policy.model.config)
        attention = config._attn_implementation
        try:
            with torch.device("meta"):
                self._model: Any = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                    config,
                    dtype=torch.float32,
                    # The others need a GPU.
                    attn_implementation=attention if attention in ("eager", PACKED) else "sdpa",
                    trust_remote_code=False,
                ).eval()
        except Exception as error:
            raise ConfigError(
                f"the model cannot be built without weights: {brief(error)}"
            ) from error
        self._model.requires_grad_(False)
        # Buffers, of rotary positions for example, come from nowhere else.
        for name, buffer in policy.model.named_buffers():
            path, _, attribute = name.rpartition(".")
            module = self._model.get_submodule(path)
            module.register_buffer(attribute, buffer.detach().to("cpu", copy=True))
        self._snapshot: Snapshot | None = None
        self._dtype = torch.float32
        self._empty = {name: p for name, p in self._model.named_parameters()}
        self._outside = self._lend_to_layers()

    def scores(
        self, group: Group, snapshot: Snapshot, dtype: torch.dtype, temperature: float
    ) -> TokenScores:
        """Score tokens that were sampled from the snapshot, enough of them if there are."""
        forward = Forward(self._way, temperature)
        some = _some(group, snapshot.version)
        if not some.rollouts:
            return TokenScores(*(torch.empty(0) for _ in range(4)))
        trees = [tree_of(some, 0)]
        passes = [
            forward.rows(part, _CPU)
            for part in split(trees, self._way, _PASS, Work.of(self._model))
        ]
        chosen_N = torch.cat([rows.versions_N == snapshot.version for rows in passes])
        engine_N = torch.cat([rows.behaviour_N for rows in passes])
        learner_N, gain_N = self._compute(passes, snapshot, torch.float32, forward)
        rounded_N = learner_N
        if dtype != torch.float32:
            rounded_N, _ = self._compute(passes, snapshot, dtype, forward)
        return TokenScores(*(x_N[chosen_N] for x_N in (engine_N, learner_N, rounded_N, gain_N)))

    @torch.inference_mode()
    def _compute(
        self, passes: list[Rows], snapshot: Snapshot, dtype: torch.dtype, forward: Forward
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probability and gain of each token."""
        with self._weights_of(snapshot, dtype):
            parts = [forward.logprobs_and_entropy(self._model, rows) for rows in passes]
        logprobs_N, entropy_N = (torch.cat(column) for column in zip(*parts, strict=True))
        # x - E[x] for the token's logit x: log p + logsumexp - (logsumexp - H).
        return logprobs_N, logprobs_N + entropy_N

    # --- lending weights ------------------------------------------------------------------------

    def _lend_to_layers(self) -> _Places:
        """Have each layer take its weights when it is called; returns the places outside."""
        names = {id(parameter): name for name, parameter in self._empty.items()}
        places = [
            (module, attribute, names[id(parameter)])
            for module in self._model.modules()
            for attribute, parameter in module.named_parameters(recurse=False)
        ]
        # Those that transformers itself moves between devices as a whole.
        classes = set(self._model._no_split_modules or ())
        layers = [m for m in self._model.modules() if type(m).__name__ in classes]
        inside: set[torch.nn.Module] = set()
        for layer in layers:
            modules = set(layer.modules())
            if layer in inside:
                continue
            inside |= modules
            own = [place for place in places if place[0] in modules]
            layer.register_forward_pre_hook(partial(self._fill_layer, own))
            layer.register_forward_hook(partial(self._drain_layer, own), always_call=True)
        return [place for place in places if place[0] not in inside]

    @contextmanager
    def _weights_of(self, snapshot: Snapshot, dtype: torch.dtype) -> Iterator[None]:
        self._snapshot, self._dtype = snapshot, dtype
        self._fill(self._outside)
        try:
            yield
        finally:
            self._drain(self._outside)
            self._snapshot = None

    def _fill(self, places: _Places) -> None:
        assert self._snapshot is not None
        # Tied ones once.
        filled: dict[str, torch.nn.Parameter] = {}
        for module, attribute, name in places:
            if name not in filled:
                weight = view(self._snapshot.packed, self._specs[name]).to(self._dtype)
                filled[name] = torch.nn.Parameter(weight, requires_grad=False)
            setattr(module, attribute, filled[name])

    def _drain(self, places: _Places) -> None:
        for module, attribute, name in places:
            setattr(module, attribute, self._empty[name])

    def _fill_layer(self, places: _Places, *_: Any) -> None:
        self._fill(places)

    def _drain_layer(self, places: _Places, *_: Any) -> None:
        self._drain(places)


def _some(group: Group, version: int) -> Group:
    """The first rollouts that have enough tokens of ``version`` together, or all that have any."""
    chosen, num_tokens = [], 0
    for rollout in group.rollouts:
        of_version = int((rollout.token_versions == version).sum())
        if of_version:
            chosen.append(rollout)
            num_tokens += of_version
        if num_tokens >= ENOUGH_TOKENS:
            break
    return replace(group, rollouts=tuple(chosen))
