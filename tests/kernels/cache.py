"""Cases of cache insertion: q's norm and rotation with kv's row, plain and packed rows, padding, poisoned pages."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from atomc.codegen.device import Device
from atomc.codegen.kernels import cache
from atomc.formats import RowLayout
from tests.support.kernel_cases import Case

MAIN, INDEX_FP8 = "448:e4m3:1x64:e8m0:0.0001+64", "128:e4m3:1x128:pow2:0.0001+0"
INDEX_FP4, PLAIN = f"128:e2m1:1x32:e8m0:{6 * 2.0**-126!r}+0", "0+512"
FNUZ = "448:e4m3fnuz:1x64:e8m0:0.0001:max224+64"
INTERPRETED = "TRITON_INTERPRET" in os.environ  # NVIDIA has no FNUZ
SMALL, ODD, ROW = "12:e4m3:1x8:e8m0:0.0001+8", "6:e4m3:1x4:e8m0+2", "32:e4m3:1x*:float32+0"
BF16, F32 = torch.bfloat16, torch.float32


def pages(count: int, page: int, d: int, dtype: torch.dtype, rows: str) -> Tensor:
    """Of bytes 0xFF, NaN in every format."""
    shape = (count, RowLayout.parse(rows).page_bytes(page)) if rows else (count, page, d)
    out = torch.empty(shape, dtype=torch.uint8 if rows else dtype)
    out.view(torch.uint8).fill_(0xFF)
    return out


def spread(x: Tensor) -> Tensor:
    """Rows of very different magnitude, and one of zeros."""
    for row, factor in enumerate((1e4, 1e-6, 0.0)):
        if row + 1 < x.shape[0]:
            x[row + 1] *= factor
    return x


def step(tokens: int, page: int) -> tuple[Tensor, Tensor, Tensor]:
    """(table, requests, rows) of two requests, the second far into its ring, and a padding entry at the end."""
    first = tokens - tokens // 3
    requests = torch.tensor([0] * first + [1] * (tokens - first)).int()
    rows = torch.cat([torch.arange(first), 1000 + torch.arange(tokens - first)]).int()
    if tokens > 2:
        rows[-1] = -1
    columns = -(-tokens // page) + 1
    return (1 + torch.randperm(2 * columns)).view(2, columns).int(), requests, rows


def qk(
    tokens: int, heads: int, d: int, rd: int, page: int, dtype: torch.dtype, rows: str, slice_of: int = 0
) -> Callable[[], list[Any]]:
    def make() -> list[Any]:
        table, requests, positions = step(tokens, page)
        q, kv = spread(torch.randn(tokens, heads, d)), spread(torch.randn(tokens, d + slice_of))
        theta = torch.rand(tokens, rd // 2) * 6
        pool = pages(int(table.max()) + 1, page, d, dtype, rows)
        return [q.to(dtype), kv.to(dtype)[:, slice_of:], theta.cos(), theta.sin(), 1e-6, pool, table, requests,
                positions, rows]  # fmt: skip

    return make


def plain(tokens: int, d: int, page: int, dtype: torch.dtype, x_dtype: torch.dtype) -> Callable[[], list[Any]]:
    def make() -> list[Any]:
        table, requests, rows = step(tokens, page)
        return [pages(int(table.max()) + 1, page, d, dtype, ""), torch.randn(tokens, d).to(x_dtype), table, requests,
                rows]  # fmt: skip

    return make


def packed(tokens: int, page: int, rows: str) -> Callable[[], list[Any]]:
    def make() -> list[Any]:
        table, requests, numbers = step(tokens, page)
        layout = RowLayout.parse(rows)
        records = layout.pack(torch.randn(tokens, layout.narrow + layout.wide))
        return [pages(int(table.max()) + 1, page, 0, F32, rows), torch.cat(records, -1), table, requests, numbers, rows]

    return make


def to_pack(tokens: int, rows: str, dtype: torch.dtype) -> Callable[[], list[Any]]:
    layout = RowLayout.parse(rows)
    return lambda: [spread(torch.randn(tokens, layout.narrow + layout.wide)).to(dtype), rows]


def name_of(*parts: object) -> str:
    return " ".join(str(p).removeprefix("torch.") for p in parts)


QK = [
    (1, 2, 512, 64, 64, BF16, MAIN, 0), (7, 9, 512, 64, 2, BF16, MAIN, 64),
    *([(4, 4, 512, 64, 64, BF16, FNUZ, 0)] * INTERPRETED),
    (5, 3, 20, 8, 4, F32, SMALL, 0), (3, 1, 8, 2, 1, BF16, ODD, 0), (5, 4, 128, 64, 4, F32, "", 0),
    (6, 5, 20, 8, 3, BF16, "", 4), (4, 2, 512, 64, 64, F32, PLAIN, 0),
    (3, 2, 48, 16, 4, BF16, "32:e4m3:1x*:pow2+16", 0),
]  # fmt: skip
PACKS = [MAIN, *[FNUZ] * INTERPRETED, INDEX_FP8, INDEX_FP4, PLAIN, SMALL, ODD, ROW, "20:e2m1:1x8:e8m0+4"]
CASES = [
    *(Case(name_of("qk", *c), "qk_norm_rope_insert", cache.qk_norm_rope_insert, qk(*c), tokens=c[0], rows=c[6])
      for c in QK),
    Case("qk 333 tokens", "qk_norm_rope_insert", cache.qk_norm_rope_insert, qk(333, 64, 512, 64, 64, BF16, MAIN, 1024),
         tokens=512, rows=MAIN, slow=True),
    *(Case(name_of("insert", *c), "cache_insert", cache.cache_insert, plain(*c), tokens=c[0])
      for c in [(1, 20, 4, F32, F32), (9, 130, 2, BF16, F32), (70, 128, 64, BF16, BF16)]),
    *(Case(name_of("packed", *c), "packed_insert", cache.packed_insert, packed(*c), tokens=c[0], rows=c[2])
      for c in [(1, 64, MAIN), (9, 2, MAIN), (5, 64, INDEX_FP8), (4, 3, INDEX_FP4), (6, 1, SMALL)]),
    *(Case(name_of("pack", rows, dtype), "pack_rows", cache.pack_rows, to_pack(5, rows, dtype), tokens=5)
      for rows in PACKS for dtype in (F32, BF16)),
    Case("pack 70", "pack_rows", cache.pack_rows, to_pack(70, MAIN, BF16), tokens=128),
]  # fmt: skip


# -- ahead of time -----------------------------------------------------------------------------------------------------


def meta(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def local(device: Device, rows: str) -> str:
    """A row layout in the target's dialect of FP8."""
    return FNUZ if rows == MAIN and device.target.fp8 == "fnuz" else rows


def aot_qk(tokens: int, heads: int, rank: int, rows: str) -> Callable[[Device], Any]:
    def call(device: Device) -> Any:
        text = local(device, rows)
        pool = meta(99, 64 * 584, dtype=torch.uint8) if rows else meta(99, 64, 512, dtype=BF16)
        kv = meta(tokens, rank + 512, dtype=BF16)[:, rank:]
        angle = meta(tokens, 32, dtype=F32)
        return cache.qk_norm_rope_insert(
            device, meta(tokens, heads, 512, dtype=BF16), kv, angle, angle, 1e-6, pool, meta(64, 133), meta(tokens),
            meta(tokens), text,
        )  # fmt: skip

    return call


def aot_rest(tokens: int) -> Callable[[Device], None]:
    def call(device: Device) -> None:
        text, where = local(device, MAIN), (meta(64, 133), meta(tokens), meta(tokens))
        pool = meta(99, 64 * 584, dtype=torch.uint8)
        x = meta(tokens, 512, dtype=BF16)
        cache.packed_insert(device, pool, cache.pack_rows(device, x, text), *where, text)
        cache.cache_insert(device, meta(99, 64, 512, dtype=BF16), x, *where)
        if device.target.fp8 == "ocp":
            cache.pack_rows(device, meta(tokens, 128, dtype=BF16), INDEX_FP8)
        cache.pack_rows(device, meta(tokens, 128, dtype=BF16), INDEX_FP4)

    return call


AOT = [
    *((f"qk {model} {rows or 'plain'} {tokens}", aot_qk(tokens, heads, rank, rows))
      for model, heads, rank in (("flash", 64, 1024), ("pro", 128, 1536)) for rows in (MAIN, "")
      for tokens in (1, 16, 64, 8192)),
    *((f"pack and insert {tokens}", aot_rest(tokens)) for tokens in (1, 8192)),
]  # fmt: skip
