"""Tensors over packed weights."""

import pytest
import torch

from protocol.weights import TensorSpec, layout, total_bytes
from transfer.views import view


def pack(tensors: list[torch.Tensor], specs: list[TensorSpec]) -> torch.Tensor:
    raw = [tensor.contiguous().view(-1).view(torch.uint8) for tensor in tensors]
    packed = torch.cat(raw)
    assert len(packed) == total_bytes(specs)
    return packed


def specs_of(tensors: list[torch.Tensor]) -> list[TensorSpec]:
    return layout(
        (f"p{i}", str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
        for i, tensor in enumerate(tensors)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(3, 5), (7,), (), (0, 4), (2, 1, 3)])
def test_a_parameter_is_what_was_packed(dtype: torch.dtype, shape: tuple[int, ...]):
    generator = torch.Generator().manual_seed(1)
    tensors = [torch.randn(size, generator=generator).to(dtype) for size in ((2, 2), shape, (3,))]
    specs = specs_of(tensors)
    packed = pack(tensors, specs)
    for tensor, spec in zip(tensors, specs, strict=True):
        seen = view(packed, spec)
        assert seen.dtype == dtype
        assert seen.shape == tensor.shape
        assert torch.equal(seen, tensor)


def test_it_lies_in_the_packed_memory():
    tensors = [torch.ones(4), torch.ones(2, 3)]
    specs = specs_of(tensors)
    packed = pack(tensors, specs)
    view(packed, specs[1])[1, 2] = 5.0
    assert view(packed, specs[1])[1, 2] == 5.0
    assert packed[-4:].view(torch.float32).item() == 5.0


def test_after_an_odd_number_of_halves_a_float_is_copied():
    tensors = [torch.ones(1, dtype=torch.bfloat16), torch.tensor([1.5, -2.0])]
    specs = specs_of(tensors)
    assert specs[1].offset == 2
    packed = pack(tensors, specs)
    seen = view(packed, specs[1])
    assert torch.equal(seen, tensors[1])
    seen[0] = 9.0
    assert torch.equal(view(packed, specs[1]), tensors[1])


def test_packed_bytes_may_begin_anywhere_in_their_storage():
    tensors = [torch.tensor([1.5, -2.0])]
    specs = specs_of(tensors)
    shifted = torch.cat([torch.zeros(1, dtype=torch.uint8), pack(tensors, specs)])[1:]
    assert torch.equal(view(shifted, specs[0]), tensors[0])


def test_a_storage_may_begin_at_any_address():
    tensors = [torch.tensor([1.5, -2.0])]
    specs = specs_of(tensors)
    memory = bytearray(b"\0" + bytes(pack(tensors, specs).tolist()))
    packed = torch.frombuffer(memory, dtype=torch.uint8, offset=1)
    seen = view(packed, specs[0])
    assert seen.data_ptr() % 4 == 0
    assert torch.equal(seen, tensors[0])
