"""Cases of the indexer, and of the selection alone: ties, both levels, every kind of row."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from atomc.codegen.device import Device
from atomc.codegen.kernels import indexer, topk
from atomc.formats import FP4_ACTIVATION, FP8_INDEX, RowLayout
from atomc.ops.cache import gather_rows, page_rows, physical_rows
from atomc.ops.quantize import dequantize, hadamard, quantize
from atomc.ops.registry import define
from atomc.ops.rope import rope
from tests.support.kernel_cases import Case

F32, BF16 = torch.float32, torch.bfloat16
RATIO = 4
INDEX8, INDEX4 = f"128:{FP8_INDEX}+0", f"128:{FP4_ACTIVATION}+0"


@define("case_top_rows(Tensor scores, Tensor positions, int ratio, int topk) -> Tensor", tokens="scores", spec="2.7")
def case_top_rows(scores: Tensor, positions: Tensor, ratio: int, topk: int) -> Tensor:
    """The selection alone, with its promise on ties: of equal scores the lowest rows."""
    out = torch.full((scores.shape[0], topk), -1, dtype=torch.int32)
    for t, position in enumerate(positions.tolist()):
        n = min((position + 1) // ratio, scores.shape[1])
        best = torch.sort(scores[t, :n], descending=True, stable=True).indices[:topk]
        out[t, : len(best)] = best.int()
    return out


def top_rows(device: Device, scores: Tensor, positions: Tensor, ratio: int, k: int) -> Tensor:
    out = device.empty((scores.shape[0], k), torch.int32)
    t, n = scores.shape
    wide = torch.nn.functional.pad(scores, (0, topk.padded(n) - n), value=torch.nan)
    half = (t + 1) // 2  # two calls, as long contexts are scored
    for first in range(0, t, half):
        topk.top_rows(device, wide[first : first + half], positions, first, n, ratio, k, out)
    return out


def tied(t: int, n: int, kinds: int) -> Callable[[], list[Any]]:
    def make() -> list[Any]:
        scores = torch.randint(-kinds, kinds + 1, (t, n)).float() * 0.5
        scores[scores == 0] *= torch.where(torch.rand(int((scores == 0).sum())) < 0.5, -1.0, 1.0)
        scores[0, ::3], scores[-1, 1::5] = -torch.inf, 1e30
        positions = torch.randint(0, RATIO * n, (t,)).int()
        positions[0] = RATIO * n - 1
        return [scores, positions, RATIO]

    return make


def scored(t: int, n: int, kinds: int, k: int) -> Callable[[], list[Any]]:
    return lambda: [*tied(t, n, kinds)(), k]


def arguments(
    spans: list[tuple[int, int]], heads: int, d: int, k: int, dtype: torch.dtype, page: int, rows: str, layout: str,
    roped: bool = True, spare: int = 0,
) -> Callable[[], list[Any]]:  # fmt: skip
    """Requests with (first position, tokens) each; a table with `spare` more columns than any of them needs."""

    def make() -> list[Any]:
        counts = torch.tensor([n for _, n in spans])
        positions = torch.cat([torch.arange(f, f + n) for f, n in spans]).int()
        requests = torch.repeat_interleave(counts).int()
        query_start = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int()
        columns = 1 + spare + max((f + n) // RATIO for f, n in spans) // page
        table = (1 + torch.randperm(len(spans) * columns)).view(len(spans), -1).int()
        pages, known = 1 + table.numel(), RowLayout.parse(rows) if rows else None
        cache = torch.full((pages, page, d), torch.nan, dtype=dtype)
        if known:
            cache = torch.full((pages, known.page_bytes(page)), 0xFF, dtype=torch.uint8)
        for b, (f, n) in enumerate(spans):
            number = torch.arange((f + n) // RATIO)
            flat = table[b, number // page].long() * page + number % page
            keys = torch.randn(len(number), d).to(dtype)
            known.store(cache, flat, known.pack(keys)) if known else cache.view(-1, d).index_copy_(0, flat, keys)
        t = len(positions)
        theta = torch.rand(t, 8 if d < 128 else 32) * 6
        angles = [theta.cos(), theta.sin()] * roped
        weights = torch.randn(t, heads) * d**-0.5
        return [torch.randn(t, heads, d).to(dtype), *angles, weights, cache, table, requests, positions, query_start,
                RATIO, k, rows, *([layout] * roped)]  # fmt: skip

    return make


def near_ties(arguments: list[Any], found: Tensor, expected: Tensor) -> None:
    """Rows chosen by one and not by the other have scores as near as FP8 sums of 14 bits leave open."""
    q, cos, sin, weights, cache, table, requests, positions, _, _, _, rows, layout = arguments
    turned = rope(q, cos.unsqueeze(-2), sin.unsqueeze(-2), False)
    turned = dequantize(*quantize(hadamard(turned), layout), layout, q.dtype)
    for t in (found.sort(-1).values != expected.sort(-1).values).any(-1).nonzero().flatten().tolist():
        mine, right = (set(x[t].tolist()) - {-1} for x in (found, expected))
        assert len(mine) == len(right), f"token {t}: {len(mine)} rows are chosen, not {len(right)}"
        numbers = torch.arange((int(positions[t]) + 1) // RATIO)
        at = physical_rows(table, torch.full_like(numbers, int(requests[t])), numbers, page_rows(cache, rows))
        keys, query, w = gather_rows(cache, at, rows).double(), turned[t].double(), weights[t].double()
        score = (query @ keys.T).relu().T @ w
        left_open = 2.0**-12 * ((query.abs() @ keys.abs().T).T @ w.abs())  # of each row
        lowest, highest = (
            min(right, key=lambda row: score[row]),
            max(set(numbers.tolist()) - right, key=lambda r: score[r]),
        )
        for row in mine - right:
            assert score[row] + left_open[row] + left_open[lowest] >= score[lowest], f"token {t}: row {row} is too low"
        for row in right - mine:
            assert score[row] - left_open[row] - left_open[highest] <= score[highest], (
                f"token {t}: row {row} is missing"
            )


# Heads enough that no row has a product below zero with each: such rows tie at 0, and the reference takes any of them.
SPANS = [(70, 1), (9, 0), (0, 7), (200, 3), (15, 1)]
KINDS = [("", "", 16), (INDEX8, str(FP8_INDEX), 128), (INDEX4, str(FP4_ACTIVATION), 128)]
if "TRITON_INTERPRET" in os.environ:
    KINDS.append((f"128:{FP8_INDEX.fnuz()}+0", str(FP8_INDEX.fnuz()), 128))
CASES = [
    *(Case(f"top {k} of {n}, {t} tokens, {kinds} kinds", "case_top_rows", top_rows, scored(t, n, kinds, k), same=True)
      for t, n, kinds, k in [(3, 100, 2, 7), (5, 300, 1, 64), (2, 17, 100, 16), (3, 40, 3, 50), (3, 40, 0, 8),
                             (2, 5000, 40, 12), (3, 33000, 10, 24), (2, 50000, 100000, 512)]),
    *(Case(f"index {rows} {dtype} page {page}", "index_rope_topk", indexer.index_rope_topk,
           arguments(SPANS, 20, d, 12, dtype, page, rows, layout), same=True)
      for rows, layout, d in KINDS for dtype, page in ((F32, 3), (BF16, 16))),
    *(Case(f"unfused {rows} {dtype}", "index_topk", indexer.index_topk,
           arguments(SPANS, 13, d, 9, dtype, 4, rows, "", False), same=True)
      for rows, _, d in KINDS[::2] for dtype in (F32, BF16)),
    *(Case(f"prompt {rows} {k}", "index_rope_topk", indexer.index_rope_topk,
           arguments([(100, 18), (3, 5), (400, 1), (250, 4)], 20, d, k, BF16, 8, rows, layout), tokens=128, same=True)
      for rows, layout, d in KINDS for k in ((16, 40) if rows == INDEX4 else (16,))),
    Case("index rounded rows, plain queries", "index_rope_topk", indexer.index_rope_topk,
         arguments(SPANS, 64, 128, 12, BF16, 4, INDEX4, ""), same=True),
    Case("index table for a long context", "index_rope_topk", indexer.index_rope_topk,
         arguments([(300, 1), (130, 1)], 20, 128, 32, BF16, 64, INDEX4, str(FP4_ACTIVATION), spare=300), same=True),
    *(Case(f"index large {spans[0]} {rows}", "index_rope_topk", indexer.index_rope_topk,
           arguments(spans, 64, 128, 512, BF16, 64, rows, layout), tokens=tokens, same=True,
           ties=near_ties if rows == INDEX8 else None, slow=True)
      for spans, tokens in [([(9000, 1), (3000, 1), (100000, 1)], 16), ([(0, 2500), (3000, 300)], 8192)]
      for rows, layout in [(INDEX4, str(FP4_ACTIVATION)), (INDEX8, str(FP8_INDEX))]),
]  # fmt: skip


def meta(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _index(device: Device) -> None:
    t, i32, fnuz = device.tokens, torch.int32, device.target.fp8 == "fnuz"
    b, cos = min(t, 64), meta(t, 32, dtype=F32)
    fp8 = str(FP8_INDEX.fnuz() if fnuz else FP8_INDEX)
    for k in (512, 1024):
        for rows, layout in [(INDEX4, str(FP4_ACTIVATION)), (f"128:{fp8}+0", fp8), ("", "")]:
            for columns in (256, 4096):  # contexts of 64 Ki and 1 Mi tokens, in blocks of 256
                size = RowLayout.parse(rows).page_bytes(64) if rows else 0
                cache = meta(512, size, dtype=torch.uint8) if rows else meta(512, 64, 128)
                indexer.index_rope_topk(
                    device, meta(t, 64, 128), cos, cos, meta(t, 64, dtype=F32), cache, meta(b, columns, dtype=i32),
                    meta(t, dtype=i32), meta(t, dtype=i32), meta(b + 1, dtype=i32), 4, k, rows, layout,
                )  # fmt: skip


AOT = [(f"indexer {tokens}", _index) for tokens in (1, 16, 64, 8192)]
