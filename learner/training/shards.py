"""A model whose weights are shared out to ranks by FSDP2, and its tensors made whole again.

Layers are gathered one after the other, each when it computes; embeddings, norms outside and the
head at once, for as long as a forward or a backward pass is at work. The gradient of a parameter
is the sum over all ranks: the loss is divided by what the whole minibatch has.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from learner.packing.forward import Root

# Of gradients on their way: in bfloat16 a sum over many ranks would lose what few of them add.
_POLICY = MixedPrecisionPolicy(reduce_dtype=torch.float32)


def shard(model: Any, layers: Sequence[nn.Module], shard_ranks: int = 0) -> Root:
    """Share the weights of a model out, in place; computing with it goes through what is returned.

    All ranks have the same model. Its parameters become DTensors and keep their names. Each
    ``shard_ranks`` neighbours share one copy out, or all of them if that is 0.
    """
    root = Root(model)
    device, size = next(model.parameters()).device, dist.get_world_size()
    in_copies = 0 < shard_ranks < size
    shape = (size // shard_ranks, shard_ranks) if in_copies else (size,)
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=("copy", "shard")[-len(shape) :])
    for module in (*layers, root):
        # The root's are not kept after a forward pass either: whoever reads them finds shards.
        fully_shard(module, mesh=mesh, mp_policy=_POLICY, reshard_after_forward=True)
    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            # Gloo knows no other.
            module.set_force_sum_reduction_for_comms(True)
            # Where one rank used a part that another did not, such as an expert.
            module.set_reduce_scatter_unused_params(True)
    return root


@torch.no_grad()
def gathered(tensors: Mapping[str, Tensor], *, keep: bool) -> dict[str, Tensor]:
    """Copy tensors to CPU memory, sharded ones whole; all ranks call this for the same ones.

    One after the other: a rank that does not ``keep`` them never holds more than one, and gets
    none. What shares memory still does in the copies, so that tied weights are written once.
    """
    copies: dict[tuple[Any, ...], Tensor] = {}
    result = {}
    for name, tensor in tensors.items():
        key = _identity(tensor)
        if key not in copies:
            copies[key] = _copied(tensor) if keep else _helped(tensor)
        result[name] = copies[key]
    return result if keep else {}


def _identity(tensor: Tensor) -> tuple[Any, ...]:
    """Equal for tensors of the same memory, on all ranks alike, those without a row included."""
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local.untyped_storage()._cdata, local.storage_offset(), tensor.shape


def _copied(tensor: Tensor) -> Tensor:
    if isinstance(tensor, DTensor):
        whole: Tensor = tensor.full_tensor().detach().to("cpu")
        return whole
    return tensor.detach().to("cpu", copy=True)


def _helped(tensor: Tensor) -> Tensor:
    if isinstance(tensor, DTensor):
        tensor.full_tensor()
    return torch.empty(0)
