"""Hyper-connections in two kernels: mix (post, coefficient GEMM, split over channels), finish (pre, norm, rounding).

Contract:
    `mix` updates the streams (post of the last sublayer), and multiplies the updated ones, as they are stored, by fn:
    24 sums of products for each token, and the sum of squares, of each split of the channels. `finish` adds the splits
    in their order, makes the coefficients, and collapses the streams into the sublayer's normed input (spec 2.1, 6.1
    K1-K5). Pre depends on a sum over all updated streams, so there is no single pass.

Illegal: other than 4 streams: a token's coefficients are 4 x 4 matrices in registers.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from atomc.codegen.device import Device, cdiv, power_of_two
from atomc.codegen.kernels.quantize import empty_pair, layout_constants, quantize_row

N = 4


# -- post and mix ------------------------------------------------------------------------------------------------------


@triton.jit
def _column(comb, m, k, keep):
    """comb[., k] of tokens m: four vectors."""
    at = comb + m * 16 + k
    return (
        tl.load(at, mask=keep, other=0.0), tl.load(at + 4, mask=keep, other=0.0),
        tl.load(at + 8, mask=keep, other=0.0), tl.load(at + 12, mask=keep, other=0.0),
    )  # fmt: skip


@triton.jit
def _blend(h, y, post, c):
    """One updated stream, `post y + sum_j comb[j][k] h[j]`, of tiles [BM, BK] in fp32."""
    mixed = c[0][:, None] * h[0].to(tl.float32) + c[1][:, None] * h[1].to(tl.float32)
    mixed += c[2][:, None] * h[2].to(tl.float32) + c[3][:, None] * h[3].to(tl.float32)
    return post[:, None] * y + mixed


@triton.jit
def _streams(h, at, keep, D: tl.constexpr):
    """Tiles of the four streams at `at`, an offset into stream 0."""
    return (
        tl.load(h + at, mask=keep, other=0.0), tl.load(h + at + D, mask=keep, other=0.0),
        tl.load(h + at + 2 * D, mask=keep, other=0.0), tl.load(h + at + 3 * D, mask=keep, other=0.0),
    )  # fmt: skip


@triton.jit
def _first(a, b):
    """A combination that is never called: of one element."""
    return a


@triton.jit
def _placed(x, BM: tl.constexpr, BK: tl.constexpr):
    """x as it is, where it was computed: without a reduction in between, the compiler moves all that x is made of into
    the layout of the product's operand, which every warp holds whole: registers spill."""
    return tl.reduce(tl.reshape(x, (BM, BK, 1)), 2, _first)


@triton.jit
def _product(u, fn, row, channel, acc, ROWS: tl.constexpr, D: tl.constexpr):
    """acc [BM, COLUMNS] + u [BM, BK] fnᵀ, fn [ROWS, 4 D] fp32 read at `channel` [BK] of one stream."""
    keep = (row[None, :] < ROWS) & (channel[:, None] < 4 * D)
    w = tl.load(fn + row[None, :] * (4 * D) + channel[:, None], mask=keep, other=0.0)
    if u.dtype == tl.float32:
        return tl.dot(u, w, acc, input_precision="ieee")
    # u is bf16 as it is; fn as the sum of two bf16 has 16 bits: products are off by at most 2^-17.
    high = w.to(u.dtype)
    acc = tl.dot(u, high, acc)
    return tl.dot(u, (w - high.to(tl.float32)).to(u.dtype), acc)


@triton.jit
def hc_mix(
    h, y, post, comb, fn, h_out, partial, T,
    D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
    SPAN: tl.constexpr, POST: tl.constexpr,
):  # fmt: skip
    """Tokens of a tile, SPAN channels of every stream: h, y, post, comb -> h' [T, 4, D], partial [splits, T, COLUMNS].

    Column i < ROWS of `partial` is the sum of h' · fn[i], the last column the sum of h'².
    """
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    split = tl.program_id(1)
    live = m < T
    row = tl.arange(0, COLUMNS)
    start = m.to(tl.int64)[:, None] * (4 * D)
    acc = tl.zeros((BM, COLUMNS), tl.float32)
    squares = tl.zeros((BM, BK), tl.float32)
    if POST:
        p = (
            tl.load(post + m * 4, mask=live, other=0.0), tl.load(post + m * 4 + 1, mask=live, other=0.0),
            tl.load(post + m * 4 + 2, mask=live, other=0.0), tl.load(post + m * 4 + 3, mask=live, other=0.0),
        )  # fmt: skip
        c = (_column(comb, m, 0, live), _column(comb, m, 1, live), _column(comb, m, 2, live), _column(comb, m, 3, live))
    for at in range(0, SPAN, BK):
        channel = split * SPAN + at + tl.arange(0, BK)
        keep = live[:, None] & (channel[None, :] < D)
        old = _streams(h, start + channel[None, :], keep, D)
        if POST:
            added = tl.load(y + m.to(tl.int64)[:, None] * D + channel[None, :], mask=keep, other=0.0).to(tl.float32)
        for k in tl.static_range(4):
            u = old[k]
            if POST:
                u = _blend(old, added, p[k], c[k]).to(h.dtype.element_ty)
                tl.store(h_out + start + k * D + channel[None, :], u, mask=keep)
                u = _placed(u, BM, BK)
            squares += u.to(tl.float32) * u.to(tl.float32)
            acc = _product(u, fn, row, k * D + channel, acc, ROWS, D)
    out = partial + (split.to(tl.int64) * T + m) * COLUMNS
    tl.store(out[:, None] + row[None, :], acc, mask=live[:, None] & (row[None, :] < ROWS))
    tl.store(out + COLUMNS - 1, tl.sum(squares, 1), mask=live)


@triton.jit
def hc_update(h, y, post, comb, out, D: tl.constexpr, BK: tl.constexpr):
    """BK channels of every stream of a token: post alone (spec 6.1 K3)."""
    m = tl.program_id(0) + tl.arange(0, 1)
    channel = tl.program_id(1) * BK + tl.arange(0, BK)[None, :]
    at = m.to(tl.int64)[:, None] * (4 * D) + channel
    keep = channel < D
    old = _streams(h, at, keep, D)
    added = tl.load(y + m.to(tl.int64)[:, None] * D + channel, mask=keep, other=0.0).to(tl.float32)
    for k in tl.static_range(4):
        u = _blend(old, added, tl.load(post + m * 4 + k), _column(comb, m, k, m >= 0))
        tl.store(out + at + k * D, u.to(out.dtype.element_ty), mask=keep)


# -- finish ------------------------------------------------------------------------------------------------------------


@triton.jit
def _coefficients(
    partial, base, scale, post, comb, tile, norm_eps, hc_eps, T,
    D: tl.constexpr, COLUMNS: tl.constexpr, SPLITS: tl.constexpr, SPLIT_BLOCK: tl.constexpr, BT: tl.constexpr,
    ITERS: tl.constexpr,
):  # fmt: skip
    """post [T, 4] and comb [T, 4, 4] of BT tokens: sigmoid; softmax, then Sinkhorn, which ends with columns."""
    t = tile * BT + tl.arange(0, BT)
    s = tl.arange(0, SPLIT_BLOCK)
    live = t < T
    row = (s.to(tl.int64)[:, None] * T + t[None, :]) * COLUMNS
    keep = (s[:, None] < SPLITS) & live[None, :]
    squares = tl.sum(tl.load(partial + row + COLUMNS - 1, mask=keep, other=0.0), 0)
    inverse = tl.rsqrt(squares / (4 * D) + norm_eps)
    four, sixteen = tl.arange(0, 4), tl.arange(0, 16)
    at = partial + row[:, :, None]
    mix = tl.sum(tl.load(at + 4 + four[None, None, :], mask=keep[:, :, None], other=0.0), 0) * inverse[:, None]
    weight = 2 * tl.sigmoid(mix * tl.load(scale + 1) + tl.load(base + 4 + four)[None, :])
    tl.store(post + t[:, None] * 4 + four[None, :], weight, mask=live[:, None])
    mix = tl.sum(tl.load(at + 8 + sixteen[None, None, :], mask=keep[:, :, None], other=0.0), 0) * inverse[:, None]
    a = tl.reshape(mix * tl.load(scale + 2) + tl.load(base + 8 + sixteen)[None, :], (BT, 4, 4))
    a = tl.exp(a - tl.max(a, 2)[:, :, None])
    a = a / tl.sum(a, 2)[:, :, None] + hc_eps
    a = a / (tl.sum(a, 1)[:, None, :] + hc_eps)
    for _ in range(ITERS - 1):
        a = a / (tl.sum(a, 2)[:, :, None] + hc_eps)
        a = a / (tl.sum(a, 1)[:, None, :] + hc_eps)
    where = t[:, None, None] * 16 + four[None, :, None] * 4 + four[None, None, :]
    tl.store(comb + where, a, mask=live[:, None, None])


@triton.jit
def _collapsed(
    h, partial, base, scale, t, norm_eps, hc_eps, T,
    D: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr, SPLITS: tl.constexpr, SPLIT_BLOCK: tl.constexpr,
):  # fmt: skip
    """x [BLOCK] = sum_j pre_j h[j] of token t, rounded to the streams' dtype."""
    channel, i = tl.arange(0, BLOCK), tl.arange(0, 8)
    # Asked for first: the streams arrive while the coefficients are made.
    old = _streams(h, t.to(tl.int64) * (4 * D) + channel, channel < D, D)
    s = tl.arange(0, SPLIT_BLOCK)[:, None]
    column = tl.where(i < 4, i, COLUMNS - 1)[None, :]
    keep = (s < SPLITS) & (i < 5)[None, :]
    sums = tl.sum(tl.load(partial + (s.to(tl.int64) * T + t) * COLUMNS + column, mask=keep, other=0.0), 0)
    inverse = tl.rsqrt(tl.sum(tl.where(i == 4, sums, 0.0), 0) / (4 * D) + norm_eps)
    bias = tl.load(base + i, mask=i < 4, other=0.0)
    pre = tl.sigmoid(sums * inverse * tl.load(scale) + bias) + hc_eps
    x = tl.zeros((BLOCK,), tl.float32)
    for j in tl.static_range(4):
        x += tl.sum(tl.where(i == j, pre, 0.0), 0) * old[j].to(tl.float32)
    return x.to(h.dtype.element_ty)


@triton.jit
def hc_finish(
    h, partial, base, scale, weight, x, codes, scales, post, comb, norm_eps, hc_eps, T,
    D: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr, SPLITS: tl.constexpr, SPLIT_BLOCK: tl.constexpr,
    BT: tl.constexpr, ITERS: tl.constexpr, NORM: tl.constexpr, CODES: tl.constexpr, SCALES: tl.constexpr,
    GROUP: tl.constexpr, ELEMENT: tl.constexpr, FLOOR: tl.constexpr, TOP: tl.constexpr, SCALE: tl.constexpr,
):  # fmt: skip
    """The first programs make post and comb of BT tokens each (ITERS > 0), each other one the input x of a token.

    Sinkhorn's 39 dependent steps take as long as the rest, so they run beside it, not before it.
    """
    tiles = tl.cdiv(T, BT) if ITERS > 0 else 0
    if tl.program_id(0) < tiles:
        _coefficients(
            partial, base, scale, post, comb, tl.program_id(0), norm_eps, hc_eps, T, D, COLUMNS, SPLITS, SPLIT_BLOCK,
            BT, ITERS,
        )  # fmt: skip
    else:
        t = tl.program_id(0) - tiles
        v = _collapsed(h, partial, base, scale, t, norm_eps, hc_eps, T, D, BLOCK, COLUMNS, SPLITS, SPLIT_BLOCK)
        channel = tl.arange(0, BLOCK)
        if NORM:
            wide = v.to(tl.float32)
            wide *= tl.rsqrt(tl.sum(wide * wide, 0) / D + norm_eps)
            v = (wide * tl.load(weight + channel, mask=channel < D, other=0.0).to(tl.float32)).to(v.dtype)
        row = t.to(tl.int64)
        tl.store(x + row * D + channel, v, mask=channel < D)
        if SCALES > 0:
            quantize_row(
                codes + row * CODES, scales + row * SCALES, v.to(tl.float32), 0, D, BLOCK, GROUP, ELEMENT, FLOOR, TOP,
                SCALE,
            )  # fmt: skip


# -- host --------------------------------------------------------------------------------------------------------------


def _mix(
    device: Device, h: Tensor, fn: Tensor, last: tuple[Tensor, Tensor, Tensor] | None
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """The updated streams (h itself where `last`, the last sublayer's y, post, comb, is None), partial, constants."""
    d, rows = h.shape[-1], fn.shape[0]
    if h.shape[-2] != N or rows not in (N, 2 * N + N * N):
        raise ValueError(f"hyper-connections of {h.shape[-2]} streams and {rows} coefficients; kernels have {N}")
    t = h.numel() // (N * d)
    nvidia = device.target.vendor == "nvidia"
    bm, warps = (16, 4) if device.tokens <= 64 else (64, 8)
    # Registers decide: a lane holds 20 coefficients for each of its tokens. Wider tiles of 64 tokens spill on NVIDIA.
    bk = 32 if nvidia and bm == 64 else 64
    columns = 32 if rows > N else 16
    chunks, tiles = cdiv(d, bk), cdiv(device.tokens, bm)
    # A split for every compute unit: at batch 1 what is read is fn, 1.6 or 2.8 MB.
    span = cdiv(chunks, min(chunks, max(cdiv(device.target.compute_units, tiles), 1))) * bk
    splits = cdiv(d, span)
    partial = device.empty((splits, t, columns), torch.float32)
    y, post, comb = last or (None, None, None)
    out = device.empty(h.shape, h.dtype) if last else h
    args = {
        "h": h, "y": y, "post": post, "comb": comb, "fn": fn, "h_out": out if last else None, "partial": partial,
        "T": t,
    }  # fmt: skip
    constants = {
        "D": d, "ROWS": rows, "COLUMNS": columns, "BM": bm, "BK": bk, "SPAN": span, "POST": last is not None,
    }  # fmt: skip
    device.launch(hc_mix, (cdiv(t, bm), splits), args, constants, warps=warps, stages=3 if nvidia else 1)
    return out, partial, {"COLUMNS": columns, "SPLITS": splits, "SPLIT_BLOCK": power_of_two(splits)}


def _finish(
    device: Device, h: Tensor, partial: Tensor, known: dict[str, Any], base: Tensor, scale: Tensor,
    weight: Tensor | None, norm_eps: float, hc_eps: float, iters: int, layout: str = "",
) -> tuple[Tensor, ...]:  # fmt: skip
    """x, then post and comb (iters > 0), then codes and scales of x (a layout)."""
    d, lead = h.shape[-1], tuple(h.shape[:-2])
    t, block = h.numel() // (N * d), power_of_two(d)
    x = device.empty((*lead, d), h.dtype)
    post = device.empty((*lead, N), torch.float32) if iters else None
    comb = device.empty((*lead, N, N), torch.float32) if iters else None
    codes, scales = empty_pair(device, (*lead, d), layout) if layout else (None, None)
    bt = max(1, min(32, 64 // known["SPLIT_BLOCK"]))
    args = {
        "h": h, "partial": partial, "base": base, "scale": scale, "weight": weight, "x": x, "codes": codes,
        "scales": scales, "post": post, "comb": comb, "norm_eps": norm_eps, "hc_eps": hc_eps, "T": t,
    }  # fmt: skip
    none = {"GROUP": 1, "ELEMENT": "", "FLOOR": 0.0, "TOP": 0.0, "SCALE": ""}
    constants = {
        "D": d, "BLOCK": block, "BT": bt, "ITERS": iters, "NORM": weight is not None, **known,
        **(layout_constants(layout, block) if layout else none),
        "CODES": 0 if codes is None else codes.shape[-1], "SCALES": 0 if scales is None else scales.shape[-1],
    }  # fmt: skip
    tiles = cdiv(t, bt) if iters else 0
    device.launch(hc_finish, (tiles + t,), args, constants, warps=min(max(block // 512, 1), 8))
    return tuple(part for part in (x, post, comb, codes, scales) if part is not None)


def hc_pre(
    device: Device, h: Tensor, fn: Tensor, base: Tensor, scale: Tensor, norm_eps: float, hc_eps: float, iters: int
) -> tuple[Tensor, ...]:
    """See `atomc.ops.hyper_connection.hc_pre`: -> x, post, comb."""
    _, partial, known = _mix(device, h, fn, None)
    return _finish(device, h, partial, known, base, scale, None, norm_eps, hc_eps, iters)


def hc_pre_norm(
    device: Device, h: Tensor, fn: Tensor, base: Tensor, scale: Tensor, weight: Tensor, norm_eps: float,
    hc_eps: float, iters: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    """See `atomc.ops.hyper_connection.hc_pre_norm`: -> x, post, comb."""
    _, partial, known = _mix(device, h, fn, None)
    return _finish(device, h, partial, known, base, scale, weight, norm_eps, hc_eps, iters)


def hc_post(device: Device, h: Tensor, y: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """See `atomc.ops.hyper_connection.hc_post`."""
    d = h.shape[-1]
    if h.shape[-2] != N:
        raise ValueError(f"hyper-connections of {h.shape[-2]} streams; kernels have {N}")
    out, bk = device.empty(h.shape, h.dtype), min(power_of_two(d), 1024)
    args = {"h": h, "y": y, "post": post, "comb": comb, "out": out}
    device.launch(hc_update, (h.numel() // (N * d), cdiv(d, bk)), args, {"D": d, "BK": bk}, warps=max(bk // 256, 1))
    return out


def hc_post_pre_norm(
    device: Device, h: Tensor, y: Tensor, post: Tensor, comb: Tensor, fn: Tensor, base: Tensor, scale: Tensor,
    weight: Tensor, norm_eps: float, hc_eps: float, iters: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    """See `atomc.ops.hyper_connection.hc_post_pre_norm`: -> streams, x, post, comb."""
    new, partial, known = _mix(device, h, fn, (y, post, comb))
    return (new, *_finish(device, new, partial, known, base, scale, weight, norm_eps, hc_eps, iters))


def hc_post_pre_norm_quant(
    device: Device, h: Tensor, y: Tensor, post: Tensor, comb: Tensor, fn: Tensor, base: Tensor, scale: Tensor,
    weight: Tensor, norm_eps: float, hc_eps: float, iters: int, layout: str,
) -> tuple[Tensor, ...]:  # fmt: skip
    """See `atomc.ops.hyper_connection.hc_post_pre_norm_quant`: -> streams, x, post, comb, codes, scales."""
    new, partial, known = _mix(device, h, fn, (y, post, comb))
    return (new, *_finish(device, new, partial, known, base, scale, weight, norm_eps, hc_eps, iters, layout))


def hc_head(
    device: Device, h: Tensor, fn: Tensor, base: Tensor, scale: Tensor, norm_eps: float, hc_eps: float
) -> Tensor:
    """See `atomc.ops.hyper_connection.hc_head`."""
    _, partial, known = _mix(device, h, fn, None)
    return _finish(device, h, partial, known, base, scale, None, norm_eps, hc_eps, 0)[0]


def hc_head_norm(
    device: Device, h: Tensor, fn: Tensor, base: Tensor, scale: Tensor, weight: Tensor, norm_eps: float, hc_eps: float
) -> Tensor:
    """See `atomc.ops.hyper_connection.hc_head_norm`."""
    _, partial, known = _mix(device, h, fn, None)
    return _finish(device, h, partial, known, base, scale, weight, norm_eps, hc_eps, 0)[0]
