"""The optimiser, as the configuration says, over a model's master weights.

``adamw`` is torch's, fused: one pass over memory, on GPUs and on CPUs. ``adamw_8bit`` is torchao's:
its moments have 8 bits, in blocks of 256 with a scale each (arXiv 2110.02861), so that they take 2
bytes a parameter and not 8.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from learner.config.training import OptimizerConfig
from learner.training.masters import Masters
from protocol.errors import ConfigError, brief

_FLAT = StateDictOptions(flatten_optimizer_state_dict=True)
_STATE = "state."


class PolicyOptimizer:
    """Updates the weights of a model: clipping, learning rate, masters and state."""

    def __init__(self, model: nn.Module, config: OptimizerConfig, *, seed: int = 0) -> None:
        """Raises `ConfigError` for a kind that this machine lacks."""
        self._config = config
        self._masters = Masters(model, enabled=config.master_weights, seed=seed)
        self._inner = _KINDS[config.kind](self._masters.parameters(), config)

    def zero_grad(self) -> None:
        """Release the gradients."""
        self._masters.zero_grad()

    def clip(self) -> float:
        """Scale the gradient to the configured norm if it is larger; returns its norm before."""
        norm = nn.utils.clip_grad_norm_(self._masters.parameters(), self._config.max_grad_norm)
        return (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()

    def step(self) -> None:
        """Update the weights by their gradient."""
        self._inner.step()
        self._masters.copy_back()

    @property
    def lr(self) -> float:
        """The learning rate as it is now."""
        return float(self._inner.param_groups[0]["lr"])

    def set_lr(self, factor: float) -> None:
        """Make the learning rate this share of the configured one."""
        for group in self._inner.param_groups:
            if isinstance(group["lr"], Tensor):  # torchao's, which is compiled for this tensor.
                group["lr"].fill_(self._config.lr * factor)
            else:
                group["lr"] = self._config.lr * factor

    def scale_lr(self, factor: float) -> None:
        """Multiply the learning rate as it is now."""
        for group in self._inner.param_groups:
            group["lr"] *= factor

    def state_tensors(self) -> dict[str, Tensor]:
        """What a checkpoint needs of it: its own tensors, plain ones (or DTensors).

        To continue from one, fill them in place and call `filled`.
        """
        is_new = not self._inner.state
        state: dict[str, Any] = dict(
            get_optimizer_state_dict(self._masters.module, self._inner, options=_FLAT)
        )
        tensors = self._masters.state_tensors()
        for name, value in state.items():
            if name.startswith(_STATE) and isinstance(value, Tensor):
                if is_new and name.endswith(".step"):
                    # The call above has made the state by a step that changes nothing else.
                    value.zero_()
                tensors.update(_plain(name, value))
        return tensors

    def filled(self) -> None:
        """Be as the tensors of `state_tensors` say that were filled."""
        self._masters.copy_back()


def _plain(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The tensor, or the tensors that one of torchao's consists of; the same memory."""
    if isinstance(tensor, DTensor) or not is_traceable_wrapper_subclass(tensor):
        yield name, tensor
        return
    parts, _ = tensor.__tensor_flatten__()
    for part in parts:
        yield from _plain(f"{name}.{part}", getattr(tensor, part))


def _adamw(parameters: Iterator[nn.Parameter], config: OptimizerConfig) -> torch.optim.Optimizer:
    # On CPUs too: for 135 M parameters and one thread 0.09 s, by torch's default there 0.55.
    return torch.optim.AdamW(
        parameters,
        lr=config.lr,
        betas=config.betas,
        weight_decay=config.weight_decay,
        fused=True,
    )


def _adamw_8bit(
    parameters: Iterator[nn.Parameter], config: OptimizerConfig
) -> torch.optim.Optimizer:
    try:
        from torchao.optim import AdamW8bit
    except ImportError as error:
        raise ConfigError(
            'optimizer.kind = "adamw_8bit" needs torchao: pip install "async-gdpo[8bit]" '
            f"({brief(error)})"
        ) from error
    optimizer: torch.optim.Optimizer = AdamW8bit(
        parameters, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay
    )
    _check_that_it_runs(AdamW8bit, optimizer.param_groups[0]["params"][0].device)
    return optimizer


def _check_that_it_runs(kind: Any, device: torch.device) -> None:
    """Try a step, which torchao compiles; raises `ConfigError`."""
    weight = nn.Parameter(torch.zeros(4096, device=device))
    weight.grad = torch.ones_like(weight)
    try:
        kind([weight], lr=1e-3).step()
    except Exception as error:  # Compilers that are missing raise something of their own.
        raise ConfigError(
            f'optimizer.kind = "adamw_8bit" does not run on {device}: {brief(error)}; '
            "torchao compiles its step, on CPUs with a C++ compiler"
        ) from error


_KINDS: dict[str, Callable[[Iterator[nn.Parameter], OptimizerConfig], torch.optim.Optimizer]] = {
    "adamw": _adamw,
    "adamw_8bit": _adamw_8bit,
}
