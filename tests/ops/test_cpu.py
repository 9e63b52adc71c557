"""CPU kernels against the references: every operator that has one, over sizes, dtypes, padding and poisoned caches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from atomc.formats import Layout, RowLayout, dequantize
from atomc.ops import OPS

N, D, H, DH, RD, PAGE, WINDOW, RATIO, TOPK = 4, 24, 3, 20, 8, 4, 10, 4, 5
LAYOUT, ROWS, INDEX_ROWS = "e4m3:1x16:e8m0:0.0001", "12:e4m3:1x8:e8m0:0.0001+8", "16:e2m1:1x8:e8m0+0"
DTYPES = [torch.float32, torch.bfloat16]
Case = Callable[[int, torch.dtype], list[Any]]


def cpu_operators() -> set[str]:
    return {name for name, op in OPS.items() if op.cpu is not op.reference}


def angles(tokens: int) -> tuple[Tensor, Tensor]:
    theta = torch.rand(tokens, RD // 2) * 6
    return theta.cos(), theta.sin()


class Step:
    """A batch over up to three requests amid their contexts, and caches with NaN where nothing was written."""

    def __init__(self, tokens: int, dtype: torch.dtype) -> None:
        lengths = [n for n in (tokens - 2 * (tokens // 3), tokens // 3, tokens // 3) if n]
        firsts = [int(f) for f in torch.randint(0, 40, (len(lengths),))]
        self.positions = torch.cat([torch.arange(f, f + n) for f, n in zip(firsts, lengths, strict=True)]).int()
        self.requests = torch.repeat_interleave(torch.tensor(lengths)).int()
        self.query_start = torch.nn.functional.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int()
        self.slots = torch.randperm(5)[: len(lengths)].int()
        columns = -(-(60 + tokens) // PAGE)
        self.table = (1 + torch.randperm(len(lengths) * columns).view(len(lengths), -1)).int()
        self.cache = torch.full((1 + len(lengths) * columns, PAGE, DH), torch.nan, dtype=dtype)
        self.rows = torch.full_like(self.cache, torch.nan)
        for request, (first, length) in enumerate(zip(firsts, lengths, strict=True)):
            for cache, count in ((self.cache, first + length), (self.rows, (first + length) // RATIO)):
                for row in range(count):
                    cache[self.table[request, row // PAGE], row % PAGE] = torch.randn(DH, dtype=dtype)

    def ends(self) -> Tensor:
        found = ((self.positions + 1) % RATIO == 0).nonzero()[:, 0].int()
        return torch.nn.functional.pad(found, (0, 2), value=-1)


def streams(tokens: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(tokens, N, D, dtype=dtype)


def mixing(rows: int) -> list[Any]:
    return [torch.randn(rows, N * D) * (N * D) ** -0.5, torch.randn(rows), 1 + 0.3 * torch.rand(3)]


def doubly(tokens: int) -> Tensor:
    return torch.softmax(torch.randn(tokens, N, N), -1)


def hc_pre(tokens: int, dtype: torch.dtype) -> list[Any]:
    return [streams(tokens, dtype), *mixing(2 * N + N * N), 1e-6, 1e-6, 20]


def hc_post(tokens: int, dtype: torch.dtype) -> list[Any]:
    return [streams(tokens, dtype), torch.randn(tokens, D, dtype=dtype), torch.rand(tokens, N), doubly(tokens)]


def hc_pre_norm(tokens: int, dtype: torch.dtype) -> list[Any]:
    *first, eps, hc_eps, iters = hc_pre(tokens, dtype)
    return [*first, torch.randn(D), eps, hc_eps, iters]


def qk_norm_rope_insert(tokens: int, dtype: torch.dtype) -> list[Any]:
    step = Step(tokens, dtype)
    q, kv = torch.randn(tokens, H, DH, dtype=dtype), torch.randn(tokens, DH, dtype=dtype)
    return [q, kv, *angles(tokens), 1e-6, step.cache, step.table, step.requests, step.positions]


def compressor(tokens: int, dtype: torch.dtype, overlap: bool = True) -> list[Any]:
    step, width = Step(tokens, dtype), 2 * DH if overlap else DH
    ends = step.ends()
    state = torch.randn(5, 2 * RATIO if overlap else RATIO, 2, width)
    kv, gate = torch.randn(tokens, width), torch.randn(tokens, width)
    return [kv, gate, torch.randn(RATIO, width), state, torch.randn(DH), 1e-6, *angles(len(ends)), step.rows,
            step.table, ends, step.positions, step.requests, step.query_start, step.slots, RATIO, overlap,
            dtype]  # fmt: skip


def compressor_update(tokens: int, dtype: torch.dtype) -> list[Any]:
    step = Step(tokens, dtype)
    kv, gate = torch.randn(tokens, DH), torch.randn(tokens, DH)
    state = torch.randn(5, 2 * RATIO, 2, DH)
    return [state, kv, gate, step.positions, step.requests, step.query_start, step.slots]


def index(tokens: int, dtype: torch.dtype) -> list[Any]:
    step, heads = Step(tokens, dtype), 16  # many: with few, rows that no head likes tie at 0
    q, weights = torch.randn(tokens, heads, DH, dtype=dtype), torch.randn(tokens, heads)
    return [
        q,
        *angles(tokens),
        weights,
        step.rows,
        step.table,
        step.requests,
        step.positions,
        step.query_start,
        RATIO,
        TOPK,
    ]


def attention(tokens: int, dtype: torch.dtype) -> list[Any]:
    step = Step(tokens, dtype)
    visible = (step.positions + 1) // RATIO
    topk = torch.where(torch.arange(TOPK) < visible[:, None], torch.arange(TOPK), -1).int()
    q, sink = torch.randn(tokens, H, DH, dtype=dtype), torch.randn(H)
    return [q, step.cache, step.table, step.rows, step.table, topk, sink, step.requests, step.positions, 0.2, WINDOW,
            RATIO, *angles(tokens)]  # fmt: skip


def experts(tokens: int, dtype: torch.dtype) -> list[Any]:
    x, w13, w2 = torch.randn(tokens, D), torch.randn(9, 32, D) * D**-0.5, torch.randn(9, D, 16) * 0.25
    indices = torch.rand(tokens, 9).argsort(-1)[:, :3]
    return [x.to(dtype), w13.to(dtype), w2.to(dtype), indices, torch.rand(tokens, 3), 0.7]


def packed(cache: Tensor, rows: str) -> Tensor:
    """A plain cache as pages of packed rows; a row of NaN packs to bytes that decode to NaN."""
    layout = RowLayout.parse(rows)
    pages = torch.full((cache.shape[0], layout.page_bytes(cache.shape[1])), 0xFF, dtype=torch.uint8)
    flat = torch.arange(cache.shape[0] * cache.shape[1])
    layout.store(pages, flat, layout.pack(cache.flatten(0, 1)))
    return pages


def packed_insert(tokens: int, dtype: torch.dtype) -> list[Any]:
    arguments = qk_norm_rope_insert(tokens, dtype)
    arguments[5] = packed(arguments[5], ROWS)
    return [*arguments, ROWS]


def packed_compressor(tokens: int, dtype: torch.dtype) -> list[Any]:
    """Index rows: of a power of two of channels, which are rotated."""
    arguments = compressor(tokens, dtype)
    for at, width in ((0, 32), (1, 32), (2, 32), (3, 32), (4, 16), (8, 16)):
        arguments[at] = arguments[at][..., :width].contiguous()
    arguments[8] = packed(arguments[8], INDEX_ROWS)
    return [*arguments, True, INDEX_ROWS]


def packed_index(tokens: int, dtype: torch.dtype) -> list[Any]:
    arguments = index(tokens, dtype)
    arguments[0] = arguments[0][..., :16].contiguous()
    arguments[4] = packed(arguments[4][..., :16].contiguous(), "16:e4m3:1x16:pow2:0.0001+0")
    return [*arguments, "16:e4m3:1x16:pow2:0.0001+0", LAYOUT]


def packed_attention(tokens: int, dtype: torch.dtype) -> list[Any]:
    arguments = attention(tokens, dtype)
    arguments[1], arguments[3] = packed(arguments[1], ROWS), packed(arguments[3], ROWS)
    return [*arguments, ROWS]


def quantised_experts(tokens: int, dtype: torch.dtype) -> list[Any]:
    x, *rest = experts(tokens, dtype)
    return [*OPS["quantize"].reference(x, LAYOUT), *rest, LAYOUT, "e2m1:1x8:e8m0", dtype]


CASES: dict[str, Case] = {
    "rms_norm": lambda t, dtype: [torch.randn(t, D, dtype=dtype), torch.randn(D), 1e-6],
    "rms_norm_pair": lambda t, dtype: [
        torch.randn(t, D, dtype=dtype), torch.randn(D), torch.randn(t, DH, dtype=dtype), torch.randn(DH), 1e-6,
    ],
    "rope": lambda t, dtype: [torch.randn(t, H, DH, dtype=dtype), *(a.unsqueeze(1) for a in angles(t)), t % 2 == 0],
    "hc_pre": hc_pre,
    "hc_post": hc_post,
    "hc_pre_norm": hc_pre_norm,
    "hc_post_pre_norm": lambda t, dtype: [*hc_post(t, dtype), *hc_pre_norm(t, dtype)[1:]],
    "qk_norm_rope_insert": qk_norm_rope_insert,
    "compressor_pool_norm_rope_insert": compressor,
    "compressor_update": compressor_update,
    "index_rope_topk": index,
    "sparse_attention_inverse_rope": attention,
    "moe_experts": experts,
    "rms_norm_pair_quant": lambda t, dtype: [*CASES["rms_norm_pair"](t, dtype), LAYOUT],
    "hc_post_pre_norm_quant": lambda t, dtype: [*CASES["hc_post_pre_norm"](t, dtype), LAYOUT],
    "moe_experts_quant": quantised_experts,
    "sparse_attention_inverse_rope_quant": lambda t, dtype: [*packed_attention(t, dtype), 3, LAYOUT],
    "qk_norm_rope_insert packed": packed_insert,
    "compressor_pool_norm_rope_insert packed": packed_compressor,
    "index_rope_topk packed": packed_index,
    "sparse_attention_inverse_rope packed": packed_attention,
}  # fmt: skip
# What an operator writes to, decoded: rounding may tell a kernel from the reference by one code.
ROW_LAYOUTS = {"qk_norm_rope_insert packed": ROWS, "compressor_pool_norm_rope_insert packed": INDEX_ROWS}


def test_every_cpu_kernel_has_a_case() -> None:
    assert cpu_operators() == {name.split()[0] for name in CASES}


def copies(arguments: list[Any]) -> list[Any]:
    return [a.clone() if isinstance(a, Tensor) else a for a in arguments]


def compare(case: str, arguments: list[Any], dtype: torch.dtype) -> None:
    """Results and everything written are the reference's; nothing else is written."""
    name = case.split()[0]
    op = OPS[name]
    expected_args, found_args = copies(arguments), copies(arguments)
    expected, found = op.reference(*expected_args), op.cpu(*found_args)
    atol, rtol = (2e-6, 1e-5) if dtype == torch.float32 else (2e-2, 2e-2)
    for argument, a, b, c in zip(op.overload._schema.arguments, arguments, expected_args, found_args, strict=False):
        if isinstance(a, Tensor):
            if argument.name in op.mutates:
                if argument.name == "cache":
                    b[0], c[0] = 0, 0  # the reserved page takes padding
                if case in ROW_LAYOUTS:
                    close_rows(c, b, ROW_LAYOUTS[case])
                else:
                    torch.testing.assert_close(c, b, equal_nan=True, atol=atol, rtol=rtol)
            else:
                assert torch.equal(*(t.contiguous().view(torch.uint8) for t in (c, a))), f"{argument.name} was written"
    if expected is None:
        assert found is None
        return
    pairs = list(zip(expected, found, strict=True)) if isinstance(expected, tuple) else [(expected, found)]
    for _, b in pairs:
        assert b.is_contiguous()
        assert b.untyped_storage().nbytes() == b.nbytes  # a plan counts on it
    if name.endswith("_quant") and isinstance(expected, tuple):
        at = next(i for i, (a, _) in enumerate(pairs) if a.dtype == torch.float8_e4m3fn)
        values = [dequantize(*(pair[side] for pair in pairs[at : at + 2]), Layout.parse(LAYOUT)) for side in (0, 1)]
        close_codes(values[1], values[0])
        del pairs[at : at + 2]
    for a, b in pairs:
        if name == "index_rope_topk":
            a, b = a.sort(-1).values, b.sort(-1).values
        torch.testing.assert_close(b, a, atol=atol, rtol=rtol)


def close_codes(found: Tensor, expected: Tensor) -> None:
    """Almost all equal, the others the next code: inputs that differ in the last bits round apart at a boundary."""
    torch.testing.assert_close(found, expected, equal_nan=True, rtol=2.0**-2, atol=2.0**-7)
    same = (found == expected) | (found.isnan() & expected.isnan())
    assert same.float().mean() > 0.9


def close_rows(found: Tensor, expected: Tensor, rows: str) -> None:
    layout = RowLayout.parse(rows)
    flat = torch.arange(found.shape[0] * layout.rows_of(found.shape[1]))
    values = [layout.load(pages, flat) for pages in (found, expected)]
    same = (values[0] == values[1]) | (values[0].isnan() & values[1].isnan())
    assert same.float().mean() > 0.9
    spread = values[1].nan_to_num().abs().amax(-1, keepdim=True)
    assert bool(((values[0] - values[1]).nan_to_num().abs() <= 0.26 * spread).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("tokens", [1, 2, 3, 8, 33])
@pytest.mark.parametrize("name", sorted(CASES))
def test_it_agrees_with_the_reference(name: str, tokens: int, dtype: torch.dtype) -> None:
    for seed in range(4):
        torch.manual_seed(seed)
        compare(name, CASES[name](tokens, dtype), dtype)


def test_attention_without_compressed_rows_and_over_all_of_them() -> None:
    for tokens in (1, 7):
        arguments = attention(tokens, torch.float32)
        no_rows, all_rows = arguments.copy(), arguments.copy()
        no_rows[3] = no_rows[5] = all_rows[5] = None
        compare("sparse_attention_inverse_rope", no_rows, torch.float32)
        compare("sparse_attention_inverse_rope", all_rows, torch.float32)


def test_a_compressor_without_overlap_and_one_with_nothing_to_do() -> None:
    for tokens in (1, 7):
        compare("compressor_pool_norm_rope_insert", compressor(tokens, torch.float32, overlap=False), torch.float32)
    arguments = compressor(3, torch.float32)
    arguments[10] = torch.full((1,), -1, dtype=torch.int32)
    arguments[6], arguments[7] = arguments[6][:1], arguments[7][:1]
    before = arguments[8].clone()
    OPS["compressor_pool_norm_rope_insert"].cpu(*arguments)
    assert torch.equal(arguments[8][1:].nan_to_num(), before[1:].nan_to_num())


def test_long_contexts_are_scored_by_request(monkeypatch: pytest.MonkeyPatch) -> None:
    from atomc.ops import cpu

    monkeypatch.setattr(cpu, "GATHERED_KEYS", 0)
    compare("index_rope_topk", index(8, torch.float32), torch.float32)


def test_sinkhorn_is_the_references_on_hard_matrices() -> None:
    from atomc.ops.cpu import sinkhorn_
    from atomc.ops.hyper_connection import sinkhorn

    for spread in (0.1, 1.0, 4.0, 12.0):
        comb = torch.softmax(torch.randn(500, N, N) * spread, -1) + 1e-6
        expected = sinkhorn(comb.double(), 1e-6, 20).float()
        torch.testing.assert_close(sinkhorn_(comb.clone(), 1e-6, 20), expected, atol=1e-6, rtol=1e-5)


def test_cpu_kernels_are_what_torch_calls() -> None:
    x, weight = torch.randn(3, D), torch.randn(D)
    assert torch.equal(torch.ops.atom.rms_norm(x, weight, 1e-6), OPS["rms_norm"].cpu(x, weight, 1e-6))
