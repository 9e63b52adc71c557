"""What is fused with quantisation: each spelling is found, computes the same, and its near misses are left alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from atomc.formats import Layout, RowLayout, quantize
from atomc.passes import fusions, quant_fusions
from atomc.passes.fuse import Fuse
from tests.support.fusion_cases import (
    DH,
    EXPERTS,
    HEADS,
    TOPK,
    D,
    attention,
    check_neighbours,
    compressor,
    indexer,
    insertion,
    pair,
    post_pre,
)  # fmt: skip
from tests.support.graphs import TOKENS, apply, operators, randn, text, traced

ACT, INNER, WEIGHT, FP4 = "e4m3:1x8:e8m0:0.0001", "e2m1:1x4:e8m0", "e4m3:4x8:e8m0", "e2m1:1x8:e8m0"
ROWS, INDEX_ROWS = "8:e4m3:1x4:e8m0:0.0001+4", "16:e2m1:1x8:e8m0+0"
Case = dict[str, Any]
atom = torch.ops.atom


def packed_cache(cache: Tensor, rows: str) -> Tensor:
    """A plain cache's rows, packed."""
    layout = RowLayout.parse(rows)
    pages = torch.zeros(cache.shape[0], layout.page_bytes(cache.shape[1]), dtype=torch.uint8)
    layout.store(pages, torch.arange(cache.shape[0] * cache.shape[1]), layout.pack(cache.flatten(0, 1)))
    return pages


def in_rows(make: Callable[[int, torch.dtype], Case], *caches: str, rows: str = ROWS) -> Any:
    """The case with packed caches."""

    def packed(t: int, dtype: torch.dtype) -> Case:
        case = make(t, dtype)
        return {**case, **{name: packed_cache(case[name], rows) for name in caches}, "rows": rows}

    return packed


def index_rows(make: Callable[[int, torch.dtype], Case]) -> Callable[[int, torch.dtype], Case]:
    """Index rows: of 16 channels, rotated."""

    def rotated(t: int, dtype: torch.dtype) -> Case:
        case = make(t, dtype)
        wide = {k: randn(*case[k].shape[:-1], 32) for k in ("kv", "gate", "ape", "state")}
        cache = packed_cache(randn(7, 8, 16, dtype=dtype), INDEX_ROWS)
        return {**case, **wide, "weight": randn(16), "cache": cache, "rows": INDEX_ROWS, "rotate": True}

    return rotated


def index_queries(layout: str) -> Callable[[int, torch.dtype], Case]:
    def make(t: int, dtype: torch.dtype) -> Case:
        case = indexer(t, dtype)
        cache = packed_cache(randn(7, 8, 16, dtype=dtype), INDEX_ROWS)
        q = randn(t, HEADS, 16, dtype=dtype)
        return {**case, "q": q, "cache": cache, "rows": INDEX_ROWS, "layout": layout}

    return make


def quantised(t: int, width: int, layout: str, *lead: int) -> dict[str, Any]:
    codes, scales = quantize(randn(t, *lead, width), Layout.parse(layout))
    return {"codes": codes, "scales": scales, "layout": layout}


def packed_weight(*shape: int, layout: str = WEIGHT, name: str = "weight") -> dict[str, Any]:
    codes, scales = quantize(randn(*shape) * 0.3, Layout.parse(layout))
    return {name: codes, f"{name}_scales": scales, f"{name}_layout": layout}


def routed(t: int) -> dict[str, Any]:
    indices = torch.stack([torch.randperm(EXPERTS)[:TOPK] for _ in range(t)])
    return {"indices": indices, "weights": torch.rand(t, TOPK), "limit": 0.7, "inner_layout": INNER}


def experts(t: int, dtype: torch.dtype) -> Case:
    w13, w2 = (0.3 * randn(EXPERTS, n, k, dtype=dtype) for n, k in ((16, D), (D, 8)))
    return {**quantised(t, D, ACT), "w13": w13, "w2": w2, **routed(t)}


def scaled_experts(t: int, dtype: torch.dtype) -> Case:
    weights = {**packed_weight(EXPERTS, 16, D, name="w13"), **packed_weight(EXPERTS, D, 8, layout=FP4, name="w2")}
    return {**quantised(t, D, ACT), **weights, **routed(t)}


def rms_pair(t: int, dtype: torch.dtype) -> Case:
    case = pair(t, dtype)
    qkv = case.pop("qkv")
    return {**case, "q": qkv[:, :D].contiguous(), "kv": qkv[:, D:].contiguous(), "layout": ACT}


def grouped_attention(*absent: str) -> Callable[[int, torch.dtype], Case]:
    make = in_rows(attention(*absent), "window", *(() if "cache" in absent else ("cache",)))
    return lambda t, dtype: {**make(t, dtype), "groups": 3, "layout": ACT}


CASES: dict[str, tuple[Fuse, Callable[[int, torch.dtype], Case], list[str]]] = {
    "norm pair": (quant_fusions.RMS_NORM_PAIR_QUANT, rms_pair, ["atom.rms_norm_pair_quant", *["getitem"] * 3]),
    "post, pre, norm": (
        quant_fusions.HC_POST_PRE_NORM_QUANT, lambda t, dtype: {**post_pre(t, dtype), "layout": ACT},
        ["atom.hc_post_pre_norm_quant", *["getitem"] * 6],
    ),
    "swiglu": (
        quant_fusions.SWIGLU_QUANT,
        lambda t, dtype: {k: randn(t, D, dtype=dtype) for k in ("gate", "up")} | {"limit": 0.7, "layout": ACT},
        ["atom.swiglu_quant", *["getitem"] * 2],
    ),
    "experts": (quant_fusions.MOE_EXPERTS_QUANT, experts, ["atom.moe_experts_quant"]),
    "window rows": (fusions.QK_NORM_ROPE_INSERT, in_rows(insertion, "cache"), ["atom.qk_norm_rope_insert"]),
    "csa rows": (fusions.COMPRESSOR, in_rows(compressor(True), "cache"), ["atom.compressor_pool_norm_rope_insert"]),
    "hca rows": (fusions.COMPRESSOR, in_rows(compressor(False), "cache"), ["atom.compressor_pool_norm_rope_insert"]),
    "index rows": (fusions.COMPRESSOR, index_rows(compressor(True)), ["atom.compressor_pool_norm_rope_insert"]),
    "index queries": (fusions.INDEX_ROPE_TOPK, index_queries(ACT), ["atom.index_rope_topk"]),
    "plain index queries": (fusions.INDEX_ROPE_TOPK, index_queries(""), ["atom.index_rope_topk"]),
    "attention": (
        fusions.ATTENTION_INVERSE_ROPE, in_rows(attention(), "window", "cache"), ["atom.sparse_attention_inverse_rope"],
    ),
    "scaled linear": (
        quant_fusions.SCALED_LINEAR, lambda t, dtype: {**quantised(t, D, ACT), **packed_weight(12, D)},
        ["atom.scaled_linear"],
    ),
    "scaled groups": (
        quant_fusions.SCALED_GROUPED_OUTPUT, lambda t, dtype: {**quantised(t, D, ACT, 2), **packed_weight(12, D)},
        ["atom.scaled_grouped_output"],
    ),
}  # fmt: skip
GROUPED = ["atom.sparse_attention_inverse_rope_quant", *["getitem"] * 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_explicit_rounding_becomes_part_of_an_operator(name: str, dtype: torch.dtype) -> None:
    step, make, golden = CASES[name]
    gm = check_neighbours(step, make, dtype)
    assert operators(gm) == golden


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("absent", [(), ("topk",), ("topk", "cache")], ids=["csa", "hca", "swa"])
def test_attention_with_its_output_in_groups(absent: tuple[str, ...], dtype: torch.dtype) -> None:
    gm = check_neighbours(quant_fusions.ATTENTION_INVERSE_ROPE_QUANT, grouped_attention(*absent), dtype)
    assert operators(gm) == GROUPED


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_packed_experts(dtype: torch.dtype) -> None:
    gm = check_neighbours(quant_fusions.SCALED_MOE_EXPERTS, scaled_experts, dtype)
    assert operators(gm) == ["atom.scaled_moe_experts"]


def test_every_operator_fused_with_rounding_is_tested_here() -> None:
    tested = {step.op for step, _, _ in CASES.values()} | {"sparse_attention_inverse_rope_quant", "scaled_moe_experts"}
    assert {v.op for v in vars(quant_fusions).values() if isinstance(v, Fuse)} <= tested


# -- near misses -------------------------------------------------------------------------------------------------------


def swiglu_read_twice(gate: Tensor, up: Tensor) -> tuple[Tensor, ...]:
    x = atom.swiglu(gate, up, 0.7)
    return *atom.quantize(x, ACT), x


def norm_read_twice(q: Tensor, kv: Tensor) -> tuple[Tensor, ...]:
    qn, kvn = atom.rms_norm_pair(q, torch.ones(D), kv, torch.ones(DH), 1e-6)
    return *atom.quantize(qn, ACT), qn, kvn


def weight_after_the_product(
    codes: Tensor, scales: Tensor, w13: Tensor, w2: Tensor, indices: Tensor, weights: Tensor
) -> Any:
    """The routing weight after w2: equal in exact arithmetic, not once what enters w2 is rounded (spec 2.8)."""
    x = atom.dequantize(codes, scales, ACT, torch.float32)
    gate, up = atom.grouped_linear(x, w13, indices).chunk(2, dim=-1)
    a = F.silu(gate.float().clamp(max=0.7)) * up.float().clamp(min=-0.7, max=0.7)
    a = atom.dequantize(*atom.quantize(a, INNER), INNER, torch.float32)
    return (atom.grouped_linear(a, w2, indices).float() * weights.unsqueeze(-1)).sum(dim=1)


def two_layouts(codes: Tensor, scales: Tensor, weight: Tensor, weight_scales: Tensor) -> Tensor:
    """The input is expanded in bfloat16, the weight in float32: no one product of codes."""
    x = atom.dequantize(codes, scales, ACT, torch.bfloat16).float()
    return F.linear(x, atom.dequantize(weight, weight_scales, WEIGHT, torch.float32))


PACKED = ("codes", "scales", "weight", "weight_scales")


def _tensors(case: Case, *names: str) -> list[Tensor]:
    return [case[name] for name in names]


NEAR: dict[str, tuple[Fuse, Callable[..., Any], Callable[[], list[Tensor]]]] = {
    "swiglu read in full too": (quant_fusions.SWIGLU_QUANT, swiglu_read_twice, lambda: [randn(TOKENS, D)] * 2),
    "norm read in full too": (
        quant_fusions.RMS_NORM_PAIR_QUANT, norm_read_twice, lambda: [randn(TOKENS, D), randn(TOKENS, DH)],
    ),
    "routing weight after w2": (
        quant_fusions.MOE_EXPERTS_QUANT, weight_after_the_product,
        lambda: _tensors(experts(TOKENS, torch.float32), "codes", "scales", "w13", "w2", "indices", "weights"),
    ),
    "expanded in two dtypes": (
        quant_fusions.SCALED_LINEAR, two_layouts,
        lambda: _tensors({**quantised(TOKENS, D, ACT), **packed_weight(12, D)}, *PACKED),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NEAR)
def test_what_is_nearly_an_operator_is_left_alone(name: str) -> None:
    step, fn, make = NEAR[name]
    inputs = make()
    gm, untouched = (traced(fn, *inputs) for _ in range(2))
    apply(untouched)
    apply(gm, step, expected={step.label: 0})
    assert text(gm) == text(untouched)


def test_one_pair_feeds_several_products() -> None:
    """A pair expanded once for three readers: each takes the codes themselves, if its weight is whole."""
    tensors = [
        t
        for case in (quantised(TOKENS, D, ACT), packed_weight(12, D), packed_weight(8, D))
        for t in list(case.values())[:2]
    ]

    def three(codes: Tensor, scales: Tensor, a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor) -> list[Tensor]:
        x = atom.dequantize(codes, scales, ACT, torch.float32)
        weights = [atom.dequantize(*pair, WEIGHT, torch.float32) for pair in ((a, a_scales), (b, b_scales))]
        return [F.linear(x, weights[0]), F.linear(x, weights[1]), F.linear(x, weights[0][:4])]

    gm = traced(three, *tensors)
    apply(gm, quant_fusions.SCALED_LINEAR, expected={"fuse_scaled_linear": 2})
    assert operators(gm).count("atom.scaled_linear") == 2
    assert operators(gm).count("aten.linear") == 1  # a part of a weight is no packed weight
