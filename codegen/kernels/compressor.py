"""The compressors: pool completed windows into cache rows, and keep the last tokens in the ring (spec 2.5, 2.6, 4.2).

One program makes one row, from the projections to the bytes in the page: an online softmax over the window's tokens for
each channel, norm, RoPE, Hadamard where index rows are quantised, rounding, store. Windows of many tokens are pooled by
programs of some channels each before: one program would read them too slowly. kv and gate may be columns of one merged
product: their rows have a stride.
"""

from __future__ import annotations

from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from atomc.codegen.device import Device, cdiv, power_of_two
from atomc.codegen.kernels.common import TL
from atomc.codegen.kernels.quantize import hadamard_vector, layout_constants, quantize_row
from atomc.formats import RowLayout


def row_constants(cache: Tensor, rows: str, d: int) -> dict[str, Any]:
    """Where a row of d channels lies in the pages of a cache, in bytes, and how it is rounded."""
    block = power_of_two(d)
    if not rows:
        none = {"GROUP": 1, "ELEMENT": "", "FLOOR": 0.0, "TOP": 0.0, "SCALE": "", "NARROW": 0, "CODE_BYTES": 0}
        return {"PAGE": cache.shape[1], "PAGE_BYTES": 0, "BODY": 0, "SCALE_BYTES": 0, "SCALES": 0, **none}
    layout = RowLayout.parse(rows)
    if layout.narrow + layout.wide != d:
        raise ValueError(f"rows of {d} channels in row layout {rows}")
    known = layout_constants(str(layout.layout), block) if layout.layout else row_constants(cache, "", d)
    return {
        **known, "PAGE": layout.rows_of(cache.shape[1]), "PAGE_BYTES": cache.shape[1], "BODY": layout.body_bytes,
        "SCALE_BYTES": layout.scale_bytes, "SCALES": layout.scales, "NARROW": layout.narrow,
        "CODE_BYTES": layout.code_bytes,
    }  # fmt: skip


def row_views(cache: Tensor, rows: str) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """A cache as its codes (or plain rows), its scales, its bf16 channels: the same bytes in three dtypes."""
    if not rows:
        return cache, None, None
    layout = RowLayout.parse(rows)
    codes = cache.view(layout.layout.element.storage) if layout.layout else cache
    scales = cache.view(layout.layout.scale_dtype) if layout.layout else None
    return codes, scales, cache.view(torch.bfloat16) if layout.wide else None


# -- pooling -----------------------------------------------------------------------------------------------------------


@triton.jit
def _pooled(
    kv, gate, ape, state, end, position, first, slot, channel,
    D: tl.constexpr, BLOCK: tl.constexpr, M: tl.constexpr, RING: tl.constexpr, CHUNK: tl.constexpr,
    STRIDE: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """[BLOCK] fp32: the softmax of gate + ape over the RING tokens that end at `end`, times kv, of these channels.

    Tokens from `first` on are this step's, older ones come from the ring; those before the sequence are absent. With
    OVERLAP the first M tokens give the first half of their 2 D columns, the others the second.
    """
    WIDTH: tl.constexpr = 2 * D if OVERLAP else D
    channel = channel[None, :]
    top = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    weighted = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, RING, CHUNK):
        step = start + tl.arange(0, CHUNK)
        at = position + step - (RING - 1)
        token = end + step - (RING - 1)
        inside = (step < RING) & (at >= 0)
        column = (step // M * D if OVERLAP else step * 0)[:, None] + channel
        fresh = (inside & (token >= first))[:, None] & (channel < D)
        old = (inside & (token < first))[:, None] & (channel < D)
        new = token.to(tl.int64)[:, None] * STRIDE + column
        kept = (slot.to(tl.int64) * RING + (at + RING) % RING)[:, None] * (2 * WIDTH) + column
        values = tl.load(kv + new, mask=fresh, other=0.0) + tl.load(state + kept, mask=old, other=0.0)
        logits = tl.load(gate + new, mask=fresh, other=0.0) + tl.load(state + kept + WIDTH, mask=old, other=0.0)
        logits += tl.load(ape + ((at + RING) % M)[:, None] * WIDTH + column, mask=fresh | old, other=0.0)
        logits = tl.where(inside[:, None], logits, float("-inf"))
        highest = tl.maximum(top, tl.max(logits, 0))
        # Before the first token that is there nothing has a weight, not NaN.
        safe = tl.where(highest == float("-inf"), 0.0, highest)
        share, before = tl.exp(logits - safe[None, :]), tl.exp(top - safe)
        total = total * before + tl.sum(share, 0)
        weighted = weighted * before + tl.sum(share * values, 0)
        top = highest
    return weighted / total


@triton.jit
def _angles(cos, sin, D: tl.constexpr, BLOCK: tl.constexpr, PAIRS: tl.constexpr):
    """Cosines and sines [BLOCK / 2] of RoPE for the last PAIRS pairs below column D; the others turn by nothing."""
    pair = tl.arange(0, BLOCK // 2) - (D // 2 - PAIRS)
    turns = (pair >= 0) & (pair < PAIRS)
    return tl.load(cos + pair, mask=turns, other=1.0), tl.load(sin + pair, mask=turns, other=0.0)


@triton.jit
def _turned(y, c, s, BLOCK: tl.constexpr):
    """RoPE of a row [BLOCK] in fp32."""
    even, odd = tl.split(tl.reshape(y, (BLOCK // 2, 2)))
    return tl.reshape(tl.join(even * c - odd * s, odd * c + even * s), (BLOCK,))


@triton.jit
def store_row(
    y, codes, scales, wide, page, row,
    D: tl.constexpr, BLOCK: tl.constexpr, PAGE: tl.constexpr, PAGE_BYTES: tl.constexpr, BODY: tl.constexpr,
    SCALE_BYTES: tl.constexpr, SCALES: tl.constexpr, NARROW: tl.constexpr, CODE_BYTES: tl.constexpr,
    GROUP: tl.constexpr, ELEMENT: tl.constexpr, FLOOR: tl.constexpr, TOP: tl.constexpr, SCALE: tl.constexpr,
):  # fmt: skip
    """y [BLOCK] as row `row` of a page, plain or in a row layout (spec 4.2)."""
    channel = tl.arange(0, BLOCK)
    if PAGE_BYTES == 0:
        at = (page.to(tl.int64) * PAGE + row) * D + channel
        tl.store(codes + at, y.to(codes.dtype.element_ty), mask=channel < D)
    else:
        start = page.to(tl.int64) * PAGE_BYTES
        body, scale = start + row * BODY, start + PAGE * BODY + row * SCALE_BYTES
        if NARROW > 0:
            size: tl.constexpr = 1 if SCALE == "e8m0" else 4
            quantize_row(
                codes + body, scales + scale // size, y.to(tl.float32), 0, NARROW, BLOCK, GROUP, ELEMENT, FLOOR, TOP,
                SCALE,
            )  # fmt: skip
            if SCALES * size < SCALE_BYTES:
                pad = SCALES + tl.arange(0, 8)
                tl.store(
                    scales + scale // size + pad, (pad * 0).to(scales.dtype.element_ty), mask=pad < SCALE_BYTES // size
                )
        if NARROW < D:
            at = (body + CODE_BYTES) // 2 + channel - NARROW
            tl.store(wide + at, y.to(tl.bfloat16), mask=(channel >= NARROW) & (channel < D))


@triton.jit
def pool_columns(
    kv, gate, ape, state, pooled, ends, positions, requests, query_start, slots,
    D: tl.constexpr, BLOCK: tl.constexpr, M: tl.constexpr, RING: tl.constexpr, CHUNK: tl.constexpr,
    STRIDE: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """BLOCK channels of a pooled window, fp32: rows of `pooled` [windows, D] are those of `pool_insert`."""
    n = tl.program_id(0)
    end = tl.load(ends + n)
    if end >= 0:
        request, channel = tl.load(requests + end), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        y = _pooled(
            kv, gate, ape, state, end, tl.load(positions + end), tl.load(query_start + request),
            tl.load(slots + request), channel, D, BLOCK, M, RING, CHUNK, STRIDE, OVERLAP,
        )  # fmt: skip
        tl.store(pooled + n.to(tl.int64) * D + channel, y, mask=channel < D)


@triton.jit
def pool_insert(
    kv, gate, ape, state, pooled, weight, cos, sin, codes, scales, wide, table, ends, positions, requests, query_start,
    slots, eps, COLUMNS,
    D: tl.constexpr, BLOCK: tl.constexpr, LOG: tl.constexpr, M: tl.constexpr, RING: tl.constexpr, CHUNK: tl.constexpr,
    STRIDE: tl.constexpr, OVERLAP: tl.constexpr, POOLED: tl.constexpr, RATIO: tl.constexpr, PAIRS: tl.constexpr,
    ROTATE: tl.constexpr, DTYPE: tl.constexpr, PAGE: tl.constexpr, PAGE_BYTES: tl.constexpr, BODY: tl.constexpr,
    SCALE_BYTES: tl.constexpr, SCALES: tl.constexpr, NARROW: tl.constexpr, CODE_BYTES: tl.constexpr,
    GROUP: tl.constexpr, ELEMENT: tl.constexpr, FLOOR: tl.constexpr, TOP: tl.constexpr, SCALE: tl.constexpr,
):  # fmt: skip
    """One row, of the window that ends at token ends[n] (-1: padding, nothing to do); spec 6.1 K11.

    Rounded to DTYPE where the reference does: pooled, normed, turned, rotated. What does not depend on the pooled row
    is read before it: this kernel waits for memory, not for anything else.
    """
    n = tl.program_id(0)
    end = tl.load(ends + n)
    if end >= 0:
        request, position = tl.load(requests + end), tl.load(positions + end)
        channel = tl.arange(0, BLOCK)
        gain = tl.load(weight + channel, mask=channel < D, other=0.0).to(tl.float32)
        c, s = _angles(cos + n * PAIRS, sin + n * PAIRS, D, BLOCK, PAIRS)
        row = position // RATIO
        page = tl.load(table + request.to(tl.int64) * COLUMNS + (row // PAGE) % COLUMNS)
        if POOLED:
            y = tl.load(pooled + n.to(tl.int64) * D + channel, mask=channel < D, other=0.0)
        else:
            y = _pooled(
                kv, gate, ape, state, end, position, tl.load(query_start + request), tl.load(slots + request), channel,
                D, BLOCK, M, RING, CHUNK, STRIDE, OVERLAP,
            )  # fmt: skip
        y = tl.where(channel < D, y.to(DTYPE).to(tl.float32), 0.0)
        y *= tl.rsqrt(tl.sum(y * y, 0) / D + eps)
        y *= gain
        y = _turned(y.to(DTYPE).to(tl.float32), c, s, BLOCK).to(DTYPE)
        if ROTATE:
            y = hadamard_vector(y.to(tl.float32), BLOCK, LOG).to(DTYPE)
        store_row(
            y, codes, scales, wide, page, row % PAGE, D, BLOCK, PAGE, PAGE_BYTES, BODY, SCALE_BYTES, SCALES, NARROW,
            CODE_BYTES, GROUP, ELEMENT, FLOOR, TOP, SCALE,
        )  # fmt: skip


FEW: Final = 8  # tokens of a window that one program reads at once
COLUMNS: Final = 32  # channels of a program that pools longer ones: 128 tokens of them at once, in registers


def compressor_pool_norm_rope_insert(
    device: Device, kv: Tensor, gate: Tensor, ape: Tensor, state: Tensor, weight: Tensor, eps: float, cos: Tensor,
    sin: Tensor, cache: Tensor, table: Tensor, ends: Tensor, positions: Tensor, requests: Tensor, query_start: Tensor,
    slots: Tensor, ratio: int, overlap: bool, dtype: torch.dtype, rotate: bool = False, rows: str = "",
) -> None:  # fmt: skip
    """See `atomc.ops.compressor.compressor_pool_norm_rope_insert`."""
    d, ring = kv.shape[1] // (2 if overlap else 1), state.shape[1]
    block, log = power_of_two(d), power_of_two(d).bit_length() - 1
    if rotate and block != d:
        raise ValueError(f"a Hadamard rotation of {d} channels: it has a power of two of them")
    if kv.stride(0) != gate.stride(0) or d % 2 or ring != ape.shape[0] * (2 if overlap else 1):
        raise ValueError(f"kv and gate are rows alike, of whole pairs; a ring of {ring} tokens is not its windows")
    long = ring > FEW
    window = {"kv": kv, "gate": gate, "ape": ape, "state": state}
    where = {"ends": ends, "positions": positions, "requests": requests, "query_start": query_start, "slots": slots}
    pooling = {"D": d, "M": ape.shape[0], "RING": ring, "STRIDE": kv.stride(0), "OVERLAP": overlap}
    pooled = device.empty((ends.shape[0], d), torch.float32) if long else None
    if long:
        some = min(block, COLUMNS)
        constants = {**pooling, "BLOCK": some, "CHUNK": min(power_of_two(ring), 128)}
        grid = (ends.shape[0], cdiv(d, some))
        device.launch(pool_columns, grid, {**window, "pooled": pooled, **where}, constants, warps=8)
    codes, scales, wide = row_views(cache, rows)
    args = {
        **window, "pooled": pooled, "weight": weight, "cos": cos, "sin": sin, "codes": codes, "scales": scales,
        "wide": wide, "table": table, **where, "eps": eps, "COLUMNS": table.shape[1],
    }  # fmt: skip
    constants = {
        **pooling, "BLOCK": block, "LOG": log, "CHUNK": power_of_two(ring), "POOLED": long, "RATIO": ratio,
        "PAIRS": cos.shape[-1], "ROTATE": rotate, "DTYPE": TL[dtype], **row_constants(cache, rows, d),
    }  # fmt: skip
    device.launch(pool_insert, (ends.shape[0],), args, constants, warps=4)


# -- the ring ----------------------------------------------------------------------------------------------------------


@triton.jit
def keep_tokens(
    state, kv, gate, positions, requests, query_start, slots, T,
    W: tl.constexpr, RING: tl.constexpr, STRIDE: tl.constexpr, BT: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    """(kv, gate) of BT tokens, BW of their columns, to the ring [slots, RING, 2, W]: of the last RING of a request."""
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    column = tl.program_id(1) * BW + tl.arange(0, BW)[None, :]
    live = t < T
    request = tl.load(requests + t, mask=live, other=0)
    # Of tokens that share a place in the ring only the last is kept.
    live = live & (t >= tl.load(query_start + request + 1, mask=live, other=0) - RING)
    place = (
        tl.load(slots + request, mask=live, other=0).to(tl.int64) * RING
        + tl.load(positions + t, mask=live, other=0) % RING
    )
    keep = live[:, None] & (column < W)
    read, write = t.to(tl.int64)[:, None] * STRIDE + column, place[:, None] * (2 * W) + column
    tl.store(state + write, tl.load(kv + read, mask=keep).to(state.dtype.element_ty), mask=keep)
    tl.store(state + write + W, tl.load(gate + read, mask=keep).to(state.dtype.element_ty), mask=keep)


def compressor_update(
    device: Device, state: Tensor, kv: Tensor, gate: Tensor, positions: Tensor, requests: Tensor, query_start: Tensor,
    slots: Tensor,
) -> None:  # fmt: skip
    """See `atomc.ops.compressor.compressor_update`."""
    t, w = kv.shape
    if kv.stride(0) != gate.stride(0):
        raise ValueError("kv and gate are columns of one product, or two products alike")
    bt, bw = 1 if device.tokens <= 64 else 8, min(power_of_two(w), 1024)
    args = {
        "state": state, "kv": kv, "gate": gate, "positions": positions, "requests": requests,
        "query_start": query_start, "slots": slots, "T": t,
    }  # fmt: skip
    constants = {"W": w, "RING": state.shape[1], "STRIDE": kv.stride(0), "BT": bt, "BW": bw}
    device.launch(keep_tokens, (cdiv(t, bt), cdiv(w, bw)), args, constants, warps=2 if bt == 1 else 8)
