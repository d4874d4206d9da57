"""Float32 master weights of a model that computes in a smaller type.

    backward:  gradient of a parameter, in the model's type
                 -> added to its master's gradient, in float32, and released
    step:      the optimiser updates the masters
    copy back: masters, rounded to the model's type -> the model

Bfloat16 has 8 significant bits: an update that is smaller than about a 500th of its weight is
rounded away, which at a learning rate of 1e-6 are nearly all of them. A master adds them up.

Masters begin anywhere in what rounds to the model's weight, at random. If they began at the weight
itself, the model would not change before the updates add up to half a step of bfloat16, at small
learning rates hundreds of them. So, some are near the edge from the start, and the model follows
its masters on average from the first step.

Memory for each parameter of a bfloat16 model: 2 bytes of it, 4 of its master, 4 of the master's
gradient. Of the gradient in bfloat16 there is never more than what the backward pass works on.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

_SMALL = (torch.bfloat16, torch.float16)
_HALF_STEP = 1 << 15
"""Of bfloat16, in the last place of float32."""
PREFIX = "master."
"""Of the masters' names in a checkpoint."""


class Masters:
    """The float32 weights that an optimiser updates, whatever the model computes in.

    A parameter that is float32 already, or is not trained, is its own master. One object of this
    class for a model: it takes the gradients away.
    """

    def __init__(self, model: nn.Module, *, enabled: bool = True, seed: int = 0) -> None:
        """Not ``enabled``: all parameters are their own masters, and are updated in their type."""
        generators: dict[torch.device, torch.Generator] = {}
        self._pairs: dict[str, tuple[nn.Parameter, nn.Parameter]] = {}
        """Parameter and master, by name, where they are not the same."""
        for name, parameter in model.named_parameters():
            if enabled and parameter.requires_grad and parameter.dtype in _SMALL:
                device = parameter.device
                if device not in generators:
                    generators[device] = torch.Generator(device).manual_seed(seed)
                self._pairs[name] = parameter, _master_of(parameter, generators[device])
        self.module = self._skeleton(model) if self._pairs else model
        """Has the model's parameters by their names, those of two names once; each its master."""
        for parameter, master in self._pairs.values():
            parameter.register_post_accumulate_grad_hook(_hand_over_to(master))

    def parameters(self) -> Iterator[nn.Parameter]:
        """What the optimiser updates, with gradients in the same type after a backward pass."""
        return self.module.parameters()

    def zero_grad(self) -> None:
        """Release the gradients."""
        self.module.zero_grad(set_to_none=True)

    @torch.no_grad()
    def copy_back(self) -> None:
        """Give the model its masters' weights, after a step of the optimiser."""
        for parameter, master in self._pairs.values():
            parameter.copy_(master)

    def state_tensors(self) -> dict[str, Tensor]:
        """What a checkpoint needs besides the model: the masters, to be filled in place.

        Empty for a float32 model. After filling them, `copy_back`.
        """
        return {PREFIX + name: master.detach() for name, (_, master) in self._pairs.items()}

    def _skeleton(self, model: nn.Module) -> nn.Module:
        root = nn.Module()
        for name, parameter in model.named_parameters():
            *path, leaf = name.split(".")
            module = root
            for part in path:
                if part not in module._modules:
                    module.add_module(part, nn.Module())
                module = module.get_submodule(part)
            _, master = self._pairs.get(name, (parameter, parameter))
            module.register_parameter(leaf, master)
        return root


def _master_of(parameter: nn.Parameter, generator: torch.Generator) -> nn.Parameter:
    """Float32 weights that round to those of the parameter; zeros stay zeros."""
    master = parameter.detach().float()
    if parameter.dtype == torch.bfloat16:
        # Bfloat16 is the upper half of float32: what is added to the lower half is rounded away.
        lower = torch.randint(
            1 - _HALF_STEP,
            _HALF_STEP,
            master.shape,
            generator=generator,
            device=master.device,
            dtype=torch.int16,
        )
        local = master
        if isinstance(master, DTensor):
            # The same of the whole parameter on all ranks, so that it does not depend on how many
            # there are. Nothing travels.
            shared: Any = distribute_tensor(
                lower, master.device_mesh, master.placements, src_data_rank=None
            )
            local, lower = master.to_local(), shared.to_local()
        local.view(torch.int32).add_(lower.mul_(local != 0))
    return nn.Parameter(master)


def _hand_over_to(master: nn.Parameter) -> Callable[[Tensor], None]:
    """A hook that adds a parameter's gradient to that of its master, and releases it."""

    def hand_over(parameter: Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None
        if master.grad is None:
            master.grad = gradient.float()
        else:
            # Computed in float32: torch widens what it adds.
            master.grad.add_(gradient)

    return hand_over
