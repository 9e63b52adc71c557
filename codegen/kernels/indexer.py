"""The lightning indexer: queries turned, rotated and rounded; scores of cached index rows; the best rows (spec 2.7).

Three kernels. `turn_queries` makes the queries as the reference rounds them. `score_rows` keeps a tile of rows in
registers, as one operand of the product, and passes the queries of its tokens by it: one token at decode, a tile of
them in a prompt, for which rows are read and decoded once. `topk` selects. A token that sees no more than K rows takes
them all: nothing is scored.

Products of rounded rows and queries are exact in bf16: e2m1 or e4m3 times a power of two. Packed FP4 pairs are two
products over half the channels, even and odd, so the queries are stored even channels first.

Illegal: fewer than 32 channels with FP4 rows, fewer than 16 otherwise (the matrix unit's least), or no power of two.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from atomc.codegen.device import Device, cdiv, power_of_two
from atomc.codegen.kernels.common import e2m1_value, e8m0_value
from atomc.codegen.kernels.compressor import row_constants, row_views
from atomc.codegen.kernels.quantize import (
    block_scale,
    e2m1_code,
    hadamard_tile,
    largest_magnitude,
    layout_constants,
    unscaled,
)  # fmt: skip
from atomc.codegen.kernels.topk import padded, top_rows
from atomc.formats import Layout, RowLayout

FP8 = {torch.float8_e4m3fn: tl.float8e4nv, torch.float8_e4m3fnuz: tl.float8e4b8, torch.float8_e5m2: tl.float8e5}
SCORES_BYTES = 1 << 28  # of scores held at a time: longer contexts are scored fewer tokens at a time


# -- queries -----------------------------------------------------------------------------------------------------------


@triton.jit
def _as_fp8(x, TOP: tl.constexpr, CODE: tl.constexpr):
    return tl.minimum(tl.maximum(x, -TOP), TOP).to(CODE).to(tl.float32)


@triton.jit
def _rounded(
    x, GROUP: tl.constexpr, ELEMENT: tl.constexpr, FLOOR: tl.constexpr, TOP: tl.constexpr, SCALE: tl.constexpr,
    CODE: tl.constexpr,
):  # fmt: skip
    """x [R, D] fp32 to a layout and back."""
    tile = tl.reshape(x, (x.shape[0], x.shape[1] // GROUP, GROUP))
    scale = block_scale(largest_magnitude(tile, 2), FLOOR, TOP, SCALE)[:, :, None]
    y = unscaled(tile, scale, SCALE)
    y = e2m1_value(e2m1_code(y)) if ELEMENT == "e2m1" else _as_fp8(y, TOP, CODE)
    return tl.reshape(y * tl.where(scale < float("inf"), scale, float("nan")), (x.shape[0], x.shape[1]))


@triton.jit
def turn_queries(
    q, cos, sin, positions, out, T,
    H: tl.constexpr, HB: tl.constexpr, D: tl.constexpr, PAIRS: tl.constexpr, RATIO: tl.constexpr, TOPK: tl.constexpr,
    HALVES: tl.constexpr, ROUND: tl.constexpr, GROUP: tl.constexpr, ELEMENT: tl.constexpr, FLOOR: tl.constexpr,
    TOP: tl.constexpr, SCALE: tl.constexpr, CODE: tl.constexpr,
):  # fmt: skip
    """Queries [H, D] of tokens that are scored: RoPE of PAIRS pairs, and where ROUND Hadamard and rounding (K12).

    HALVES: even channels are stored before odd ones. A program takes every num_programs(0)-th token: the Hadamard
    matrix costs as much to make as to use.
    """
    head, channel, half = tl.arange(0, HB)[:, None], tl.arange(0, D)[None, :], tl.arange(0, D // 2)
    kept, pair = head < H, half - (D // 2 - PAIRS)
    for t in range(tl.program_id(0), T, tl.num_programs(0)):
        if (tl.load(positions + t) + 1) // RATIO > TOPK:
            at = (tl.full((), 0, tl.int64) + t) * (H * D) + head * D
            x = tl.load(q + at + channel, mask=kept, other=0.0)
            if PAIRS > 0:
                even, odd = tl.split(tl.reshape(x.to(tl.float32), (HB, D // 2, 2)))
                c = tl.load(cos + t * PAIRS + pair, mask=pair >= 0, other=1.0)[None, :]
                s = tl.load(sin + t * PAIRS + pair, mask=pair >= 0, other=0.0)[None, :]
                x = tl.reshape(tl.join(even * c - odd * s, odd * c + even * s), (HB, D)).to(q.dtype.element_ty)
            if ROUND:
                x = hadamard_tile(x, D).to(q.dtype.element_ty)
                x = _rounded(x.to(tl.float32), GROUP, ELEMENT, FLOOR, TOP, SCALE, CODE).to(q.dtype.element_ty)
            if HALVES:
                first, second = tl.split(tl.reshape(x, (HB, D // 2, 2)))
                tl.store(out + at + half[None, :], first, mask=kept)
                tl.store(out + at + D // 2 + half[None, :], second, mask=kept)
            else:
                tl.store(out + at + channel, x, mask=kept)


# -- scores ------------------------------------------------------------------------------------------------------------


@triton.jit
def _keys(
    codes, scales, page, row, keep, BN: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, PAGE_BYTES: tl.constexpr,
    BODY: tl.constexpr, SCALE_BYTES: tl.constexpr, GROUP: tl.constexpr, ELEMENT: tl.constexpr, SCALE: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """Index rows [BN, D] in DTYPE; of FP4 rows even and odd channels [BN, D / 2], of others the same twice."""
    if PAGE_BYTES == 0:
        at = (page.to(tl.int64) * PAGE + row) * D
        low = tl.load(codes + at[:, None] + tl.arange(0, D)[None, :], mask=keep[:, None], other=0.0).to(DTYPE)
        high = low
    else:
        PACKED: tl.constexpr = 2 if ELEMENT == "e2m1" else 1
        size: tl.constexpr = 1 if SCALE == "e8m0" else 4
        group = tl.arange(0, D // GROUP)
        start = page.to(tl.int64) * PAGE_BYTES
        at = (start + PAGE * BODY + row * SCALE_BYTES) // size
        scale = tl.load(scales + at[:, None] + group[None, :], mask=keep[:, None], other=0)
        scale = (e8m0_value(scale) if SCALE == "e8m0" else scale)[:, :, None]
        byte = group[:, None] * (GROUP // PACKED) + tl.arange(0, GROUP // PACKED)[None, :]
        code = codes + (start + row * BODY)[:, None, None] + byte[None, :, :]
        if ELEMENT == "e2m1":
            pair = tl.load(code, mask=keep[:, None, None], other=0)
            low = tl.reshape(e2m1_value(pair & 15) * scale, (BN, D // 2)).to(DTYPE)
            high = tl.reshape(e2m1_value(pair >> 4) * scale, (BN, D // 2)).to(DTYPE)
        else:
            low = tl.load(code, mask=keep[:, None, None], other=0.0).to(tl.float32) * scale
            low = tl.reshape(low, (BN, D)).to(DTYPE)
            high = low
    return low, high


@triton.jit
def _queries(q, weights, H: tl.constexpr, HB: tl.constexpr, D: tl.constexpr, HALVES: tl.constexpr, DTYPE: tl.constexpr):
    """Queries [D, HB] of a token, as two operands [D / 2, HB] where HALVES (else twice the same), and weights [HB]."""
    head = tl.arange(0, HB)
    K: tl.constexpr = D // 2 if HALVES else D
    at = q + head[None, :] * D + tl.arange(0, K)[:, None]
    x = tl.load(at, mask=head[None, :] < H, other=0.0).to(DTYPE)
    y = x
    if HALVES:
        y = tl.load(at + K, mask=head[None, :] < H, other=0.0).to(DTYPE)
    return x, y, tl.load(weights + head, mask=head < H, other=0.0).to(tl.float32)


@triton.jit
def _score(low, high, x, y, w, HALVES: tl.constexpr):
    """[BN]: sum_h w_h relu(q_h · k_row)."""
    if low.dtype == tl.float32:
        dots = tl.dot(low, x, input_precision="ieee")
        if HALVES:
            dots = tl.dot(high, y, dots, input_precision="ieee")
    else:
        dots = tl.dot(low, x)
        if HALVES:
            dots = tl.dot(high, y, dots)
    return tl.sum(tl.maximum(dots, 0.0) * w[None, :], 1)


@triton.jit
def score_rows(
    q, weights, codes, scales, table, requests, positions, query_start, scores, first, last, COLUMNS, LIMIT, WIDTH,
    H: tl.constexpr, HB: tl.constexpr, D: tl.constexpr, STRIDE: tl.constexpr, RATIO: tl.constexpr, TOPK: tl.constexpr,
    BT: tl.constexpr, BN: tl.constexpr, HALVES: tl.constexpr, DTYPE: tl.constexpr, PAGE: tl.constexpr,
    PAGE_BYTES: tl.constexpr, BODY: tl.constexpr, SCALE_BYTES: tl.constexpr, GROUP: tl.constexpr,
    ELEMENT: tl.constexpr, SCALE: tl.constexpr,
):  # fmt: skip
    """Scores, rows of 16 WIDTH, of tokens from `first` on, below `last`, against the rows that they see (spec 6.1 K13).

    A program takes BT tokens, request by request, and of a request's tiles of BN rows every num_programs(1)-th.
    """
    t = first + tl.program_id(0) * BT
    end = tl.minimum(t + BT, last)
    while t < end:
        request = tl.load(requests + t)
        stop = tl.maximum(tl.minimum(tl.load(query_start + request + 1), end), t + 1)
        visible = tl.minimum((tl.load(positions + stop - 1) + 1) // RATIO, LIMIT)
        tiles = tl.where(visible > TOPK, tl.cdiv(visible, BN), 0)
        pages = table + request.to(tl.int64) * COLUMNS
        if BT == 1:
            x, y, w = _queries(q + t.to(tl.int64) * (H * D), weights + t.to(tl.int64) * STRIDE, H, HB, D, HALVES, DTYPE)
        for tile in range(tl.program_id(1), tiles, tl.num_programs(1)):
            number = tile * BN + tl.arange(0, BN)
            keep = number < visible
            page = tl.load(pages + (number // PAGE) % COLUMNS, mask=keep, other=0)
            low, high = _keys(
                codes, scales, page, number % PAGE, keep, BN, D, PAGE, PAGE_BYTES, BODY, SCALE_BYTES, GROUP, ELEMENT,
                SCALE, DTYPE,
            )  # fmt: skip
            if BT == 1:
                out = scores + (t - first).to(tl.int64) * WIDTH * 16
                tl.store(out + number, _score(low, high, x, y, w, HALVES), mask=keep)
            else:
                for u in range(t, stop):
                    row = tl.full((), 0, tl.int64) + u
                    a, b, v = _queries(q + row * (H * D), weights + row * STRIDE, H, HB, D, HALVES, DTYPE)
                    seen = tl.minimum((tl.load(positions + u) + 1) // RATIO, LIMIT)
                    out = scores + (row - first) * WIDTH * 16
                    tl.store(out + number, _score(low, high, a, b, v, HALVES), mask=number < seen)
        t = stop


# -- host --------------------------------------------------------------------------------------------------------------


def _turned(
    device: Device, q: Tensor, cos: Tensor | None, sin: Tensor | None, positions: Tensor, ratio: int, topk: int,
    layout: str, halves: bool,
) -> Tensor:  # fmt: skip
    t, heads, d = q.shape
    out = device.empty(q.shape, q.dtype)
    none = {"GROUP": 1, "ELEMENT": "", "FLOOR": 0.0, "TOP": 0.0, "SCALE": ""}
    constants = {
        "H": heads, "HB": max(power_of_two(heads), 16), "D": d, "PAIRS": 0 if cos is None else cos.shape[-1],
        "RATIO": ratio, "TOPK": topk, "HALVES": halves, "ROUND": bool(layout),
        "CODE": FP8.get(Layout.parse(layout).element.storage, tl.float32) if layout else tl.float32,
        **(layout_constants(layout, d) if layout else none),
    }  # fmt: skip
    args = {"q": q, "cos": cos, "sin": sin, "positions": positions, "out": out, "T": t}
    most = 2 * device.target.compute_units
    device.launch(turn_queries, (t if device.tokens <= most else most,), args, constants, warps=8)
    return out


def _best_rows(
    device: Device, q: Tensor, weights: Tensor, cache: Tensor, table: Tensor, requests: Tensor, positions: Tensor,
    query_start: Tensor, ratio: int, topk: int, rows: str, known: dict[str, Any],
) -> Tensor:  # fmt: skip
    t, heads, d = q.shape
    codes, scales, _ = row_views(cache, rows)
    codes = codes.view(torch.uint8) if known["ELEMENT"] == "e2m1" else codes
    exact = q.dtype == torch.bfloat16 and known["SCALE"] != "float32" and codes.dtype != torch.float32
    blackwell = device.target.arch == "sm_100"  # eight warps, or three stages, spill there
    bt, bn, warps = (1, 64, 4) if device.tokens <= 64 else (16, 128, 4 if blackwell else 8)
    limit = table.shape[1] * known["PAGE"]
    out = device.empty((t, topk), torch.int32)
    step = max(SCORES_BYTES // (4 * padded(limit)) // bt * bt, bt)
    args = {
        "q": q, "weights": weights, "codes": codes, "scales": scales, "table": table, "requests": requests,
        "positions": positions, "query_start": query_start, "COLUMNS": table.shape[1], "LIMIT": limit,
        "WIDTH": padded(limit) // 16,
    }  # fmt: skip
    names = ("PAGE", "PAGE_BYTES", "BODY", "SCALE_BYTES", "GROUP", "ELEMENT", "SCALE")
    constants = {
        "H": heads, "HB": max(power_of_two(heads), 16), "D": d, "STRIDE": weights.stride(0), "RATIO": ratio,
        "TOPK": topk, "BT": bt, "BN": bn, "HALVES": known["ELEMENT"] == "e2m1",
        "DTYPE": tl.bfloat16 if exact else tl.float32, **{name: known[name] for name in names},
    }  # fmt: skip
    # How often is a matter of the bucket, not of this step's tokens: where `first` is beyond them nothing is done.
    held = t if device.tokens <= step else step
    scores = device.empty((held, padded(limit)), torch.float32)
    programs = cdiv(4 * device.target.compute_units, cdiv(min(device.tokens, step), bt))
    grid = (cdiv(held, bt), max(min(programs, cdiv(limit, bn)), 1))
    for first in range(0, device.tokens, step):
        given = {**args, "scores": scores, "first": first, "last": t}
        given = {name: given[name] for name in score_rows.arg_names[:14]}
        device.launch(score_rows, grid, given, constants, warps=warps, stages=2 if blackwell else 3)
        top_rows(device, scores, positions, first, limit, ratio, topk, out)
    return out


def _rows_known(cache: Tensor, rows: str, d: int) -> dict[str, Any]:
    known = row_constants(cache, rows, d)
    if rows and (RowLayout.parse(rows).wide or known["ELEMENT"] == "int8"):
        raise ValueError(f"index rows in row layout {rows}: all channels are in e4m3 or e2m1")
    if d & (d - 1) or d < (32 if known["ELEMENT"] == "e2m1" else 16):
        raise ValueError(f"index rows of {d} channels: a power of two, at least what the matrix unit takes")
    return known


def index_rope_topk(
    device: Device, q: Tensor, cos: Tensor, sin: Tensor, weights: Tensor, cache: Tensor, table: Tensor,
    requests: Tensor, positions: Tensor, query_start: Tensor, ratio: int, topk: int, rows: str = "", layout: str = "",
) -> Tensor:  # fmt: skip
    """See `atomc.ops.indexer.index_rope_topk`; the weights' rows may have a stride."""
    known = _rows_known(cache, rows, q.shape[2])
    turned = _turned(device, q, cos, sin, positions, ratio, topk, layout, known["ELEMENT"] == "e2m1")
    return _best_rows(device, turned, weights, cache, table, requests, positions, query_start, ratio, topk, rows, known)


def index_topk(
    device: Device, q: Tensor, weights: Tensor, cache: Tensor, table: Tensor, requests: Tensor, positions: Tensor,
    query_start: Tensor, ratio: int, topk: int, rows: str = "",
) -> Tensor:  # fmt: skip
    """See `atomc.ops.indexer.index_topk`."""
    known = _rows_known(cache, rows, q.shape[2])
    if known["ELEMENT"] == "e2m1":
        q = _turned(device, q, None, None, positions, ratio, topk, "", True)
    return _best_rows(device, q, weights, cache, table, requests, positions, query_start, ratio, topk, rows, known)
