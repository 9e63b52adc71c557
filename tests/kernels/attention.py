"""Cases of sparse attention: SWA, HCA, CSA over packed and plain caches, split and not, poisoned pages, odd shapes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from atomc.codegen.device import Device
from atomc.codegen.kernels import attention
from atomc.formats import RowLayout
from tests.kernels.cache import BF16, F32, FNUZ, INTERPRETED, MAIN, PLAIN, SMALL, local, meta, name_of, pages
from tests.support.kernel_cases import Case, as_on

TINY = "16:e4m3:1x16:e8m0:0.0001+16"  # the least that is read ahead
FP8, FNUZ_FP8 = "e4m3:1x128:e8m0:0.0001", "e4m3fnuz:1x128:e8m0:0.0001:max224"


class Paged:
    """A pool of pages of which each request has some, in any order; rows that were never written are NaN."""

    def __init__(self, held: list[range], page: int, columns: int, d: int, dtype: torch.dtype, rows: str) -> None:
        """held: the logical rows that each request still has; the table is a ring of `columns` pages."""
        self.table = torch.zeros(len(held), columns, dtype=torch.int32)
        order = iter((1 + torch.randperm(len(held) * columns)).tolist())
        self.pool = pages(1 + len(held) * columns, page, d, dtype, rows)
        for request, span in enumerate(held):
            for logical in range(span.start // page, -(-span.stop // page)):
                self.table[request, logical % columns] = next(order)
            flat = torch.tensor([int(self.table[request, r // page % columns]) * page + r % page for r in span])
            values = torch.randn(len(span), d)
            if rows and len(span):
                layout = RowLayout.parse(rows)
                layout.store(self.pool, flat, layout.pack(values))
            elif len(span):
                self.pool.view(-1, d)[flat] = values.to(dtype)


def arguments(
    spans: list[range], heads: int, d: int, rd: int, dtype: torch.dtype, rows: str, window: int, page: int,
    ratio: int, block: int, topk: int, tail: tuple[Any, ...] = (),
) -> Callable[[], list[Any]]:  # fmt: skip
    """Of a step over the positions `spans` of the requests; block: rows of a compressed page; topk 0: HCA."""

    def make() -> list[Any]:
        positions = torch.cat([torch.arange(s.start, s.stop) for s in spans]).int()
        requests = torch.repeat_interleave(torch.tensor([len(s) for s in spans])).int()
        longest = max(len(s) for s in spans)
        near = Paged([range(max(0, s.start - window + 1), s.stop) for s in spans], page,
                     -(-(window + longest - 1) // page) + 1, d, dtype, rows)  # fmt: skip
        far = selected = None
        table = torch.zeros(len(spans), 1, dtype=torch.int32)
        if ratio:
            width = -(-max(s.stop for s in spans) // (ratio * block)) + 1
            far = Paged([range(s.stop // ratio) for s in spans], block, width, d, dtype, rows)
            table = far.table
        if topk:
            visible = (positions.long() + 1) // ratio
            selected = torch.full((len(positions), topk), -1, dtype=torch.int32)
            for t, n in enumerate(visible.tolist()):  # anywhere among the columns, for padding may stand anywhere
                some = torch.randperm(n)[:topk].int()
                selected[t, torch.randperm(topk)[: len(some)].sort().values] = some
        # bf16 probabilities are off by 2^-9: enough to move a few percent of FP8 codes. There, one row leads.
        sharp = 8 if tail and dtype == BF16 else 1
        q = torch.randn(len(positions), heads, d) * (1 + 3 * torch.rand(len(positions), 1, 1)) * sharp
        sink = torch.randn(heads)
        sink[:3] = torch.tensor([-1e4, 30.0, -torch.inf])[:heads]
        if all(
            s.stop == 1 for s in spans
        ):  # one row and no sink: p is 1, and results are exact, as float32 scales need
            sink[:] = -1e4
        theta = torch.rand(len(positions), max(rd, 2) // 2) * 6
        angles = [theta.cos(), theta.sin()] if rd else []
        given = [q.to(dtype), near.pool, near.table, far.pool if far else None, table, selected, sink, requests,
                 positions, d**-0.5, window, ratio, *angles]  # fmt: skip
        return [*given, rows, *tail]

    return make


def case(name: str, tokens: int, *shape: Any, target: str = "", **more: Any) -> Case:
    """`shape` as `arguments` takes it; the last says what is done with the result."""
    tail = shape[11] if len(shape) > 11 else ()
    op = "sparse_attention_inverse_rope" if shape[3] else "sparse_attention"
    op = "sparse_attention_inverse_rope_quant" if tail else op
    host = as_on(target, getattr(attention, op)) if target else getattr(attention, op)
    layouts = tail[1:]
    return Case(name_of(name, shape[1], shape[4]), op, host, arguments(*shape), tokens, layouts, **more)


SHORT, MIXED, DECODE = [range(1)], [range(3, 8), range(40, 42), range(1)], [range(37, 38), range(200, 201)]
CASES = [
    # name, bucket, spans, heads, d, rd, dtype, rows, window, page, ratio, block, topk, (groups, layout)
    case("first token", 1, SHORT, 3, 20, 8, F32, SMALL, 10, 4, 0, 1, 0),
    case("swa fp32", 4096, MIXED, 3, 20, 8, F32, "", 10, 4, 0, 1, 0),
    case("hca fp32", 4096, MIXED, 5, 48, 16, F32, "", 16, 8, 4, 2, 0),
    case("csa fp32", 64, MIXED, 17, 20, 8, F32, SMALL, 10, 4, 4, 4, 5),
    case("no rotation", 64, MIXED, 3, 20, 0, F32, "", 10, 4, 4, 4, 5),
    case("csa fp32 quant", 4096, MIXED, 3, 20, 8, F32, SMALL, 10, 4, 4, 4, 5, (3, "e4m3:1x4:e8m0:0.0001")),
    case("groups across heads", 4096, MIXED, 4, 20, 8, BF16, SMALL, 10, 4, 4, 4, 5, (2, "e4m3:1x8:e8m0:0.0001")),
    case("scale of a row", 64, SHORT * 5, 4, 32, 8, BF16, "", 10, 4, 4, 4, 5, (2, "e4m3:1x*:float32")),
    case("float32 scales", 64, SHORT * 5, 4, 32, 8, BF16, "", 10, 4, 4, 4, 5, (2, "e4m3:1x16:float32")),
    case("mxfp4", 64, MIXED, 4, 32, 8, F32, "", 10, 4, 4, 4, 5, (2, "e2m1:1x32:e8m0")),
    case("swa split", 1, DECODE, 4, 512, 64, BF16, MAIN, 128, 64, 0, 1, 0, (2, FP8)),
    case("csa split", 1, DECODE, 20, 512, 64, BF16, MAIN, 128, 64, 4, 64, 96, (4, FP8)),
    case("hca split", 1, DECODE, 4, 512, 64, BF16, MAIN, 128, 64, 8, 2, 0, (4, FP8)),
    case("csa", 4096, DECODE, 64, 512, 64, BF16, MAIN, 128, 64, 4, 64, 32, (8, FP8)),
    case("hca bf16 rows", 4096, DECODE, 40, 512, 64, BF16, "", 128, 64, 8, 16, 0),
    *([case("csa fnuz", 4096, DECODE, 8, 512, 64, BF16, FNUZ, 128, 64, 4, 64, 32, (8, FNUZ_FP8))] * INTERPRETED),
    case("csa split exchanged", 1, DECODE, 20, 512, 64, BF16, MAIN, 128, 64, 4, 64, 96, (4, FP8), target="mi355x"),
    case("hca exchanged", 4096, DECODE, 4, 512, 64, BF16, "", 128, 64, 8, 2, 0, target="mi300x"),
    case("mi355x", 4096, DECODE, 64, 512, 64, BF16, MAIN, 128, 64, 4, 64, 32, (8, FP8), target="mi355x"),
    case("rows bf16 of fp32", 4096, [range(9, 10)], 2, 512, 64, F32, PLAIN, 16, 8, 4, 4, 0),
    case("nano", 64, MIXED, 4, 128, 64, BF16, "64:e4m3:1x64:e8m0:0.0001+64", 64, 32, 4, 64, 32, (2, FP8)),
    # tasks for warps on sm_90 (the interpreter has the other kernels), as "csa" and "long csa" have them
    case("swa whole", 64, DECODE, 64, 512, 64, BF16, MAIN, 128, 64, 0, 1, 0, (8, FP8), slow=True),
    case("many hca whole", 4096, [range(60), range(100, 250)], 20, 512, 64, BF16, MAIN, 128, 64, 8, 2, 0, (4, FP8),
         slow=True),
    # more tokens than programs: each goes on to another one
    case("many csa", 4096, [range(60), range(30, 104)], 17, 32, 4, BF16, TINY, 8, 2, 4, 2, 3,
         (2, "e4m3:1x8:e8m0:0.0001")),
    case("many hca", 4096, [range(40, 180)], 20, 32, 8, BF16, TINY, 8, 4, 8, 2, 0, slow=True),
    case("long hca", 64, [range(5000 * i, 5000 * i + 8) for i in range(6)], 64, 512, 64, BF16, MAIN, 128, 64, 128, 2, 0,
         (8, FP8), slow=True),
    case("long csa", 512, [range(300), range(3000, 3050)], 128, 512, 64, BF16, MAIN, 128, 64, 4, 64, 512, (16, FP8),
         slow=True),
    case("long csa plain", 16, [range(9000, 9008)], 128, 512, 64, BF16, "", 128, 64, 4, 64, 1024, slow=True),
]  # fmt: skip


# -- ahead of time -----------------------------------------------------------------------------------------------------


def aot(tokens: int, heads: int, groups: int, topk: int, ratio: int, rows: str) -> Callable[[Device], Any]:
    def call(device: Device) -> Any:
        def pool(page: int) -> Tensor:
            return meta(99, page * 584, dtype=torch.uint8) if rows else meta(99, page, 512, dtype=BF16)

        angle = meta(tokens, 32, dtype=F32)
        given = (
            meta(tokens, heads, 512, dtype=BF16), pool(64), meta(64, 133), pool(256 // ratio) if ratio else None,
            meta(64, 512), meta(tokens, topk) if topk else None, meta(heads, dtype=F32), meta(tokens), meta(tokens),
            512**-0.5, 128, ratio, angle, angle,
        )  # fmt: skip
        if not rows:
            return attention.sparse_attention_inverse_rope(device, *given, "")
        layout = FNUZ_FP8 if device.target.fp8 == "fnuz" else FP8
        return attention.sparse_attention_inverse_rope_quant(device, *given, local(device, rows), groups, layout)

    return call


AOT = [
    (name_of(model, kind, rows or "plain", tokens), aot(tokens, heads, groups, topk * (ratio == 4), ratio, rows))
    for model, heads, groups, topk in (("flash", 64, 8, 512), ("pro", 128, 16, 1024))
    for kind, ratio in (("swa", 0), ("csa", 4), ("hca", 128))
    for rows in (MAIN, "")
    for tokens in (1, 16, 64, 8192)
]  # fmt: skip
