"""Paged cache rows: reading and writing a row in its layout, and the operators that insert rows (spec 2.3, 4.1, 4.2).

Contract:
    A plain cache is [pages, page, d] of floats; a packed one [pages, page bytes] of bytes (`atomc.formats.rows`): the
    records of a page's rows, then their scales. Row numbers are logical; a table leads to pages and is used modulo its
    width. A negative row is a padding entry and lands in row 0 of the reserved page 0.
Illegal: quantised channels whose blocks are several and not of a power of two of columns, or of another element than
    e4m3, e4m3fnuz, e2m1; rows are read back with e4m3 elements only.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from atomc.codegen.device import Device, cdiv, power_of_two
from atomc.codegen.kernels.common import e8m0_byte, e8m0_value
from atomc.codegen.kernels.quantize import block_scale, e2m1_code, largest_magnitude, unscaled
from atomc.formats import RowLayout

# -- in a kernel -------------------------------------------------------------------------------------------------------


@triton.jit
def rotated(x, t, cos, sin, FIRST: tl.constexpr, D: tl.constexpr, RD: tl.constexpr, INVERSE: tl.constexpr):
    """float32 channels FIRST .. of x [R, n] of token t; those from D - RD to D are turned in pairs by its angles
    [T, RD / 2] (spec 2.2).
    """
    pair = tl.arange(0, x.shape[1] // 2) + (FIRST - (D - RD)) // 2
    turning = (pair >= 0) & (pair < RD // 2)
    at = t.to(tl.int64) * (RD // 2) + pair
    c = tl.load(cos + at, mask=turning, other=1.0)[None, :]
    s = tl.load(sin + at, mask=turning, other=0.0)[None, :]
    if INVERSE:
        s = -s
    even, odd = tl.split(tl.reshape(x, [x.shape[0], x.shape[1] // 2, 2]))
    turned = tl.join(even * c - odd * s, odd * c + even * s)
    return tl.reshape(turned, [x.shape[0], x.shape[1]])


@triton.jit
def quantized(x, GROUP: tl.constexpr, FLOOR: tl.constexpr, TOP: tl.constexpr, SCALE: tl.constexpr):
    """float32 x [R, DP] over the scales of its groups, within +-TOP; and the scales [R, DP / GROUP] (spec 3.4)."""
    parts = tl.reshape(x, [x.shape[0], x.shape[1] // GROUP, GROUP])
    scale = block_scale(largest_magnitude(parts, 2), FLOOR, TOP, SCALE)
    scaled = tl.reshape(unscaled(parts, scale[:, :, None], SCALE), [x.shape[0], x.shape[1]])
    return tl.minimum(tl.maximum(scaled, -TOP), TOP), scale


@triton.jit
def stored_scale(scale, SCALE: tl.constexpr):
    """A scale as it is stored: an E8M0 byte, or float32 with NaN for a block that has none."""
    if SCALE == "e8m0":
        return e8m0_byte(scale)
    else:
        return tl.where(scale < float("inf"), scale, float("nan"))


@triton.jit
def physical(table, request, row, ok, columns, PAGE: tl.constexpr):
    """(page, row in it) of logical rows; page 0, row 0 where not ok. The table [B, columns] is a ring of pages."""
    column = (tl.where(ok, row, 0) // PAGE) % columns
    page = tl.load(table + request * columns + column, mask=ok, other=0)
    return page, tl.where(ok, row % PAGE, 0)


@triton.jit
def fetch_part(
    pages, at, scale_at, ok, J: tl.constexpr, N: tl.constexpr, D: tl.constexpr, PACKED: tl.constexpr,
    NARROW: tl.constexpr, GROUP: tl.constexpr, BODY: tl.constexpr, SCALE: tl.constexpr,
):  # fmt: skip
    """Channels J N .. J N + N of the rows at `at` [R] (bytes where packed, else elements) as they are stored, for
    `part_values`: a tuple of codes and scales (at bytes `scale_at`) where there are any, then wide channels.

    Zeros, unread, where not ok: a free page has NaN.
    """
    c = J * N + tl.arange(0, N)
    out = ()
    if not PACKED:
        out = (tl.load(pages + at[:, None] + c[None, :], mask=ok[:, None] & (c < D)[None, :], other=0.0),)
    else:
        if J * N < NARROW:
            has = ok[:, None] & (c < NARROW)[None, :]
            codes = tl.load(pages + at[:, None] + c[None, :], mask=has, other=0)
            g = J * N // GROUP + tl.arange(0, N // GROUP if GROUP < N else 1)
            has = ok[:, None] & (g * GROUP < NARROW)[None, :]
            if SCALE == "e8m0":
                scale = tl.load(pages + scale_at[:, None] + g[None, :], mask=has, other=127)
            else:
                floats = pages.to(tl.pointer_type(tl.float32))
                scale = tl.load(floats + (scale_at // 4)[:, None] + g[None, :], mask=has, other=1.0)
            out = (codes, scale)
        if J * N + N > NARROW:
            # Counted in bf16, so that neighbours are seen to be; channel c of a record is at byte BODY - 2 (D - c).
            wide = (at // 2 + (BODY // 2 - D))[:, None] + c[None, :]
            has = ok[:, None] & ((c >= NARROW) & (c < D))[None, :]
            out = out + (tl.load(pages.to(tl.pointer_type(tl.bfloat16)) + wide, mask=has, other=0.0),)  # noqa: RUF005
    return out


@triton.jit
def part_values(
    part, KIND: tl.constexpr, J: tl.constexpr, N: tl.constexpr, PACKED: tl.constexpr, NARROW: tl.constexpr,
    GROUP: tl.constexpr, ELEMENT: tl.constexpr, SCALE: tl.constexpr,
):  # fmt: skip
    """The values [R, N], of type KIND, of what `fetch_part` read; exact where scales are powers of two."""
    if not PACKED or J * N >= NARROW:
        x = part[0].to(KIND)
    else:
        fp8: tl.constexpr = tl.float8e4b8 if ELEMENT == "e4m3fnuz" else tl.float8e4nv
        codes = part[0].to(fp8, bitcast=True).to(KIND)
        codes = tl.reshape(codes, [codes.shape[0], part[1].shape[1], N // part[1].shape[1]])
        if SCALE == "float32":
            x = (codes.to(tl.float32) * part[1][:, :, None]).to(KIND)
        else:
            scale = e8m0_value(part[1]) if SCALE == "e8m0" else part[1]
            x = codes * scale.to(KIND)[:, :, None]
        x = tl.reshape(x, [part[0].shape[0], N])
        if J * N + N > NARROW:
            x = tl.where((J * N + tl.arange(0, N) < NARROW)[None, :], x, part[2].to(KIND))
    return x


@triton.jit
def write_rows(
    pages, page, row, ok, x, D: tl.constexpr, DP: tl.constexpr, PACKED: tl.constexpr, NARROW: tl.constexpr,
    GROUP: tl.constexpr, BODY: tl.constexpr, SCALES: tl.constexpr, ELEMENT: tl.constexpr, SCALE: tl.constexpr,
    FLOOR: tl.constexpr, TOP: tl.constexpr, PAGE: tl.constexpr, PAGE_SIZE: tl.constexpr,
):  # fmt: skip
    """Store float32 x [N, DP] as rows [N] of pages [N], in the cache's type or row layout."""
    c = tl.arange(0, DP)
    page = page.to(tl.int64)
    if not PACKED:
        at = (page * PAGE_SIZE + row * D)[:, None] + c[None, :]
        tl.store(pages + at, x.to(pages.dtype.element_ty), mask=ok[:, None] & (c < D)[None, :])
    else:
        if NARROW > 0:
            scaled, scale = quantized(tl.where((c < NARROW)[None, :], x, 0.0), GROUP, FLOOR, TOP, SCALE)
            at = (page * PAGE_SIZE + row * BODY)[:, None]
            if ELEMENT == "e2m1":
                low, high = tl.split(tl.reshape(e2m1_code(scaled), [page.shape[0], DP // 2, 2]))
                pair = tl.arange(0, DP // 2)[None, :]
                tl.store(pages + at + pair, (low | (high << 4)).to(tl.uint8), mask=ok[:, None] & (2 * pair < NARROW))
            else:
                fp8: tl.constexpr = tl.float8e4b8 if ELEMENT == "e4m3fnuz" else tl.float8e4nv
                codes = scaled.to(fp8).to(tl.uint8, bitcast=True)
                tl.store(pages + at + c[None, :], codes, mask=ok[:, None] & (c < NARROW)[None, :])
            _write_scales(pages, page * PAGE_SIZE + PAGE * BODY + row * SCALES, ok, scale, NARROW, GROUP, SCALES, SCALE)
        if NARROW < D:
            wide = (page * (PAGE_SIZE // 2) + row * (BODY // 2) + (BODY // 2 - D))[:, None] + c[None, :]
            has = ok[:, None] & ((c >= NARROW) & (c < D))[None, :]
            tl.store(pages.to(tl.pointer_type(tl.bfloat16)) + wide, x.to(tl.bfloat16), mask=has)


@triton.jit
def _write_scales(
    pages, at, ok, scale, NARROW: tl.constexpr, GROUP: tl.constexpr, SCALES: tl.constexpr, SCALE: tl.constexpr,
):  # fmt: skip
    """Scale records of SCALES bytes at bytes `at` [N], of scales [N, groups]; zeros fill a record up."""
    g = tl.arange(0, scale.shape[1])[None, :]
    has = ok[:, None] & (g * GROUP < NARROW)
    groups: tl.constexpr = (NARROW + GROUP - 1) // GROUP
    used: tl.constexpr = groups if SCALE == "e8m0" else 4 * groups
    if SCALE == "e8m0":
        tl.store(pages + at[:, None] + g, stored_scale(scale, SCALE), mask=has)
    else:
        tl.store(pages.to(tl.pointer_type(tl.float32)) + (at // 4)[:, None] + g, stored_scale(scale, SCALE), mask=has)
    if used < SCALES:
        pad = used + tl.arange(0, 8)[None, :]
        tl.store(pages + at[:, None] + pad, tl.zeros((at.shape[0], 8), tl.uint8), mask=ok[:, None] & (pad < SCALES))


# -- kernels -----------------------------------------------------------------------------------------------------------


@triton.jit
def qk_norm_rope_rows(
    q, kv, cos, sin, cache, table, requests, positions, out, columns,
    H: tl.constexpr, RD: tl.constexpr, EPS: tl.constexpr, Q_STRIDE: tl.constexpr, KV_STRIDE: tl.constexpr,
    BH: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, PACKED: tl.constexpr, NARROW: tl.constexpr,
    GROUP: tl.constexpr, BODY: tl.constexpr, SCALES: tl.constexpr, ELEMENT: tl.constexpr, SCALE: tl.constexpr,
    FLOOR: tl.constexpr, TOP: tl.constexpr, PAGE: tl.constexpr, PAGE_SIZE: tl.constexpr,
):  # fmt: skip
    """A block of heads of one token: norm and RoPE of q [T, H, D]; or, last, its kv [T, D]: RoPE, stored as its row."""
    blocks: tl.constexpr = (H + BH - 1) // BH
    t, block = tl.program_id(0) // (blocks + 1), tl.program_id(0) % (blocks + 1)
    c = tl.arange(0, DP)
    kind: tl.constexpr = out.dtype.element_ty
    if block < blocks:
        h = block * BH + tl.arange(0, BH)
        inside = (h < H)[:, None] & (c < D)[None, :]
        x = tl.load(q + t.to(tl.int64) * Q_STRIDE + h[:, None] * D + c[None, :], mask=inside, other=0.0).to(tl.float32)
        x = x * tl.rsqrt(tl.sum(x * x, 1) / D + EPS)[:, None]
        x = rotated(x.to(kind).to(tl.float32), t, cos, sin, 0, D, RD, False)
        tl.store(out + t.to(tl.int64) * (H * D) + h[:, None] * D + c[None, :], x.to(kind), mask=inside)
    else:
        value = tl.load(kv + t.to(tl.int64) * KV_STRIDE + c, mask=c < D, other=0.0)[None, :].to(tl.float32)
        value = rotated(value, t, cos, sin, 0, D, RD, False).to(kv.dtype.element_ty).to(tl.float32)
        logical = tl.zeros((1,), tl.int32) + tl.load(positions + t)
        page, row = physical(table, tl.load(requests + t), logical, logical >= 0, columns, PAGE)
        write_rows(cache, page, row, page >= 0, value, D, DP, PACKED, NARROW, GROUP, BODY, SCALES, ELEMENT, SCALE,
                   FLOOR, TOP, PAGE, PAGE_SIZE)  # fmt: skip


@triton.jit
def store_rows(
    x, cache, table, requests, rows, columns, N,
    IN_PLACE: tl.constexpr, STRIDE: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    PACKED: tl.constexpr, NARROW: tl.constexpr, GROUP: tl.constexpr, BODY: tl.constexpr, SCALES: tl.constexpr,
    ELEMENT: tl.constexpr, SCALE: tl.constexpr, FLOOR: tl.constexpr, TOP: tl.constexpr, PAGE: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
):  # fmt: skip
    """Rows x [N, D] into a cache at their logical rows; IN_PLACE: row n is "page" n of one row (`pack_rows`)."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    c = tl.arange(0, DP)
    inside = n < N
    at = n.to(tl.int64)[:, None] * STRIDE + c[None, :]
    value = tl.load(x + at, mask=inside[:, None] & (c < D)[None, :], other=0.0).to(tl.float32)
    if IN_PLACE:
        page, row = n, tl.zeros((BN,), tl.int32)
    else:
        logical = tl.load(rows + n, mask=inside, other=-1)
        request = tl.load(requests + n, mask=inside, other=0)
        page, row = physical(table, request, logical, logical >= 0, columns, PAGE)
    write_rows(cache, page, row, inside, value, D, DP, PACKED, NARROW, GROUP, BODY, SCALES, ELEMENT, SCALE, FLOOR, TOP,
               PAGE, PAGE_SIZE)  # fmt: skip


@triton.jit
def store_packed(
    packed, cache, table, requests, rows, columns,
    BODY: tl.constexpr, SCALES: tl.constexpr, BYTES: tl.constexpr, PAGE: tl.constexpr, PAGE_SIZE: tl.constexpr,
):  # fmt: skip
    """One packed row [BODY + SCALES] copied into its page: the record, and its scales behind the page's records."""
    n = tl.program_id(0)
    b = tl.arange(0, BYTES)
    logical = tl.load(rows + n)
    page, row = physical(table, tl.load(requests + n), logical, logical >= 0, columns, PAGE)
    value = tl.load(packed + n.to(tl.int64) * (BODY + SCALES) + b, mask=b < BODY + SCALES, other=0)
    at = tl.where(b < BODY, row * BODY + b, PAGE * BODY + row * SCALES + (b - BODY))
    tl.store(cache + page.to(tl.int64) * PAGE_SIZE + at, value, mask=b < BODY + SCALES)


# -- host functions ----------------------------------------------------------------------------------------------------


def row_constants(rows: str, d: int, writes: bool = False) -> dict[str, Any]:
    """The constants of a cache's row layout, for rows of d channels; `writes`: those of quantising too.

    Raises:
        ValueError: a layout that no kernel here reads or writes.
    """
    dp = power_of_two(d)
    plain = {"D": d, "DP": dp, "PACKED": bool(rows), "NARROW": 0, "GROUP": dp, "BODY": 0, "SCALES": 0, "ELEMENT": "",
             "SCALE": ""}  # fmt: skip
    known = RowLayout.parse(rows) if rows else None
    layout = known.layout if known else None
    out: dict[str, Any] = plain if known is None else {**plain, "NARROW": known.narrow, "BODY": known.body_bytes,
                                                       "SCALES": known.scale_bytes}  # fmt: skip
    if known is not None and layout is not None:
        group = layout.columns if 0 < layout.columns < known.narrow else dp  # one group of all narrow channels
        if group & (group - 1) or layout.element.name not in ("e4m3", "e4m3fnuz", *(("e2m1",) if writes else ())):
            raise ValueError(f"no kernel for rows of {rows}: blocks of a power of two of columns, e4m3 elements")
        out |= {"GROUP": min(group, dp), "ELEMENT": layout.element.name, "SCALE": layout.scale}
    if writes:
        out |= {"FLOOR": layout.floor if layout else 0.0, "TOP": layout.top if layout else 1.0}
    return out


def page_constants(cache: Tensor, rows: str) -> dict[str, int]:
    """Rows of a page, and the distance of pages: in bytes where packed, else in elements."""
    if rows:
        return {"PAGE": RowLayout.parse(rows).rows_of(cache.shape[1]), "PAGE_SIZE": cache.shape[1]}
    return {"PAGE": cache.shape[1], "PAGE_SIZE": cache.shape[1] * cache.shape[2]}


def qk_norm_rope_insert(
    device: Device, q: Tensor, kv: Tensor, cos: Tensor, sin: Tensor, eps: float, cache: Tensor, table: Tensor,
    requests: Tensor, positions: Tensor, rows: str = "",
) -> Tensor:  # fmt: skip
    """See `atomc.ops.cache.qk_norm_rope_insert`; kv may be a slice of rows of a merged product."""
    tokens, heads, d = q.shape
    out = device.empty((tokens, heads, d), q.dtype)
    block = min(power_of_two(heads), 4)
    args = {"q": q, "kv": kv, "cos": cos, "sin": sin, "cache": cache, "table": table, "requests": requests,
            "positions": positions, "out": out, "columns": table.shape[1]}  # fmt: skip
    constants = {"H": heads, "RD": 2 * cos.shape[-1], "EPS": eps, "Q_STRIDE": q.stride(0), "KV_STRIDE": kv.stride(0),
                 "BH": block, **row_constants(rows, d, True), **page_constants(cache, rows)}  # fmt: skip
    device.launch(qk_norm_rope_rows, (tokens * (cdiv(heads, block) + 1),), args, constants)
    return out


def cache_insert(device: Device, cache: Tensor, x: Tensor, table: Tensor, requests: Tensor, rows: Tensor) -> None:
    """See `atomc.ops.cache.cache_insert`."""
    args = {"x": x, "cache": cache, "table": table, "requests": requests, "rows": rows, "columns": table.shape[1]}
    _store(device, args, x, {**row_constants("", x.shape[-1], True), **page_constants(cache, "")})


def pack_rows(device: Device, x: Tensor, rows: str) -> Tensor:
    """See `atomc.ops.quantize.pack_rows`: rows as pages of one row."""
    size = RowLayout.parse(rows).row_bytes
    out = device.empty((*x.shape[:-1], size), torch.uint8)
    args = {"x": x, "cache": out, "table": None, "requests": None, "rows": None, "columns": 1}
    _store(device, args, x, {**row_constants(rows, x.shape[-1], True), "PAGE": 1, "PAGE_SIZE": size})
    return out


def _store(device: Device, args: dict[str, Any], x: Tensor, constants: dict[str, Any]) -> None:
    count = 1
    for size in x.shape[:-1]:
        count *= size
    block = 1 if device.tokens <= 64 else 4
    args["N"] = count
    constants |= {"IN_PLACE": args["table"] is None, "STRIDE": x.stride(-2) if x.dim() > 1 else x.shape[-1]}
    device.launch(store_rows, (cdiv(count, block),), args, {**constants, "BN": block})


def packed_insert(
    device: Device, cache: Tensor, packed: Tensor, table: Tensor, requests: Tensor, positions: Tensor, rows: str
) -> None:
    """See `atomc.ops.cache.packed_insert`."""
    layout = RowLayout.parse(rows)
    args = {"packed": packed, "cache": cache, "table": table, "requests": requests, "rows": positions,
            "columns": table.shape[1]}  # fmt: skip
    constants = {"BODY": layout.body_bytes, "SCALES": layout.scale_bytes, "BYTES": power_of_two(layout.row_bytes),
                 **page_constants(cache, rows)}  # fmt: skip
    device.launch(store_packed, (packed.shape[0],), args, constants, warps=2)
