"""RMS normalisation and RoPE: one row, the q/kv pair of attention with q rounded for its products (spec 2.0, 2.2, 2.3).

q and kv may be columns of one merged product: their rows have strides.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from atomc.codegen.device import Device, cdiv, power_of_two
from atomc.codegen.kernels.quantize import empty_pair, layout_constants, quantize_row


@triton.jit
def normed(x, weight, eps, D: tl.constexpr, BLOCK: tl.constexpr):
    """x [R, BLOCK] fp32, zero from column D on, times rsqrt(mean x² + eps) and the weight [D] (None: no weight)."""
    y = x * tl.rsqrt(tl.sum(x * x, 1) / D + eps)[:, None]
    if weight is not None:
        column = tl.arange(0, BLOCK)
        y *= tl.load(weight + column, mask=column < D, other=0.0).to(tl.float32)[None, :]
    return y


@triton.jit
def norm_rows(
    x, weight, out, eps, M, D: tl.constexpr, STRIDE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    WEIGHT: tl.constexpr,
):  # fmt: skip
    """ROWS rows of x [M, D] (spec 2.0)."""
    m = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    keep = (m[:, None] < M) & (column[None, :] < D)
    values = tl.load(x + m[:, None] * STRIDE + column[None, :], mask=keep, other=0.0).to(tl.float32)
    y = normed(values, weight if WEIGHT else None, eps, D, BLOCK)
    tl.store(out + m[:, None] * D + column[None, :], y.to(out.dtype.element_ty), mask=keep)


def rms_norm(device: Device, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """See `atomc.ops.norm.rms_norm`: x [..., D], contiguous or rows [T, D] with a stride."""
    d = x.shape[-1]
    rows, block = x.numel() // d, power_of_two(d)
    per = max(4096 // block, 1)
    out = device.empty(x.shape, x.dtype)
    args = {"x": x, "weight": weight, "out": out, "eps": eps, "M": rows}
    constants = {"D": d, "STRIDE": _stride(x), "ROWS": per, "BLOCK": block, "WEIGHT": weight is not None}
    device.launch(norm_rows, (cdiv(rows, per),), args, constants, warps=_warps(per * block))
    return out


def _stride(x: Tensor) -> int:
    """Elements from one row to the next."""
    return x.stride(0) if x.dim() == 2 else x.shape[-1]


def _warps(elements: int) -> int:
    return min(max(elements // 512, 1), 8)


# -- the pair ----------------------------------------------------------------------------------------------------------


@triton.jit
def _normed_row(x, weight, eps, D: tl.constexpr, BLOCK: tl.constexpr):
    """The normed row [BLOCK] that x points to, in fp32 but rounded to x's dtype."""
    column = tl.arange(0, BLOCK)
    values = tl.load(x + column, mask=column < D, other=0.0).to(tl.float32)
    y = values * tl.rsqrt(tl.sum(values * values, 0) / D + eps)
    y *= tl.load(weight + column, mask=column < D, other=0.0).to(tl.float32)
    return y.to(x.dtype.element_ty)


@triton.jit
def norm_pair(
    q, q_weight, kv, kv_weight, q_out, q_scales, kv_out, eps,
    QD: tl.constexpr, Q_STRIDE: tl.constexpr, Q_BLOCK: tl.constexpr, KD: tl.constexpr, K_STRIDE: tl.constexpr,
    K_BLOCK: tl.constexpr, CODES: tl.constexpr, SCALES: tl.constexpr, GROUP: tl.constexpr, ELEMENT: tl.constexpr,
    FLOOR: tl.constexpr, TOP: tl.constexpr, SCALE: tl.constexpr,
):  # fmt: skip
    """Program (t, 0) norms q[t] and rounds it (SCALES > 0) or stores it, program (t, 1) norms kv[t] (spec 6.1 K8)."""
    t = tl.program_id(0).to(tl.int64)
    if tl.program_id(1) == 0:
        y = _normed_row(q + t * Q_STRIDE, q_weight, eps, QD, Q_BLOCK)
        if SCALES > 0:
            quantize_row(
                q_out + t * CODES, q_scales + t * SCALES, y.to(tl.float32), 0, QD, Q_BLOCK, GROUP, ELEMENT, FLOOR,
                TOP, SCALE,
            )  # fmt: skip
        else:
            tl.store(q_out + t * QD + tl.arange(0, Q_BLOCK), y, mask=tl.arange(0, Q_BLOCK) < QD)
    else:
        z = _normed_row(kv + t * K_STRIDE, kv_weight, eps, KD, K_BLOCK)
        tl.store(kv_out + t * KD + tl.arange(0, K_BLOCK), z, mask=tl.arange(0, K_BLOCK) < KD)


def _pair(
    device: Device, q: Tensor, q_weight: Tensor, kv: Tensor, kv_weight: Tensor, eps: float, q_out: Tensor,
    q_scales: Tensor | None, layout: dict[str, Any],
) -> Tensor:  # fmt: skip
    kv_out = device.empty(kv.shape, kv.dtype)
    qd, kd = q.shape[1], kv.shape[1]
    args = {
        "q": q, "q_weight": q_weight, "kv": kv, "kv_weight": kv_weight, "q_out": q_out, "q_scales": q_scales,
        "kv_out": kv_out, "eps": eps,
    }  # fmt: skip
    constants = {
        "QD": qd, "Q_STRIDE": q.stride(0), "Q_BLOCK": power_of_two(qd), "KD": kd, "K_STRIDE": kv.stride(0),
        "K_BLOCK": power_of_two(kd), "CODES": q_out.shape[1],
        "SCALES": 0 if q_scales is None else q_scales.shape[1], **layout,
    }  # fmt: skip
    device.launch(norm_pair, (q.shape[0], 2), args, constants, warps=_warps(power_of_two(qd)))
    return kv_out


def rms_norm_pair(
    device: Device, q: Tensor, q_weight: Tensor, kv: Tensor, kv_weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """See `atomc.ops.norm.rms_norm_pair`: q [T, qr], kv [T, dh], rows with strides."""
    q_out = device.empty(q.shape, q.dtype)
    none = {"GROUP": 1, "ELEMENT": "", "FLOOR": 0.0, "TOP": 0.0, "SCALE": ""}
    return q_out, _pair(device, q, q_weight, kv, kv_weight, eps, q_out, None, none)


def rms_norm_pair_quant(
    device: Device, q: Tensor, q_weight: Tensor, kv: Tensor, kv_weight: Tensor, eps: float, layout: str
) -> tuple[Tensor, Tensor, Tensor]:
    """See `atomc.ops.norm.rms_norm_pair_quant`."""
    codes, scales = empty_pair(device, tuple(q.shape), layout)
    known = layout_constants(layout, power_of_two(q.shape[1]))
    return codes, scales, _pair(device, q, q_weight, kv, kv_weight, eps, codes, scales, known)


# -- RoPE --------------------------------------------------------------------------------------------------------------


@triton.jit
def turned(pe, cos, sin, ROWS: tl.constexpr, PAIRS: tl.constexpr, INVERSE: tl.constexpr):
    """pe [ROWS, 2 PAIRS] fp32, interleaved pairs, rotated by angles with cos, sin [ROWS or 1, PAIRS] (spec 2.2)."""
    even, odd = tl.split(tl.reshape(pe, (ROWS, PAIRS, 2)))
    if INVERSE:
        sin = -sin
    return tl.reshape(tl.join(even * cos - odd * sin, odd * cos + even * sin), (ROWS, 2 * PAIRS))


@triton.jit
def rope_rows(
    x, cos, sin, out, M, N1, N2, S0, S1, S2,
    D: tl.constexpr, PAIRS: tl.constexpr, ROWS: tl.constexpr, NOPE_BLOCK: tl.constexpr, PAIR_BLOCK: tl.constexpr,
    INVERSE: tl.constexpr,
):  # fmt: skip
    """ROWS rows of x [M, D], M = N0 x N1 x N2; row (i, j, k) turns by the angles of row i S0 + j S1 + k S2."""
    m = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    angle = (m // (N1 * N2)) * S0 + ((m // N2) % N1) * S1 + (m % N2) * S2
    keep = (m < M)[:, None]
    start = m.to(tl.int64)[:, None] * D
    column = tl.arange(0, NOPE_BLOCK)[None, :]
    nope = keep & (column < D - 2 * PAIRS)
    tl.store(out + start + column, tl.load(x + start + column, mask=nope), mask=nope)
    pair = tl.arange(0, PAIR_BLOCK)[None, :]
    turn = keep & (pair < PAIRS)
    c = tl.load(cos + angle[:, None] * PAIRS + pair, mask=turn, other=1.0)
    s = tl.load(sin + angle[:, None] * PAIRS + pair, mask=turn, other=0.0)
    channel = tl.arange(0, 2 * PAIR_BLOCK)[None, :]
    at, held = start + D - 2 * PAIRS + channel, keep & (channel < 2 * PAIRS)
    pe = turned(tl.load(x + at, mask=held, other=0.0).to(tl.float32), c, s, ROWS, PAIR_BLOCK, INVERSE)
    tl.store(out + at, pe.to(out.dtype.element_ty), mask=held)


def rope(device: Device, x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    """See `atomc.ops.rope.rope`: x [..., d] of up to three leading dims, cos and sin broadcastable to [..., rd/2]."""
    if x.dim() > 4:
        raise ValueError(f"RoPE of {x.dim() - 1} leading dims; a kernel takes three")
    d, pairs = x.shape[-1], cos.shape[-1]
    lead = (1,) * (4 - x.dim()) + tuple(x.shape[:-1])
    a, b, c = (1,) * (4 - cos.dim()) + tuple(cos.shape[:-1])
    strides = (b * c if a > 1 else 0, c if b > 1 else 0, 1 if c > 1 else 0)
    rows = x.numel() // d
    per = 1 if device.tokens <= 16 else 8
    out = device.empty(x.shape, x.dtype)
    args = {
        "x": x, "cos": cos, "sin": sin, "out": out, "M": rows, "N1": lead[1], "N2": lead[2], "S0": strides[0],
        "S1": strides[1], "S2": strides[2],
    }  # fmt: skip
    constants = {
        "D": d, "PAIRS": pairs, "ROWS": per, "NOPE_BLOCK": power_of_two(max(d - 2 * pairs, 1)),
        "PAIR_BLOCK": power_of_two(pairs), "INVERSE": inverse,
    }  # fmt: skip
    device.launch(rope_rows, (cdiv(rows, per),), args, constants, warps=1 if per == 1 else 4)
    return out
