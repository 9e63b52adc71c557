"""Cases of the compressors: windows that complete in a step, in pages of every kind, and the ring."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from atomc.codegen.device import Device
from atomc.codegen.kernels import compressor
from atomc.formats import FP4_ACTIVATION, FP8_INDEX, FP8_ROW_CHANNELS, RowLayout
from tests.support.kernel_cases import Case

F32, BF16 = torch.float32, torch.bfloat16
MAIN, INDEX8, INDEX4 = f"448:{FP8_ROW_CHANNELS}+64", f"128:{FP8_INDEX}+0", f"128:{FP4_ACTIVATION}+0"
FNUZ = [f"448:{FP8_ROW_CHANNELS.fnuz()}+64"] * ("TRITON_INTERPRET" in os.environ)


@dataclass
class Step:
    """Requests with (first position, tokens) each; ends of the windows of `ratio`, with padding."""

    spans: list[tuple[int, int]]
    ratio: int

    def __post_init__(self) -> None:
        counts = torch.tensor([n for _, n in self.spans])
        self.positions = torch.cat([torch.arange(f, f + n) for f, n in self.spans]).int()
        self.requests = torch.repeat_interleave(counts).int()
        self.query_start = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int()
        self.slots = (1 + torch.randperm(len(self.spans) + 1))[: len(self.spans)].int()
        found = ((self.positions + 1) % self.ratio == 0).nonzero()[:, 0].int()
        self.ends = torch.nn.functional.pad(found, (0, 2), value=-1)

    def where(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.positions, self.requests, self.query_start, self.slots


def projections(step: Step, w: int, size: float = 1.0) -> tuple[Tensor, Tensor]:
    t = len(step.positions)
    return torch.randn(t, w) * size, torch.randn(t, w) * size


def ring(step: Step, r: int, w: int) -> Tensor:
    """State with NaN where a request has no token."""
    state = torch.full((len(step.spans) + 2, r, 2, w), torch.nan)
    for slot, (first, _) in zip(step.slots.tolist(), step.spans, strict=True):
        for p in range(max(first - r, 0), first):
            state[slot, p % r] = torch.randn(2, w)
    return state


def insert(
    spans: list[tuple[int, int]], d: int, rd: int, ratio: int, overlap: bool, dtype: torch.dtype, rotate: bool = False,
    rows: str = "", page: int = 4, size: float = 1.0,
) -> Callable[[], list[Any]]:  # fmt: skip
    def make() -> list[Any]:
        step = Step(spans, ratio)
        w, r = (2 * d, 2 * ratio) if overlap else (d, ratio)
        columns = 1 + max((f + n) // ratio for f, n in spans) // page
        table = (1 + torch.randperm(len(spans) * columns)).view(len(spans), -1).int()
        pages = 1 + table.numel()
        cache = torch.full((pages, page, d), torch.nan, dtype=dtype)
        if rows:
            cache = torch.full((pages, RowLayout.parse(rows).page_bytes(page)), 0xFF, dtype=torch.uint8)
        theta = torch.rand(len(step.ends), rd // 2) * 6
        return [*projections(step, w, size), torch.randn(ratio, w), ring(step, r, w), torch.randn(d), 1e-6, theta.cos(),
                theta.sin(), cache, table, step.ends, *step.where(), ratio, overlap, dtype, rotate, rows]  # fmt: skip

    return make


def update(spans: list[tuple[int, int]], r: int, w: int) -> Callable[[], list[Any]]:
    def make() -> list[Any]:
        step = Step(spans, 4)
        return [ring(step, r, w), *projections(step, w), *step.where()]

    return make


def merged(host: Callable[..., Any], at: int) -> Callable[..., Any]:
    """The host function given kv and gate as columns of one product."""

    def run(device: Device, *args: Any) -> Any:
        kv, gate = args[at], args[at + 1]
        both = torch.cat((kv, gate), dim=1)
        return host(device, *args[:at], both[:, : kv.shape[1]], both[:, kv.shape[1] :], *args[at + 2 :])

    return run


OP = "compressor_pool_norm_rope_insert"
MIXED = [(0, 9), (5, 0), (3, 1), (10, 2), (2, 7)]  # a fresh prompt, nothing, a decode that completes, one that does not
POOL = merged(compressor.compressor_pool_norm_rope_insert, 0)
UPDATE = merged(compressor.compressor_update, 1)
CASES = [
    *(Case(f"plain {d} {dtype} {overlap}", OP, POOL, insert(spans, d, rd, 4, overlap, dtype))
      for spans, d, rd in [(MIXED, 20, 8), ([(3, 1)], 512, 64), (MIXED, 128, 64)] for dtype in (F32, BF16)
      for overlap in (True, False)),
    *(Case(f"rotated {dtype}", OP, POOL, insert(MIXED, 32, 8, 4, True, dtype, True)) for dtype in (F32, BF16)),
    *(Case(f"packed {rows} {dtype} {size}", OP, POOL,
           insert(MIXED, d, 64, 4, True, dtype, rotate, rows, size=size), rows=rows)
      for rows, d, rotate in [(MAIN, 512, False), (INDEX8, 128, True), (INDEX4, 128, True), ("0+512", 512, False),
                              *((r, 512, False) for r in FNUZ)]
      for dtype in (F32, BF16) for size in (1.0, 30.0)),
    Case("packed small", OP, POOL, insert(MIXED, 20, 8, 4, True, F32, rows="12:e4m3:1x8:e8m0:0.0001+8", page=3),
         rows="12:e4m3:1x8:e8m0:0.0001+8"),
    *(Case(f"long window {d} {ratio} {rows}", OP, POOL,
           insert([(0, 300), (127, 1), (200, 5), (90, 70)], d, rd, ratio, False, dtype, rows=rows, page=2), rows=rows)
      for d, rd, ratio, rows, dtype in [(24, 8, 32, "", F32), (512, 64, 128, MAIN, BF16), (512, 64, 128, "", F32)]),
    *(Case(f"update {r} {w}", "compressor_update", UPDATE, update(MIXED, r, w))
      for r, w in [(8, 40), (4, 24), (8, 1024)]),
    Case("update prompt", "compressor_update", UPDATE, update([(0, 70), (7, 3), (5, 40)], 32, 24), tokens=128),
    *(Case(f"large {d} {ratio}", OP, POOL,
           insert([(0, 2000), (500, 700), (1000, 1)], d, 64, ratio, ratio == 4, BF16, rotate, rows, page),
           rows=rows, tokens=4096, slow=True)
      for d, ratio, rotate, rows, page in [
          (512, 4, False, MAIN, 64), (128, 4, True, INDEX4, 64), (512, 128, False, MAIN, 2)]),
]  # fmt: skip


def meta(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _compressors(device: Device) -> None:
    t, i32 = device.tokens, torch.int32
    b, fnuz = min(t, 64), device.target.fp8 == "fnuz"
    main = f"448:{FP8_ROW_CHANNELS.fnuz() if fnuz else FP8_ROW_CHANNELS}+64"
    index8 = f"128:{FP8_INDEX.fnuz() if fnuz else FP8_INDEX}+0"
    for d, ratio, rotate, rows in [
        (512, 4, False, main), (512, 4, False, ""), (128, 4, True, INDEX4), (128, 4, True, index8),
        (128, 4, False, ""), (512, 128, False, main), (512, 128, False, "0+512"),
    ]:  # fmt: skip
        overlap = ratio == 4
        w, r = (2 * d, 8) if overlap else (d, ratio)
        both = meta(t, 2 * w, dtype=F32)
        kv, gate, n, page = both[:, :w], both[:, w:], max(t // ratio, 1) + b, 256 // ratio
        where = [meta(t, dtype=i32), meta(t, dtype=i32), meta(b + 1, dtype=i32), meta(b, dtype=i32)]
        state = meta(b, r, 2, w, dtype=F32)
        cache = meta(64, RowLayout.parse(rows).page_bytes(page), dtype=torch.uint8) if rows else meta(64, page, d)
        compressor.compressor_pool_norm_rope_insert(
            device, kv, gate, meta(ratio, w, dtype=F32), state, meta(d, dtype=F32), 1e-6, meta(n, 32, dtype=F32),
            meta(n, 32, dtype=F32), cache, meta(b, 512, dtype=i32), meta(n, dtype=i32), *where, ratio, overlap, BF16,
            rotate, rows,
        )  # fmt: skip
        compressor.compressor_update(device, state, kv, gate, *where)


AOT = [(f"compressors {tokens}", _compressors) for tokens in (1, 16, 64, 8192)]
