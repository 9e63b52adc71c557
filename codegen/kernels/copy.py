"""Copies that make a tensor contiguous: what a reshape needs where no view will do, as after a batched product.

Terms:
    before   dims whose stride is above that of the first dim, M: a multiple of M, so of a size that only a step knows.
             All other strides are known.
Illegal: more than four dims; sizes other than the first that are not known.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from atomc.codegen.device import Device, cdiv, power_of_two

DIMS = 4
TILE = 4096  # elements of a program, at most


@triton.jit
def copy(
    x, out, M, B: tl.constexpr, C: tl.constexpr, D: tl.constexpr, SA: tl.constexpr, SB: tl.constexpr, SC: tl.constexpr,
    SD: tl.constexpr, BEFORE_B: tl.constexpr, BEFORE_C: tl.constexpr, BEFORE_D: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """x [M, B, C, D] with strides SA .. SD, those that come before M times it, -> out, contiguous."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = (row < tl.cast(M, tl.int64) * (B * C)) & (column < D)
    at = row // (B * C) * SA + row // C % B * (SB * (M if BEFORE_B else 1))
    at += row % C * (SC * (M if BEFORE_C else 1)) + column.to(tl.int64) * (SD * (M if BEFORE_D else 1))
    tl.store(out + row * D + column, tl.load(x + at, mask=inside, other=0), mask=inside)


def _strides(x: Tensor) -> tuple[list[int], list[bool]]:
    """Of dims 1 ..: the stride, divided by the first size where the dim comes before; and whether it does."""
    known, before = [], []
    for size, stride in zip(x.shape[1:], x.stride()[1:], strict=True):
        first = size > 1 and x.stride(0) > 0 and stride > x.stride(0)
        factor = 0 if size == 1 else stride // x.shape[0] if first else stride
        if first and factor * x.shape[0] != stride:
            raise ValueError(
                f"strides {tuple(x.stride())} of shape {tuple(x.shape)} are no multiples of the first size"
            )
        known.append(int(factor))
        before.append(bool(first))
    return known, before


def contiguous(device: Device, x: Tensor) -> Tensor:
    """`Tensor.contiguous` of x [M, ..] with at most four dims: a copy.

    Raises:
        ValueError: more dims, or strides that no kernel here follows; see the module.
    """
    if not 1 <= x.dim() <= DIMS:
        raise ValueError(f"a copy of {x.dim()} dims; a kernel copies 1 to {DIMS}")
    out = device.empty(tuple(x.shape), x.dtype)
    strides, before = _strides(x)
    gap = DIMS - x.dim()  # dims of size 1 behind the first
    b, c, d = [1] * gap + [int(n) for n in x.shape[1:]]
    sb, sc, sd = [0] * gap + strides
    block = min(power_of_two(d), TILE)
    # A thread has 16 bytes, where there are as many.
    rows = max(min(TILE, 16 // x.dtype.itemsize * 4 * device.target.wavefront) // block, 1)
    constants = {
        "B": b, "C": c, "D": d, "SA": int(x.stride(0)), "SB": sb, "SC": sc, "SD": sd,
        **dict(zip(("BEFORE_B", "BEFORE_C", "BEFORE_D"), [False] * gap + before, strict=True)),
        "ROWS": rows, "BLOCK": block,
    }  # fmt: skip
    grid = (cdiv(x.shape[0] * (b * c), rows), cdiv(d, block))
    device.launch(copy, grid, {"x": x, "out": out, "M": x.shape[0]}, constants)
    return out


def clone(device: Device, x: Tensor) -> Tensor:
    """`Tensor.clone` of a contiguous tensor, see `contiguous`."""
    return contiguous(device, x)


def reshape(device: Device, x: Tensor, shape: Sequence[int]) -> Tensor:
    """`Tensor.reshape` where no view will do, see `contiguous`."""
    return contiguous(device, x).view(*shape)
