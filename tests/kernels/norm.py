"""Cases of the norms, of rounding to a layout, of RoPE and of the Hadamard rotation."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from atomc.codegen.device import Device
from atomc.codegen.kernels import norm, quantize
from atomc.formats import FP4_ACTIVATION, FP8_ACTIVATION, FP8_CHANNEL
from tests.support.kernel_cases import Case

F32, BF16 = torch.float32, torch.bfloat16
DTYPES = (F32, BF16)
FNUZ = str(FP8_ACTIVATION.fnuz())
# Triton compiles the FNUZ dialect for AMD only; the interpreter knows both.
LAYOUTS = [str(FP8_ACTIVATION), str(FP8_CHANNEL), str(FP4_ACTIVATION)] + [FNUZ] * ("TRITON_INTERPRET" in os.environ)


def rows(m: int, d: int, dtype: torch.dtype, size: float = 1.0) -> Tensor:
    """Random rows, some of them zeros, huge or tiny."""
    x = torch.randn(m, d) * size
    x[3::7], x[1::5], x[2::5] = 0, x[1::5] * 1e4, x[2::5] * 1e-6
    return x.to(dtype)


def broken(x: Tensor) -> Tensor:
    """With inf and NaN in some blocks: they must come out as NaN, and their neighbours unharmed."""
    x[0, 3], x[2, 200], x[4, 40] = torch.inf, torch.nan, -torch.inf
    return x


def rms_norm(m: int, d: int, dtype: torch.dtype, weighted: bool) -> Callable[[], list[Any]]:
    return lambda: [rows(m, d, dtype), torch.randn(d) if weighted else None, 1e-6]


def pair(m: int, qr: int, dh: int, dtype: torch.dtype, layout: str = "") -> Callable[[], list[Any]]:
    def make() -> list[Any]:
        return [
            rows(m, qr, dtype),
            torch.randn(qr),
            rows(m, dh, dtype),
            torch.randn(dh),
            1e-6,
            *([layout] * bool(layout)),
        ]

    return make


def merged(host: Callable[..., Any]) -> Callable[..., Any]:
    """The host function given q and kv as columns of one product, as a plan with a merged projection does."""

    def run(device: Device, q: Tensor, q_weight: Tensor, kv: Tensor, *rest: Any) -> Any:
        both = torch.cat((q, kv), dim=1)
        return host(device, both[:, : q.shape[1]], q_weight, both[:, q.shape[1] :], *rest)

    return run


def rope(shape: tuple[int, ...], lead: tuple[int, ...], rd: int, dtype: torch.dtype, inverse: bool) -> Any:
    def make() -> list[Any]:
        theta = torch.rand(*lead, rd // 2) * 6
        return [torch.randn(*shape).to(dtype), theta.cos(), theta.sin(), inverse]

    return make


CASES = [
    *(Case(f"rms_norm {m}x{d} {dtype} {w}", "rms_norm", norm.rms_norm, rms_norm(m, d, dtype, w))
      for m, d, w in [(1, 4096, True), (5, 100, True), (9, 512, False), (3, 7168, True)] for dtype in DTYPES),
    *(Case(f"pair {m}x{qr}+{dh} {dtype}", "rms_norm_pair", merged(norm.rms_norm_pair), pair(m, qr, dh, dtype))
      for m, qr, dh in [(1, 1024, 512), (6, 24, 20)] for dtype in DTYPES),
    *(Case(f"pair quant {m}x{qr} {dtype} {layout}", "rms_norm_pair_quant", merged(norm.rms_norm_pair_quant),
           pair(m, qr, dh, dtype, layout), layouts=[layout])
      for m, qr, dh in [(1, 1024, 512), (8, 1536, 512), (6, 224, 20), (2, 40, 20)]
      for dtype in DTYPES for layout in LAYOUTS
      # A float32 scale follows the last bit of amax, and every value the scale: equal only where the norm is rounded.
      if dtype == BF16 or layout != str(FP8_CHANNEL)),
    *(Case(f"quantize {m}x{k} {dtype} {layout}", "quantize", quantize.quantize,
           lambda m=m, k=k, dtype=dtype, layout=layout: [rows(m, k, dtype), layout], layouts=[layout])
      for m, k in [(1, 4096), (8, 200), (9, 64)] for dtype in DTYPES for layout in [*LAYOUTS, "int8:1x*:float32"]),
    *(Case(f"quantize inf and NaN {layout}", "quantize", quantize.quantize,
           lambda layout=layout: [broken(rows(9, 256, F32)), layout], layouts=[layout]) for layout in LAYOUTS),
    Case("quantize wide", "quantize", quantize.quantize, lambda: [rows(2, 21504, BF16), str(FP8_CHANNEL)],
         layouts=[str(FP8_CHANNEL)]),
    *(Case(f"rope {shape} {lead} {rd} {dtype} {inverse}", "rope", norm.rope, rope(shape, lead, rd, dtype, inverse))
      for shape, lead, rd in [((1, 512), (1,), 64), ((3, 5, 20), (3, 1), 8), ((2, 3, 4, 24), (2, 1, 4), 24),
                              ((70, 128), (70,), 64)]
      for dtype in DTYPES for inverse in (False, True)),
    *(Case(f"hadamard {shape} {dtype}", "hadamard", quantize.hadamard,
           lambda shape=shape, dtype=dtype: [torch.randn(*shape).to(dtype)])
      for shape in [(1, 128), (5, 4, 128), (3, 16), (2, 9, 256)] for dtype in DTYPES),
    Case("hadamard large", "hadamard", quantize.hadamard, lambda: [rows(150, 128, BF16)], tokens=64),
]  # fmt: skip


def meta(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _norms(device: Device) -> None:
    t, layout = device.tokens, str(FP8_ACTIVATION.fnuz() if device.target.fp8 == "fnuz" else FP8_ACTIVATION)
    for d, qr, heads, groups in [(4096, 1024, 64, 8), (7168, 1536, 128, 16)]:
        norm.rms_norm(device, meta(t, d), meta(d, dtype=F32), 1e-6)
        norm.rms_norm(device, meta(t, heads, 512), None, 1e-6)
        both = meta(t, qr + 512)
        q, kv = both[:, :qr], both[:, qr:]
        weights = meta(qr, dtype=F32), meta(512, dtype=F32)
        norm.rms_norm_pair(device, q, weights[0], kv, weights[1], 1e-6)
        norm.rms_norm_pair_quant(device, q, weights[0], kv, weights[1], 1e-6, layout)
        for shape in [(t, d), (t, groups, 4096), (t, groups * 1024), (t, 3 * d)]:
            quantize.quantize(device, meta(*shape), layout)
            quantize.quantize(
                device, meta(*shape), layout.split(":")[0] + ":1x*:float32" + ":max224" * ("fnuz" in layout)
            )
            quantize.quantize(device, meta(*shape), str(FP4_ACTIVATION))
        cos = meta(t, 1, 32, dtype=F32)
        norm.rope(device, meta(t, heads, 512), cos, cos, True)
    quantize.hadamard(device, meta(t, 64, 128))


AOT = [(f"norms {tokens}", _norms) for tokens in (1, 16, 64, 8192)]
