"""Clamped SwiGLU, alone or quantised for the product that follows (spec 2.8)."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from atomc.codegen.device import Device, cdiv, power_of_two
from atomc.codegen.kernels.quantize import empty_pair, layout_constants, quantize_row
from atomc.formats import Layout


@triton.jit
def swiglu_of(gate, up, LIMIT: tl.constexpr):
    """silu(min(gate, LIMIT)) clamp(up) in fp32; NaN stays."""
    gate = tl.minimum(gate, LIMIT, propagate_nan=tl.PropagateNan.ALL)
    up = tl.clamp(up, -LIMIT, LIMIT, propagate_nan=tl.PropagateNan.ALL)
    return gate / (1.0 + tl.exp(-gate)) * up


@triton.jit
def swiglu_rows(
    gate, up, out, scales, GATE: tl.constexpr, UP: tl.constexpr, INNER: tl.constexpr, LIMIT: tl.constexpr,
    BLOCK: tl.constexpr, QUANT: tl.constexpr, CODES: tl.constexpr, SCALES: tl.constexpr, GROUP: tl.constexpr,
    ELEMENT: tl.constexpr, FLOOR: tl.constexpr, TOP: tl.constexpr, SCALE: tl.constexpr,
):  # fmt: skip
    """BLOCK columns of a row of gate and up, rows GATE and UP apart -> out [.., I], or codes and scales (spec 2.8)."""
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * BLOCK
    column = first + tl.arange(0, BLOCK)
    a = tl.load(gate + row * GATE + column, mask=column < INNER, other=0.0).to(tl.float32)
    b = tl.load(up + row * UP + column, mask=column < INNER, other=0.0).to(tl.float32)
    y = swiglu_of(a, b, LIMIT).to(gate.dtype.element_ty)
    if QUANT:
        y, codes = y.to(tl.float32), out + row * CODES
        quantize_row(codes, scales + row * SCALES, y, first, INNER, BLOCK, GROUP, ELEMENT, FLOOR, TOP, SCALE)
    else:
        tl.store(out + row * INNER + column, y, mask=column < INNER)


def threads(device: Device, block: int) -> int:
    """Warps for rows in blocks: eight columns, 16 bytes of bf16, a lane."""
    return max(min(block // (8 * device.target.wavefront), 8), 1)


def _swiglu(device: Device, gate: Tensor, up: Tensor, limit: float, layout: str) -> tuple[Tensor, Tensor | None]:
    """Rows may be slices of a merged product: their distance is a constant, and so known to be a multiple of 16."""
    i = gate.shape[-1]
    m = gate.numel() // i
    if layout:
        out, scales = empty_pair(device, tuple(gate.shape), layout)
        whole = Layout.parse(layout).columns == 0
        block = power_of_two(i) if whole else max(min(power_of_two(i), 512), Layout.parse(layout).columns)
        known = layout_constants(layout, block) | {"CODES": out.shape[-1], "SCALES": scales.shape[-1]}
    else:
        out, scales, block = device.empty(gate.shape, gate.dtype), None, min(power_of_two(i), 1024)
        known = {"CODES": 0, "SCALES": 0, "GROUP": 1, "ELEMENT": "", "FLOOR": 0.0, "TOP": 1.0, "SCALE": ""}
    args = {"gate": gate, "up": up, "out": out, "scales": scales}
    constants = {
        "GATE": _distance(gate), "UP": _distance(up), "INNER": i, "LIMIT": limit, "BLOCK": block,
        "QUANT": bool(layout), **known,
    }  # fmt: skip
    device.launch(swiglu_rows, (m, cdiv(i, block)), args, constants, warps=threads(device, block))
    return out, scales


def _distance(x: Tensor) -> int:
    """Elements from a row of x [..., I] to the next."""
    return x.stride(-2) if x.dim() > 1 else 0


def swiglu(device: Device, gate: Tensor, up: Tensor, limit: float) -> Tensor:
    """See `atomc.ops.activation.swiglu`."""
    return _swiglu(device, gate, up, limit, "")[0]


def swiglu_quant(device: Device, gate: Tensor, up: Tensor, limit: float, layout: str) -> tuple[Tensor, Tensor]:
    """See `atomc.ops.scaled.swiglu_quant`."""
    codes, scales = _swiglu(device, gate, up, limit, layout)
    assert scales is not None
    return codes, scales
