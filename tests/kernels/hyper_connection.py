"""Cases of the hyper-connections."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from atomc.codegen.device import Device
from atomc.codegen.kernels import hyper_connection as hc
from atomc.formats import FP4_ACTIVATION, FP8_ACTIVATION, FP8_CHANNEL
from tests.support.kernel_cases import Case

F32, BF16 = torch.float32, torch.bfloat16
N = 4
FNUZ = [str(FP8_ACTIVATION.fnuz())] * ("TRITON_INTERPRET" in os.environ)
# fn counts as the sum of two bf16 where the streams are bf16: 2^-17 a product, summed over thousands.
COARSE = {F32: 5e-5, BF16: 4e-3}


def streams(t: int, d: int, dtype: torch.dtype, size: float) -> Tensor:
    h = torch.randn(t, N, d) * size
    h[1::3] *= 1e-6
    return h.to(dtype)


def pre(t: int, d: int, dtype: torch.dtype, rows: int = 2 * N + N * N, size: float = 1.0) -> list[Any]:
    scales = 1 + 0.3 * torch.rand(3 if rows > N else 1)
    return [streams(t, d, dtype, size), torch.randn(rows, N * d) * (N * d) ** -0.5, torch.randn(rows), scales]


def last(t: int, d: int, dtype: torch.dtype, size: float) -> list[Any]:
    comb = torch.softmax(torch.randn(t, N, N), -1)
    return [streams(t, d, dtype, size), (torch.randn(t, d) * size).to(dtype), 2 * torch.rand(t, N), comb]


def make(op: str, t: int, d: int, dtype: torch.dtype, size: float, layout: str) -> Callable[[], list[Any]]:
    def run() -> list[Any]:
        if op == "hc_post":
            return last(t, d, dtype, size)
        weight = [torch.randn(d)] * ("norm" in op)
        if "head" in op:
            return [*pre(t, d, dtype, N, size), *weight, 1e-6, 1e-6]
        h, *mixing = pre(t, d, dtype, size=size)
        before = last(t, d, dtype, size) if "post" in op else [h]
        return [*before, *mixing, *weight, 1e-6, 1e-6, 20, *([layout] * bool(layout))]

    return run


def case(op: str, t: int, d: int, dtype: torch.dtype, size: float = 1.0, layout: str = "", **known: Any) -> Case:
    name = f"{op} {t}x{d} {dtype} {size:g} {layout}"
    layouts = [layout] if layout else []
    return Case(
        name, op, getattr(hc, op), make(op, t, d, dtype, size, layout), layouts=layouts, tolerance=COARSE, **known
    )


OPS = ["hc_pre", "hc_post", "hc_pre_norm", "hc_post_pre_norm", "hc_head", "hc_head_norm"]
QUANT = "hc_post_pre_norm_quant"
LAYOUTS = [str(FP8_ACTIVATION), str(FP8_CHANNEL), str(FP4_ACTIVATION), *FNUZ]
CASES = [
    *(case(op, t, d, dtype) for op in OPS for t, d in [(1, 256), (5, 24)] for dtype in (F32, BF16)),
    *(case(QUANT, t, d, dtype, layout=layout) for t, d in [(1, 256), (3, 160), (2, 64)] for dtype in (F32, BF16)
      for layout in LAYOUTS
      # A float32 scale follows the last bit of amax, and every value the scale: equal only where the norm is rounded.
      if dtype == BF16 or layout != str(FP8_CHANNEL)),
    *(case(QUANT, 18, 192, BF16, size, str(FP8_ACTIVATION)) for size in (0.0, 1e4, 1e-6)),
    case(QUANT, 70, 136, BF16, layout=str(FP8_ACTIVATION), tokens=8192),
    case("hc_head_norm", 65, 136, BF16, tokens=256),
    *(case(QUANT, t, d, BF16, layout=str(FP8_ACTIVATION), tokens=t, slow=True)
      for t, d in [(1, 4096), (16, 7168), (64, 4096), (700, 7168), (2048, 4096)]),
    *(case("hc_head_norm", t, 7168, dtype, tokens=t, slow=True) for t in (1, 64) for dtype in (F32, BF16)),
]  # fmt: skip


def meta(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _hyper(device: Device) -> None:
    t, layout = device.tokens, str(FP8_ACTIVATION.fnuz() if device.target.fp8 == "fnuz" else FP8_ACTIVATION)
    for d in (4096, 7168):
        h, y, post, comb = meta(t, N, d), meta(t, d), meta(t, N, dtype=F32), meta(t, N, N, dtype=F32)
        weight = meta(d, dtype=F32)
        mixing = meta(24, N * d, dtype=F32), meta(24, dtype=F32), meta(3, dtype=F32)
        head = meta(4, N * d, dtype=F32), meta(4, dtype=F32), meta(1, dtype=F32)
        hc.hc_post(device, h, y, post, comb)
        hc.hc_pre(device, h, *mixing, 1e-6, 1e-6, 20)
        hc.hc_post_pre_norm(device, h, y, post, comb, *mixing, weight, 1e-6, 1e-6, 20)
        hc.hc_post_pre_norm_quant(device, h, y, post, comb, *mixing, weight, 1e-6, 1e-6, 20, layout)
        hc.hc_head_norm(device, h, *head, weight, 1e-6, 1e-6)


AOT = [(f"hyper-connections {tokens}", _hyper) for tokens in (1, 16, 64, 8192)]
