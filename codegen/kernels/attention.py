"""Attention over window rows and compressed rows with a sink, inverse RoPE and quantisation (spec 2.4, 6.1 K15-K17).

A program has one token, a block of its heads and a share of its rows: the last WINDOW positions, then the compressed
rows that it sees or that were selected, BN at a time, each row read once and used as key and as value. Where a token's
rows are split over programs, their partial results are joined by a second kernel. SWAP exchanges the operands of both
products (rows and channels become the long dim M of the matrix instruction), so that few heads still fill it. Packed
rows have kernels of their own where reading them ahead pays (`attention_records`), and where whole tokens fill a
machine whose warps may have tasks of their own (`attention_apart`).
Illegal: cache rows of another element than e4m3 (`row_constants`); layouts of a result that `quantize` does not write.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from atomc.codegen.device import Device, cdiv
from atomc.codegen.kernels.attention_parts import finish, leave, reach
from atomc.codegen.kernels.attention_records import attend_shares, attend_tokens, group_of
from atomc.codegen.kernels.cache import (
    fetch_part,
    page_constants,
    part_values,
    row_constants,
)
from atomc.codegen.kernels.common import ASM
from atomc.codegen.kernels.quantize import empty_pair, quantize
from atomc.formats import Layout

LOG2E = 1.4426950408889634

# -- in a kernel -------------------------------------------------------------------------------------------------------


@triton.jit
def _zeros(PARTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A tuple of PARTS accumulators."""
    out = ()
    for _ in tl.static_range(PARTS):
        out = out + (tl.zeros((ROWS, COLUMNS), tl.float32),)  # noqa: RUF005
    return out


@triton.jit
def _load_query(q, t, h, H: tl.constexpr, D: tl.constexpr, N: tl.constexpr, PARTS: tl.constexpr, SWAP: tl.constexpr):
    """Heads h of q [T, H, D] in parts of N channels: [BH, N], or [N, BH]."""
    out = ()
    for j in tl.static_range(PARTS):
        c = j * N + tl.arange(0, N)
        if SWAP:
            at = t.to(tl.int64) * (H * D) + h[None, :] * D + c[:, None]
            x = tl.load(q + at, mask=(h < H)[None, :] & (c < D)[:, None], other=0.0)
        else:
            at = t.to(tl.int64) * (H * D) + h[:, None] * D + c[None, :]
            x = tl.load(q + at, mask=(h < H)[:, None] & (c < D)[None, :], other=0.0)
        out = out + (x,)  # noqa: RUF005
    return out


@triton.jit
def _rows(
    block, live, near_table, far_table, topk, turn, columns, first, position, near_blocks, far, visible,
    BN: tl.constexpr, CODE: tl.constexpr, CACHED: tl.constexpr, TOPK: tl.constexpr, WINDOW_PAGE: tl.constexpr,
    PAGE: tl.constexpr,
):  # fmt: skip
    """Numbers page x CODE + row in it [BN] of a block's rows, -1 where there is none.

    Tables and topk are the token's own; from page `turn` on the window's is at its beginning again, `columns` before.
    """
    is_near = block < near_blocks
    row = tl.where(is_near, first + block * BN, (block - near_blocks) * BN) + tl.arange(0, BN)
    ok = live & (row < tl.where(is_near, position + 1, far))
    column = row // WINDOW_PAGE
    entry, within = near_table + tl.where(column >= turn, column - columns, column), row % WINDOW_PAGE
    if CACHED:
        chosen = row
        if TOPK > 0:
            chosen = tl.load(topk + row, mask=ok & (is_near == 0), other=-1)
            ok = ok & (is_near | ((chosen >= 0) & (chosen < visible)))
        entry = tl.where(is_near, entry, far_table + chosen // PAGE)
        within = tl.where(is_near, within, chosen % PAGE)
    page = tl.load(entry, mask=ok, other=0)
    return tl.where(ok, page * CODE + within, -1)


@triton.jit
def _address(
    flat, is_near, CODE: tl.constexpr, CACHED: tl.constexpr, ALIGN: tl.constexpr, WINDOW_PAGE: tl.constexpr,
    WINDOW_SIZE: tl.constexpr, PAGE: tl.constexpr, PAGE_SIZE: tl.constexpr, RECORD: tl.constexpr, SCALES: tl.constexpr,
):  # fmt: skip
    """Where rows [BN] begin in their pool, and their scales: in bytes, or in elements of a plain one."""
    page, row = flat // CODE, flat % CODE
    size, body = WINDOW_SIZE, WINDOW_PAGE * RECORD  # a page begins with its records, then come its scales
    if CACHED and (WINDOW_SIZE != PAGE_SIZE or WINDOW_PAGE != PAGE):
        size, body = tl.where(is_near, size, PAGE_SIZE), tl.where(is_near, body, PAGE * RECORD)
    at = page.to(tl.int64) * size + row * RECORD
    scale_at = page.to(tl.int64) * size + body + row * SCALES
    return tl.multiple_of(at, ALIGN), scale_at  # which a choice of two hides from the compiler


@triton.jit
def _weigh(parts, ok, m, z, KIND: tl.constexpr, SCALE2: tl.constexpr, PARTS: tl.constexpr, SWAP: tl.constexpr):
    """Scores [BH, BN] (or [BN, BH]) -> (p of the same shape, what earlier results shrink by, maximum, sum) [BH]."""
    s = parts[0] * SCALE2
    for j in tl.static_range(1, PARTS):
        s += parts[j] * SCALE2
    across: tl.constexpr = 0 if SWAP else 1
    valid = ok[:, None] if SWAP else ok[None, :]
    s = tl.where(valid, s, float("-inf"))
    top = tl.maximum(m, tl.max(s, across))
    p = tl.exp2(s - (top[None, :] if SWAP else top[:, None]))
    shrink = tl.exp2(m - top)
    return p.to(KIND), shrink, top, z * shrink + tl.sum(p, across)


# -- kernels -----------------------------------------------------------------------------------------------------------


@triton.jit
def attend(
    q, window, window_table, cache, block_table, topk, sink, requests, positions, cos, sin, out, scales, part, stats,
    window_columns, block_columns,
    H: tl.constexpr, RD: tl.constexpr, SCALE2: tl.constexpr, WINDOW: tl.constexpr, RATIO: tl.constexpr,
    CACHED: tl.constexpr, TOPK: tl.constexpr, BH: tl.constexpr, BN: tl.constexpr, SPLITS: tl.constexpr,
    SWAP: tl.constexpr, N: tl.constexpr, PARTS: tl.constexpr, ALIGN: tl.constexpr, WINDOW_PAGE: tl.constexpr,
    WINDOW_SIZE: tl.constexpr, PAGE: tl.constexpr, PAGE_SIZE: tl.constexpr, QUANT: tl.constexpr, FLOOR: tl.constexpr,
    TOP: tl.constexpr, QSCALE: tl.constexpr, D: tl.constexpr, PACKED: tl.constexpr, NARROW: tl.constexpr,
    GROUP: tl.constexpr, BODY: tl.constexpr, SCALES: tl.constexpr, ELEMENT: tl.constexpr, SCALE: tl.constexpr,
):  # fmt: skip
    """One share of the rows for a block of heads of one token, q [T, H, D]; finished here where SPLITS is 1."""
    blocks: tl.constexpr = (H + BH - 1) // BH
    split, h = tl.program_id(0) % SPLITS, (tl.program_id(0) // SPLITS) % blocks * BH + tl.arange(0, BH)
    t = tl.program_id(0) // (SPLITS * blocks)
    kind: tl.constexpr = q.dtype.element_ty
    request, position = tl.load(requests + t), tl.load(positions + t)
    query = _load_query(q, t, h, H, D, N, PARTS, SWAP)
    acc = _zeros(PARTS, N if SWAP else BH, BH if SWAP else N)
    # The sink begins the sum, in the first share; as a maximum it keeps every share's finite.
    logit = tl.load(sink + h, mask=h < H, other=0.0) * 1.4426950408889634
    m = tl.maximum(logit, -1e30)
    z = tl.where(split == 0, tl.exp2(logit - m), 0.0)

    chosen = topk + t.to(tl.int64) * TOPK if TOPK > 0 else topk
    first, far, visible = reach(position, chosen, WINDOW, RATIO, CACHED, TOPK)
    near_blocks = tl.cdiv(position + 1 - first, BN)
    total = near_blocks + tl.cdiv(far, BN)
    share = tl.cdiv(total, SPLITS)
    begin, end = split * share, tl.minimum(split * share + share, total)
    CODE: tl.constexpr = triton.next_power_of_2(WINDOW_PAGE if WINDOW_PAGE > PAGE else PAGE)
    lap = (first // WINDOW_PAGE) // window_columns * window_columns  # a window laps its ring at most once
    near_table, turn = window_table + request * window_columns - lap, lap + window_columns
    far_table = block_table + request * block_columns

    flat = _rows(begin, begin < end, near_table, far_table, chosen, turn, window_columns, first, position, near_blocks,
                 far, visible, BN, CODE, CACHED, TOPK, WINDOW_PAGE, PAGE)  # fmt: skip
    for block in tl.range(begin, end, disable_licm=True):
        if TOPK == 0:
            flat = _rows(block, True, near_table, far_table, chosen, turn, window_columns, first, position, near_blocks,
                         far, visible, BN, CODE, CACHED, TOPK, WINDOW_PAGE, PAGE)  # fmt: skip
        pages = tl.multiple_of(tl.where(block < near_blocks, window, cache), 16) if CACHED else window
        row_at, scale_at = _address(flat, block < near_blocks, CODE, CACHED, ALIGN, WINDOW_PAGE, WINDOW_SIZE, PAGE,
                                    PAGE_SIZE, BODY if PACKED else D, SCALES)  # fmt: skip
        used = flat >= 0
        s, rows = (), ()
        for j in tl.static_range(PARTS):
            stored = fetch_part(pages, row_at, scale_at, used, j, N, D, PACKED, NARROW, GROUP, BODY, SCALE)
            x = part_values(stored, kind, j, N, PACKED, NARROW, GROUP, ELEMENT, SCALE)
            if SWAP:
                s = s + (tl.dot(x, query[j], input_precision="ieee"),)  # noqa: RUF005
            else:
                s = s + (tl.dot(query[j], tl.trans(x), input_precision="ieee"),)  # noqa: RUF005
            rows = rows + (x,)  # noqa: RUF005
        if TOPK > 0:  # two loads lead to a selected row: ahead of time
            flat = _rows(block + 1, block + 1 < end, near_table, far_table, chosen, turn, window_columns, first,
                         position, near_blocks, far, visible, BN, CODE, CACHED, TOPK, WINDOW_PAGE, PAGE)  # fmt: skip
        p, shrink = tl.zeros(s[0].shape, kind), tl.zeros_like(m)
        if position >= 0:  # always; but two products in a row would have each warp group compute all scores
            p, shrink, m, z = _weigh(s, used, m, z, kind, SCALE2, PARTS, SWAP)
        more = ()
        for j in tl.static_range(PARTS):
            if SWAP:
                a = tl.dot(tl.trans(rows[j]), p, acc[j] * shrink[None, :], input_precision="ieee")
            else:
                a = tl.dot(p, rows[j], acc[j] * shrink[:, None], input_precision="ieee")
            more = more + (a,)  # noqa: RUF005
        acc = more

    o = acc
    if SWAP:
        o = ()
        for j in tl.static_range(PARTS):
            o = o + (tl.trans(acc[j]),)  # noqa: RUF005
    if SPLITS == 1:
        finish(o, 1.0 / z, t, h, cos, sin, out, scales, H, D, N, PARTS, RD, kind, QUANT, FLOOR, TOP, QSCALE)
    else:
        leave(o, m, z, part, stats, (t.to(tl.int64) * SPLITS + split) * H + h, h < H, begin < end, D, N, PARTS)


@triton.jit
def join(
    part, stats, cos, sin, out, scales, H: tl.constexpr, BH: tl.constexpr, SPLITS: tl.constexpr, D: tl.constexpr,
    DP: tl.constexpr, RD: tl.constexpr, KIND: tl.constexpr, QUANT: tl.constexpr, FLOOR: tl.constexpr,
    TOP: tl.constexpr, QSCALE: tl.constexpr,
):  # fmt: skip
    """The shares of a block of heads of one token: part [T, SPLITS, H, D], their maxima and sums [T, SPLITS, H, 2]."""
    blocks: tl.constexpr = (H + BH - 1) // BH
    t, h = tl.program_id(0) // blocks, tl.program_id(0) % blocks * BH + tl.arange(0, BH)
    c = tl.arange(0, DP)
    s = tl.arange(0, triton.next_power_of_2(SPLITS))
    has = (s < SPLITS)[:, None] & (h < H)[None, :]
    at = (t.to(tl.int64) * SPLITS + s)[:, None] * H + h[None, :]
    m = tl.load(stats + 2 * at, mask=has, other=float("-inf"))
    z = tl.load(stats + 2 * at + 1, mask=has, other=0.0)
    top = tl.where(h < H, tl.max(m, 0), 0.0)
    total = tl.sum(z * tl.exp2(m - top[None, :]), 0)
    acc = tl.zeros((BH, DP), tl.float32)
    for i in tl.static_range(SPLITS):
        one = (t.to(tl.int64) * SPLITS + i) * H + h
        sum_i = tl.load(stats + 2 * one + 1, mask=h < H, other=0.0)
        weight = tl.exp2(tl.load(stats + 2 * one, mask=h < H, other=0.0) - top)
        used = (sum_i != 0)[:, None] & (c < D)[None, :]  # a share without rows has written nothing
        acc += tl.load(part + one[:, None] * D + c[None, :], mask=used, other=0.0) * weight[:, None]
    wide: tl.constexpr = tl.float32 if KIND == "float32" else tl.float16
    kind: tl.constexpr = tl.bfloat16 if KIND == "bfloat16" else wide
    factor = 1.0 / tl.where(h < H, total, 1.0)
    finish((acc,), factor, t, h, cos, sin, out, scales, H, D, DP, 1, RD, kind, QUANT, FLOOR, TOP, QSCALE)


# -- host functions ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """Heads, rows and channels at a time of a program; whether the products' operands are exchanged; warps."""

    heads: int
    rows: int
    width: int
    swap: bool
    warps: int


# By the target's instruction set: few heads a program, where tokens are few; many, as many as registers hold.
FEW = {"sm_90": Config(16, 32, 512, False, 8), "sm_100": Config(16, 64, 256, True, 8),
       "gfx950": Config(16, 64, 256, True, 4), "gfx942": Config(16, 64, 256, True, 4)}  # fmt: skip
MANY = {"sm_90": Config(64, 64, 256, False, 8), "sm_100": Config(64, 64, 512, False, 8),
        "gfx950": Config(64, 32, 512, False, 4), "gfx942": Config(64, 32, 512, False, 4)}  # fmt: skip
# Where packed rows are read ahead (`attention_records`, which has all channels at a time): few heads a program, many.
AHEAD = {"sm_90": (Config(16, 16, 512, False, 4), Config(64, 64, 512, False, 8))}
# Where warps have tasks of their own (`attention_apart`): registers of a thread that multiplies, widens, looks up.
APART = {"MOST": 200, "SOME": 72, "FEW": 40}
EXACT = Config(16, 16, 128, False, 4)  # float32 has no matrix instruction of its precision: the reference's numbers


def configure(device: Device, heads: int, dtype: torch.dtype, group: int, cached: bool) -> Config:
    """The configuration of a bucket; `group`: of rows that are read ahead, else 0; `cached`: more rows than a window's.

    Tensor cores are busier with many heads a program, and the machine is sooner full with few.
    """
    if dtype == torch.float32:
        return EXACT
    programs, units = device.tokens * cdiv(heads, 64), device.target.compute_units
    if group:
        return AHEAD[device.target.arch][heads > 16 and programs > units // (64 if cached else 8)]
    few = heads <= 16 or programs <= units // 32
    return (FEW if few else MANY)[device.target.arch]


def splits_of(device: Device, config: Config, heads: int, near: int, far: int) -> int:
    """Over how many programs a token's rows, at most `near` + `far`, are spread: the machine filled once."""
    programs = device.tokens * cdiv(heads, config.heads)
    blocks = cdiv(near, config.rows) + cdiv(far, config.rows)
    splits = max(1, min(device.target.compute_units // programs, blocks, 32))
    return cdiv(blocks, cdiv(blocks, splits))  # no more than have a block when each has as many


def sparse_attention(
    device: Device, q: Tensor, window: Tensor, window_table: Tensor, cache: Tensor | None, block_table: Tensor,
    topk: Tensor | None, sink: Tensor, requests: Tensor, positions: Tensor, scale: float, window_size: int, ratio: int,
    rows: str = "",
) -> Tensor:  # fmt: skip
    """See `atomc.ops.attention.sparse_attention`."""
    return sparse_attention_inverse_rope(
        device, q, window, window_table, cache, block_table, topk, sink, requests, positions, scale, window_size,
        ratio, None, None, rows,
    )  # fmt: skip


def sparse_attention_inverse_rope(
    device: Device, q: Tensor, window: Tensor, window_table: Tensor, cache: Tensor | None, block_table: Tensor,
    topk: Tensor | None, sink: Tensor, requests: Tensor, positions: Tensor, scale: float, window_size: int, ratio: int,
    cos: Tensor | None, sin: Tensor | None, rows: str = "",
) -> Tensor:  # fmt: skip
    """See `atomc.ops.attention.sparse_attention_inverse_rope`."""
    out = device.empty(q.shape, q.dtype)
    args = {"q": q, "window": window, "window_table": window_table, "cache": cache, "block_table": block_table,
            "topk": topk, "sink": sink, "requests": requests, "positions": positions, "cos": cos, "sin": sin,
            "out": out, "scales": None}  # fmt: skip
    quant = {"QUANT": 0, "FLOOR": 0.0, "TOP": 1.0, "QSCALE": ""}
    _attention(device, args, scale, window_size, ratio, rows, quant)
    return out


def sparse_attention_inverse_rope_quant(
    device: Device, q: Tensor, window: Tensor, window_table: Tensor, cache: Tensor | None, block_table: Tensor,
    topk: Tensor | None, sink: Tensor, requests: Tensor, positions: Tensor, scale: float, window_size: int, ratio: int,
    cos: Tensor, sin: Tensor, rows: str, groups: int, layout: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See `atomc.ops.attention.sparse_attention_inverse_rope_quant`, in one kernel where heads have whole groups."""
    known, (tokens, heads, d) = Layout.parse(layout), q.shape
    k, group = heads * d // groups, known.columns
    inside = group > 0 and group & (group - 1) == 0 and d % group == 0 and k % group == 0
    if not inside or known.element.name not in ("e4m3", "e4m3fnuz"):
        o = sparse_attention_inverse_rope(
            device, q, window, window_table, cache, block_table, topk, sink, requests, positions, scale, window_size,
            ratio, cos, sin, rows,
        )  # fmt: skip
        return quantize(device, o.view(tokens, groups, k), layout)
    codes, scales = empty_pair(device, (tokens, groups, k), layout)
    args = {"q": q, "window": window, "window_table": window_table, "cache": cache, "block_table": block_table,
            "topk": topk, "sink": sink, "requests": requests, "positions": positions, "cos": cos, "sin": sin,
            "out": codes, "scales": scales}  # fmt: skip
    quant = {"QUANT": group, "FLOOR": known.floor, "TOP": known.top, "QSCALE": known.scale}
    _attention(device, args, scale, window_size, ratio, rows, quant)
    return codes, scales


def _in_pieces(q: Tensor, shared: dict[str, Any]) -> bool:
    """Whether `attend_tokens` may finish in pieces, as `attend_apart` does: inverses of scales are bf16 values, and
    shapes as there.
    """
    whole = q.shape[-1] == 8 * shared["RD"] == 4 * shared["QUANT"]
    return whole and shared["QSCALE"] == "e8m0" and q.dtype == torch.bfloat16


def _attention(
    device: Device, args: dict[str, Any], scale: float, window_size: int, ratio: int, rows: str, quant: dict[str, Any]
) -> None:
    """Launch `attend`, and `join` where rows are split."""
    q, cache, topk = args["q"], args["cache"], args["topk"]
    tokens, heads, d = q.shape
    near = page_constants(args["window"], rows)
    far = page_constants(cache, rows) if cache is not None else {"PAGE": 1, "PAGE_SIZE": 0}
    page_sizes = (near["PAGE_SIZE"], far["PAGE_SIZE"])
    group = group_of(rows, q.dtype, page_sizes) if device.target.arch in AHEAD else 0
    config = configure(device, heads, q.dtype, group, cache is not None)
    chosen = topk.shape[1] if topk is not None else 0
    columns = args["block_table"].shape[1]
    most = (chosen or columns * far["PAGE"]) if cache is not None else 0
    row = row_constants(rows, d)
    shared = {"H": heads, "RD": 2 * args["cos"].shape[-1] if args["cos"] is not None else 0, **quant}
    apart = config.heads == 64 and _apart(device, q, group, row["NARROW"], shared)
    splits = splits_of(device, config, heads, window_size, most)
    if apart and cache is None and device.tokens >= 64:  # two blocks: a second kernel costs more than they do
        splits = 1
    part = device.empty((tokens, splits, heads, d), torch.float32) if splits > 1 else None
    stats = device.empty((tokens, splits, heads, 2), torch.float32) if splits > 1 else None
    padded = row.pop("DP")
    shared["SPLITS"] = splits
    constants = {**shared, **row, **far, "SCALE2": scale * LOG2E, "WINDOW": window_size, "RATIO": max(ratio, 1),
                 "CACHED": cache is not None, "TOPK": chosen, "BH": config.heads, "BN": config.rows,
                 "WINDOW_PAGE": near["PAGE"], "WINDOW_SIZE": near["PAGE_SIZE"]}  # fmt: skip
    given = {**args, "part": part, "stats": stats, "window_columns": args["window_table"].shape[1],
             "block_columns": columns}  # fmt: skip
    programs = tokens * cdiv(heads, config.heads)
    if apart and splits == 1:
        _attend_apart(device, given, constants, programs)
    elif group:
        constants |= {"GROUP": group, "LOG": (d // group).bit_length() - 1, "PIECES": _in_pieces(q, shared)}
        _attend_records(device, given, constants, programs, config)
    else:
        width = min(padded, max(config.width, quant["QUANT"]))  # a part has whole groups of what is written
        align = gcd(16, *page_sizes, row["BODY"] if rows else d)
        constants |= {"SWAP": config.swap, "N": width, "PARTS": padded // width, "ALIGN": align}
        device.launch(attend, (programs * splits,), given, constants, warps=config.warps, stages=1)
    if splits > 1:
        block = 1 if device.tokens <= 4 else 4
        given = {"part": part, "stats": stats, **{k: args[k] for k in ("cos", "sin", "out", "scales")}}
        kind = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}[q.dtype]
        constants = {**shared, "BH": block, "D": d, "DP": padded, "KIND": kind}
        device.launch(join, (tokens * cdiv(heads, block),), given, constants)


def _apart(device: Device, q: Tensor, group: int, narrow: int, shared: dict[str, Any]) -> bool:
    """Whether `attend_apart` has the rows and the result."""
    rows = (q.shape[-1], narrow, group) == (512, 448, 64)
    return ASM and device.target.arch == "sm_90" and rows and shared["TOP"] == 448 and _in_pieces(q, shared)


def _attend_apart(device: Device, given: dict[str, Any], constants: dict[str, Any], items: int) -> None:
    """Launch `attend_apart` for so many blocks of heads of tokens: a program has a whole multiprocessor."""
    from atomc.codegen.kernels.attention_apart import attend_apart  # of a layer of Triton that not every backend has

    names = ("H", "SCALE2", "WINDOW", "RATIO", "CACHED", "TOPK", "WINDOW_PAGE", "WINDOW_SIZE", "PAGE", "PAGE_SIZE",
             "FLOOR", "NARROW", "BODY")  # fmt: skip
    args = {k: v for k, v in given.items() if k not in ("part", "stats")} | {"items": items}
    kept = {name: constants[name] for name in names} | APART
    programs = min(device.target.compute_units, device.tokens * cdiv(constants["H"], 64))
    device.launch(attend_apart, (programs,), args, kept, warps=4)


def _attend_records(
    device: Device, given: dict[str, Any], constants: dict[str, Any], items: int, config: Config
) -> None:
    """Launch one of the kernels of `attention_records` for so many blocks of heads of tokens."""
    dropped = {"PACKED", "SCALES", "SCALE"}  # what `group_of` has made sure of
    if constants["SPLITS"] > 1:
        dropped |= {"RD", "QUANT", "FLOOR", "TOP", "QSCALE", "PIECES"}
        given = {k: v for k, v in given.items() if k not in ("cos", "sin", "out", "scales")}
        kept = {k: v for k, v in constants.items() if k not in dropped}
        device.launch(attend_shares, (items * kept["SPLITS"],), given, kept, warps=config.warps, stages=1)
        return
    dropped |= {"SPLITS"}
    at_once = 1 if config.heads >= 64 else 3  # programs that a multiprocessor has registers for
    programs = min(device.target.compute_units * at_once, device.tokens * cdiv(constants["H"], config.heads))
    kept = {k: v for k, v in constants.items() if k not in dropped}
    given = {k: v for k, v in given.items() if k not in ("part", "stats")} | {"items": items}
    device.launch(attend_tokens, (programs,), given, kept | {"PROGRAMS": programs}, warps=config.warps, stages=1)
