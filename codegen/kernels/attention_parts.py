"""What the attention kernels share, inside a kernel: how far a token sees, and what becomes of its sums (spec 2.4)."""

from __future__ import annotations

import triton
import triton.language as tl

from atomc.codegen.kernels.cache import quantized, rotated, stored_scale


@triton.jit
def reach(
    position, topk, WINDOW: tl.constexpr, RATIO: tl.constexpr, CACHED: tl.constexpr, TOPK: tl.constexpr
):  # fmt: skip
    """(first window row, how many columns of topk or compressed rows to go through, visible compressed rows)."""
    visible = (position + 1) // RATIO
    far = visible if CACHED else 0
    if TOPK > 0:  # up to the last that counts: padding may stand anywhere
        k = tl.arange(0, triton.next_power_of_2(TOPK))
        chosen = tl.load(topk + k, mask=k < TOPK, other=-1)
        far = tl.max(tl.where((chosen >= 0) & (chosen < visible), k + 1, 0), 0)
    return tl.maximum(position - (WINDOW - 1), 0), far, visible


@triton.jit
def finish(
    parts, factor, t, h, cos, sin, out, scales,
    H: tl.constexpr, D: tl.constexpr, N: tl.constexpr, PARTS: tl.constexpr, RD: tl.constexpr, KIND: tl.constexpr,
    QUANT: tl.constexpr, FLOOR: tl.constexpr, TOP: tl.constexpr, QSCALE: tl.constexpr,
):  # fmt: skip
    """Store parts [BH, N] times factor [BH], heads h of token t: rounded to KIND, turned back, rounded, quantised."""
    head = t.to(tl.int64) * H + h
    has = (h < H)[:, None]
    for j in tl.static_range(PARTS):
        c = j * N + tl.arange(0, N)
        at = head[:, None] * D + c[None, :]
        o = (parts[j] * factor[:, None]).to(KIND)
        if RD > 0 and j * N + N > D - RD:
            o = rotated(o.to(tl.float32), t, cos, sin, j * N, D, RD, True).to(KIND)
        if QUANT == 0:
            tl.store(out + at, o, mask=has & (c < D)[None, :])
        else:
            scaled, scale = quantized(o.to(tl.float32), QUANT, FLOOR, TOP, QSCALE)
            tl.store(out + at, scaled.to(out.dtype.element_ty), mask=has & (c < D)[None, :])
            g = j * N // QUANT + tl.arange(0, N // QUANT)[None, :]
            where = scales + head[:, None] * (D // QUANT) + g
            tl.store(where, stored_scale(scale, QSCALE), mask=has & (g * QUANT < D))


@triton.jit
def leave(
    parts, m, z, part, stats, at, ok, any_rows, D: tl.constexpr, N: tl.constexpr, PARTS: tl.constexpr
):  # fmt: skip
    """Store one share for `join`: heads [BH] at `at` of [T, SPLITS, H]; without rows, only that it has none."""
    tl.store(stats + 2 * at, m, mask=ok)
    tl.store(stats + 2 * at + 1, z, mask=ok)
    for j in tl.static_range(PARTS):
        c = j * N + tl.arange(0, N)[None, :]
        tl.store(part + at[:, None] * D + c, parts[j], mask=(ok & any_rows)[:, None] & (c < D))
