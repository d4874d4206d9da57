"""Variable-length flash attention for GPUs: the packages that have it, behind one signature.

Shapes: q [tokens, heads, D], k and v [keys, heads of keys, D]; causal masks stand at the lower
right of each sequence, so that the queries are its last tokens.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

from torch import Tensor

from learner.packing.layout import Varlen

_Attend = Callable[[Tensor, Tensor, Tensor, Varlen, float, int | None, float | None], Tensor]
"""Of q, k, v, their sequences, the scale, the window and the cap of the scores."""


@dataclass(frozen=True, slots=True)
class Kernel:
    """A function of some package, and what it can do."""

    name: str
    attend: _Attend
    can_cap: bool
    """Whether it takes a softcap."""
    can_window: bool = True
    """Whether it takes a window."""


@cache
def best_kernel() -> Kernel | None:
    """The first of those installed: flash-attn 4, flash-attn 2, torch's own; None without any."""
    for make in KERNELS.values():
        try:
            return make()
        except (ImportError, AttributeError):
            continue
    return None


def flash_attn_4() -> Kernel:
    """The package flash-attn-4; raises ImportError."""
    function: Any = import_module("flash_attn.cute").flash_attn_varlen_func
    known = inspect.signature(function).parameters

    def attend(
        q: Tensor, k: Tensor, v: Tensor, varlen: Varlen, scale: float, *limits: Any
    ) -> Tensor:
        window, softcap = limits
        sizes = {"max_seqlen_q": varlen.longest_query, "max_seqlen_k": varlen.longest_key}
        result = function(
            *(q, k, v),
            cu_seqlens_q=varlen.query_offsets,
            cu_seqlens_k=varlen.key_offsets,
            **{name: size for name, size in sizes.items() if name in known},
            softmax_scale=scale,
            causal=True,
            window_size=(None, None) if window is None else (window - 1, 0),
            softcap=softcap or 0.0,
        )
        out: Tensor = result[0] if isinstance(result, tuple) else result
        return out

    return Kernel("flash-attn 4", attend, can_cap=True)


def flash_attn_2() -> Kernel:
    """The package flash-attn; raises ImportError."""
    function: Any = import_module("flash_attn").flash_attn_varlen_func

    def attend(
        q: Tensor, k: Tensor, v: Tensor, varlen: Varlen, scale: float, *limits: Any
    ) -> Tensor:
        window, softcap = limits
        out: Tensor = function(
            *(q, k, v, varlen.query_offsets, varlen.key_offsets),
            *(varlen.longest_query, varlen.longest_key),
            softmax_scale=scale,
            causal=True,
            window_size=(-1, -1) if window is None else (window - 1, 0),
            softcap=softcap or 0.0,
        )
        return out

    return Kernel("flash-attn 2", attend, can_cap=True)


def torch_varlen() -> Kernel:
    """Torch's own; raises ImportError."""
    function: Any = import_module("torch.nn.attention.varlen").varlen_attn
    known = inspect.signature(function).parameters
    # The graphics driver may tie a machine to an older torch, whose function could do less.
    can_window, can_group = "window_size" in known, "enable_gqa" in known

    def attend(
        q: Tensor, k: Tensor, v: Tensor, varlen: Varlen, scale: float, *limits: Any
    ) -> Tensor:
        window, _ = limits
        options: dict[str, Any] = {"enable_gqa": True} if can_group else {}
        if can_window:
            options["window_size"] = (-1 if window is None else window - 1, 0)
        else:
            options["is_causal"] = True
        if not can_group:
            groups = q.shape[1] // k.shape[1]
            k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        out: Tensor = function(
            *(q, k, v, varlen.query_offsets, varlen.key_offsets),
            *(varlen.longest_query, varlen.longest_key),
            scale=scale,
            **options,
        )
        return out

    return Kernel("torch varlen_attn", attend, can_cap=False, can_window=can_window)


KERNELS: dict[str, Callable[[], Kernel]] = {
    "flash-attn 4": flash_attn_4,
    "flash-attn 2": flash_attn_2,
    "torch varlen_attn": torch_varlen,
}
"""Every kernel, the fastest first; each raises ImportError where it is not installed."""
