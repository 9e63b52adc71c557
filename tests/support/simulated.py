"""DeepSeek-V4 with everything dequantised and its roundings simulated: what a `native` artifact must equal (spec 3.4).

The eager modules hold dense float32 weights; hooks and a dispatch mode round what enters each quantised product and
each cache. The rounding is written here once more, from the specification, in float64 and on lists of representable
numbers: nothing of `atomc.formats` takes part.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from atomc.models.deepseek_v4.model import DeepseekV4

E4M3 = sorted(
    {s * m * 2.0**e for s in (-1, 1) for e in range(-9, 5) for m in range(16) if m >= 8 or e == -9}
    | {s * m * 2.0**5 for s in (-1, 1) for m in range(8, 15)}
)  # fmt: skip
E2M1 = [-6.0, -4.0, -3.0, -2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
LINEARS = ("wq_a", "wkv", "wq_b", "wo_b", "w1", "w2", "w3")
atom = torch.ops.atom


def nearest(x: Tensor, values: Sequence[float]) -> Tensor:
    """The nearest of sorted representable numbers; of two equally near, the one whose index from 0 is even."""
    grid = torch.tensor(values, dtype=torch.float64)
    zero = values.index(0.0)
    upper = torch.searchsorted(grid, x.contiguous()).clamp(1, len(values) - 1)
    low, high = grid[upper - 1], grid[upper]
    even_low = (upper - 1 - zero).abs() % 2 == 0
    take_low = (x - low < high - x) | ((x - low == high - x) & even_low)
    return torch.where(x <= grid[0], grid[0], torch.where(x >= grid[-1], grid[-1], torch.where(take_low, low, high)))


def simulate(x: Tensor, group: int, values: Sequence[float], floor: float) -> Tensor:
    """x rounded in groups along its last dim (the last may be short), scale `2^ceil(log2(amax / largest))`."""
    parts = []
    for part in x.double().split(group, dim=-1):
        amax = part.abs().amax(-1, keepdim=True).clamp(min=floor)
        mantissa, exponent = torch.frexp(amax / values[-1])
        scale = torch.where(mantissa == 0.5, exponent - 1, exponent).double().exp2()
        parts.append(nearest(part / scale, values) * scale)
    return torch.cat(parts, dim=-1).to(x.dtype)


def fp8(x: Tensor, group: int = 128) -> Tensor:
    return simulate(x, group, E4M3, 1e-4)


def fp4(x: Tensor) -> Tensor:
    return simulate(x, 32, E2M1, 6 * 2.0**-126)


def row(x: Tensor, rope: int) -> Tensor:
    """A window or main compressed row: the NoPE channels in FP8 by 64, the RoPE channels in bfloat16."""
    return torch.cat((fp8(x[..., :-rope], 64), x[..., -rope:].bfloat16().to(x.dtype)), dim=-1)


def rotated(x: Tensor) -> Tensor:
    """The orthonormal Hadamard transform over the last dim: entry (i, j) is (-1)^popcount(i & j) / sqrt(n)."""
    n = x.shape[-1]
    signs = [[(-1.0) ** bin(i & j).count("1") for j in range(n)] for i in range(n)]
    return (x.float() @ (torch.tensor(signs) * n**-0.5)).to(x.dtype)


class _Rounding(TorchDispatchMode):
    """Rounds what enters caches, index scores, experts and wo_a."""

    def __init__(self, model: DeepseekV4) -> None:
        super().__init__()
        config = model.config
        self.rope, self.index_dim, self.head_dim = config.qk_rope_head_dim, config.index_head_dim, config.head_dim
        self.wo_a = {layer.attn.wo_a.weight.untyped_storage().data_ptr() for layer in model.layers}  # type: ignore[union-attr]

    def _is_wo_a(self, func: Any, args: Sequence[Any]) -> bool:
        return func is torch.ops.aten.bmm.default and args[1].untyped_storage().data_ptr() in self.wo_a

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = list(args)
        if func is atom.cache_insert.default:
            given[1] = row(given[1], self.rope)
        elif func is atom.compressed_insert.default:
            index = given[0].shape[-1] == self.index_dim != self.head_dim
            given[1] = fp4(rotated(given[1])) if index else row(given[1], self.rope)
        elif func is atom.index_topk.default:
            given[0] = fp4(rotated(given[0]))
        elif func is atom.grouped_linear.default or self._is_wo_a(func, given):
            given[0] = fp8(given[0])
        return func(*given, **(kwargs or {}))


@contextmanager
def roundings(model: DeepseekV4) -> Iterator[None]:
    """Inside, the eager model rounds as the reference inference does."""
    named = [(n, m) for n, m in model.named_modules() if n.rpartition(".")[2] in LINEARS and "compressor" not in n]
    handles = [m.register_forward_pre_hook(lambda _, args: (fp8(args[0]),)) for _, m in named]
    try:
        with _Rounding(model):
            yield
    finally:
        for handle in handles:
            handle.remove()


assert math.isclose(E4M3[-1], 448.0) and len(E4M3) == 253
