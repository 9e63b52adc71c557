"""Kernels of torch's libraries that a plan may name in place of its own, where they are the faster ones.

Contract:
    A call writes into memory that it is given, and allocates nothing that a first call has not. Whether a torch build
    and a device have it is found by trying (`missing`), when an artifact is loaded; a plan always holds its own kernels
    as well.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor


def scaled_mm(x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor, out: Tensor) -> None:
    """out [M, N] bf16 = x [M, K] wᵀ of e4m3 codes, by cuBLASLt (spec 3.4; Hopper, CUDA 12.9 or later).

    x_scale: float32 [K / 128, M], of 128 columns of a row; w_scale: float32 [N / 128, K / 128], of squares of w [N, K].
    x and out may have more dimensions before the last.
    """
    x, out = x.view(-1, w.shape[1]), out.view(-1, w.shape[0])
    torch._scaled_mm(x, w.t(), scale_a=x_scale.t(), scale_b=w_scale.t(), out_dtype=out.dtype, out=out)


@dataclass(frozen=True)
class Call:
    """A call, and of what number the rows of its first argument must be a multiple."""

    run: Callable[..., None]
    rows: int

    def fits(self, x: Tensor) -> bool:
        """Whether it takes a first argument x [..., K] of so many rows."""
        return x.shape[:-1].numel() % self.rows == 0


# cuBLASLt wants 16 bytes of scales for each block of columns.
CALLS: Final = {"scaled_mm": Call(scaled_mm, rows=4)}


def missing(name: str, device: torch.device) -> str:
    """Why a device has no such call, found by a small one whose result is known; empty: it has it."""
    n, k = 128, 512

    def of(value: float, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.full(shape, value, device=device).to(dtype)

    try:
        m = CALLS[name].rows
        out = of(0.0, (m, n), torch.bfloat16)
        x, w = of(1.0, (m, k), torch.float8_e4m3fn), of(0.5, (n, k), torch.float8_e4m3fn)
        CALLS[name].run(x, of(2.0, (k // 128, m)), w, of(0.25, (n // 128, k // 128)), out)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        return str(error).partition("\n")[0] or type(error).__name__
    return "" if bool((out == k / 4).all()) else "it gives wrong sums"
