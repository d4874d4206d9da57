"""Packed weights that a model can compute with, ready before their bytes arrive."""

import copy
from typing import Any
from weakref import WeakKeyDictionary

import torch

from protocol.errors import EngineError
from protocol.weights import TensorSpec, tensor_digest
from transfer.shared_memory import SharedMemory
from transfer.views import view


class ModelWeights:
    """The weights of a model, from the few memories that its actor uses again and again."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model
        self._prepared: WeakKeyDictionary[SharedMemory, PreparedWeights] = WeakKeyDictionary()

    def load(self, memory: SharedMemory, specs: list[TensorSpec], *, in_place: bool) -> Any:
        """The model with what a memory holds as its parameters; see `PreparedWeights`.

        ``in_place`` each memory has a model of its own: that of the memory before stays as it is.
        """
        prepared = self._prepared.get(memory)
        if prepared is None or prepared.specs != specs:
            model = _without_parameters(self._model) if in_place else self._model
            prepared = PreparedWeights(model, memory.tensor, specs, in_place=in_place)
            self._prepared[memory] = prepared
        prepared.assign()
        return prepared.model

    def digests(self, specs: list[TensorSpec]) -> bytes:
        """Digests of the parameters, from their own bytes."""
        parameters = dict(self._model.named_parameters())
        return b"".join(tensor_digest(_bytes(parameters[spec.name])) for spec in specs)


class PreparedWeights:
    """The parameters of a model over one memory, whatever version is in it.

    Views of a memory take longer to make than a small model to be loaded with them.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        packed: torch.Tensor,
        specs: list[TensorSpec],
        *,
        in_place: bool,
    ) -> None:
        """``in_place`` makes them the parameters without copying them.

        Raises `EngineError` if names, shapes or types do not agree: a model is never half loaded.
        """
        parameters = dict(model.named_parameters())
        if missing := parameters.keys() ^ {spec.name for spec in specs}:
            differ = ", ".join(sorted(missing))
            raise EngineError(f"weights and model differ in parameters: {differ}")
        for spec in specs:
            parameter = parameters[spec.name]
            ours = (tuple(parameter.shape), str(parameter.dtype).removeprefix("torch."))
            if ours != (spec.shape, spec.dtype):
                raise EngineError(
                    f"{spec.name}: the model has {ours[0]} {ours[1]}, the weights {spec.shape} "
                    f"{spec.dtype}"
                )
        self.model = model
        self.specs = specs
        self._packed = packed
        self._in_place = in_place
        self._parameters = [parameters[spec.name] for spec in specs]
        self._views = [self._lasting_view(spec) for spec in specs]

    def assign(self) -> None:
        """Make what the memory holds now the parameters of the model."""
        with torch.no_grad():
            for parameter, spec, lasting in zip(
                self._parameters, self.specs, self._views, strict=True
            ):
                weights = view(self._packed, spec) if lasting is None else lasting
                if self._in_place:
                    parameter.data = weights
                else:
                    parameter.copy_(weights)

    def _lasting_view(self, spec: TensorSpec) -> torch.Tensor | None:
        """A view; None where it would be a copy, which later bytes do not reach."""
        found = view(self._packed, spec)
        address = self._packed.data_ptr() + spec.offset
        return found if found.data_ptr() == address else None


def _without_parameters(model: torch.nn.Module) -> torch.nn.Module:
    """A copy, with parameters of its own over the same memory; tied ones are tied in it, too."""
    parameters = {
        id(parameter): torch.nn.Parameter(parameter.data, requires_grad=False)
        for parameter in model.parameters()
    }
    return copy.deepcopy(model, dict[int, Any](parameters))


def _bytes(parameter: torch.Tensor) -> memoryview:
    return parameter.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data
