"""What the learner's model code computes with the weights of any snapshot, in CPU memory.

Shapes: N tokens, V vocabulary.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from learner.coordinator.agreement import TokenScores
from learner.training.policy import Policy
from learner.weights.snapshots import Snapshot
from protocol.errors import ConfigError, brief
from protocol.groups import Group, Rollout
from transfer.views import view

_Places = list[tuple[torch.nn.Module, str, str]]
"""Modules, the names of parameters in them, and the names that these have in a snapshot."""


class LearnerLogprobs:
    """A model without weights of its own: each layer has a snapshot's while it computes.

    So no second copy of the model is needed, whatever type it computes in. For one thread.
    """

    def __init__(self, policy: Policy) -> None:
        """Raises `ConfigError` if the model cannot be built without its weights."""
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
                    attn_implementation=attention if attention == "eager" else "sdpa",
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
        """Score the tokens that were sampled from the snapshot, one rollout after the other."""
        rollouts = [
            (rollout, chosen)
            for rollout in group.rollouts
            if (chosen := rollout.token_versions == snapshot.version).any()
        ]
        engine = [torch.from_numpy(rollout.logprobs[chosen]) for rollout, chosen in rollouts]
        computed = {
            each: [self._rollout(group, r, snapshot, each, temperature) for r, _ in rollouts]
            for each in {torch.float32, dtype}
        }
        masks = [torch.from_numpy(chosen) for _, chosen in rollouts]

        def joined(each: torch.dtype, row: int) -> torch.Tensor:
            rows = zip(computed[each], masks, strict=True)
            return torch.cat([torch.empty(0), *(values[row][mask] for values, mask in rows)])

        return TokenScores(
            engine_N=torch.cat([torch.empty(0), *engine]),
            learner_N=joined(torch.float32, 0),
            rounded_N=joined(dtype, 0),
            gain_N=joined(torch.float32, 1),
        )

    @torch.inference_mode()
    def _rollout(
        self,
        group: Group,
        rollout: Rollout,
        snapshot: Snapshot,
        dtype: torch.dtype,
        temperature: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probability and gain of each token of the completion."""
        ids = torch.from_numpy(np.concatenate([group.prompt_tokens, rollout.tokens])).long()
        first = len(group.prompt_tokens)
        with self._weights_of(snapshot, dtype):
            logits_1NV = self._model(
                input_ids=ids[None, :-1],
                use_cache=False,
                logits_to_keep=torch.arange(first - 1, len(ids) - 1),
            ).logits
        scaled_NV = logits_1NV[0].float() / temperature
        tokens_N1 = ids[first:, None]
        logprobs_NV = scaled_NV.log_softmax(-1)
        gain_N = scaled_NV.gather(1, tokens_N1)[:, 0] - (logprobs_NV.exp() * scaled_NV).sum(-1)
        return logprobs_NV.gather(1, tokens_N1)[:, 0], gain_N

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
