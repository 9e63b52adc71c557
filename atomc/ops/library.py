"""Kernels of torch's libraries that a plan may name in place of its own, where they are the faster ones.

Contract:
    A call writes into memory that it is given, and allocates nothing that a first call has not. Whether a torch build
    and a device have it is found by trying (`missing`), when an artifact is loaded; a plan always holds its own kernels
    as well.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
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


def _scaled_mm_works(device: torch.device) -> bool:
    """Whether a small product whose result is known comes out: each scale another power of two, so none may move."""
    m, n, k = 8, 256, 512
    count = partial(torch.arange, device="cpu")  # whatever device a caller makes tensors on
    powers = (count(k // 128 * m) % 5 - 2).view(k // 128, m), (count(n // 128 * k // 128) % 3).view(2, -1)
    x, w = (count(rows * k).view(rows, k) % 3 - 1.0 for rows in (m, n))
    xs, ws = (torch.exp2(power.float()) for power in powers)
    wide_x = x * xs.t().repeat_interleave(128, 1)
    wide_w = w * ws.repeat_interleave(128, 0).repeat_interleave(128, 1)
    out = torch.zeros((m, n), dtype=torch.bfloat16, device=device)
    eights = (t.to(torch.float8_e4m3fn).to(device) for t in (x, w))
    scaled_mm(next(eights), xs.to(device), next(eights), ws.to(device), out)
    return torch.equal(out.cpu(), (wide_x @ wide_w.t()).bfloat16())


@dataclass(frozen=True)
class Call:
    """A call. `rows`: of what number the rows of its first argument, some, must be a multiple. `works`: tries it."""

    run: Callable[..., None]
    rows: int
    works: Callable[[torch.device], bool]

    def fits(self, x: Tensor) -> bool:
        """Whether it takes a first argument x [..., K] of so many rows."""
        rows = x.shape[:-1].numel()
        return rows > 0 and rows % self.rows == 0


# cuBLASLt wants 16 bytes of scales for each block of columns.
CALLS: Final = {"scaled_mm": Call(scaled_mm, 4, _scaled_mm_works)}


def made(name: str, arguments: Sequence[Tensor]) -> bool:
    """Make a call, if it takes so many rows; whether it was made."""
    call = CALLS[name]
    if not call.fits(arguments[0]):
        return False
    call.run(*arguments)
    return True


def missing(name: str, device: torch.device) -> str:
    """Why a device has no such call, found by a small one whose result is known; empty: it has it."""
    try:
        return "" if CALLS[name].works(device) else "it gives wrong sums"
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:  # what a torch without it may raise
        return str(error).partition("\n")[0] or type(error).__name__
