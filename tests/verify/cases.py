"""Arguments of the operators that compiled plans run, small and random, in a quantised model's layouts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from atomc.formats import Layout, RowLayout, quantize

T, B, D, HEADS, DH, RD, HC = 24, 2, 128, 4, 128, 32, 4
ACT = "e4m3:1x128:e8m0:0.0001"
INDEX = "e2m1:1x32:e8m0:7.052966104933725e-38"
ROWS, INDEX_ROWS = "96:e4m3:1x32:e8m0:0.0001+32", f"128:{INDEX}+0"
WINDOW, PAGE, PAGES, BLOCK, BLOCKS, RATIO, TOPK = 8, 4, 40, 16, 12, 4, 3
LIMIT, EPS = 1.5, 1e-6
TILE, MXFP4 = "e4m3:128x128:e8m0", "e2m1:1x32:e8m0"


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def batch() -> dict[str, Tensor]:
    """Two requests: one that goes on at position 20, and a new one."""
    lengths, starts = (10, 14), (20, 0)
    positions = torch.cat([torch.arange(s, s + n) for s, n in zip(starts, lengths, strict=True)]).int()
    ends = ((positions + 1) % RATIO == 0).nonzero()[:, 0].int()
    return {
        "positions": positions, "requests": torch.repeat_interleave(torch.arange(2), torch.tensor(lengths)).int(),
        "query_start": ints(0, 10, 24), "slots": ints(1, 0), "ends": ends,
        "window_table": (1 + torch.randperm(PAGES - 1))[: B * 12].view(B, 12).int(),
        "block_table": (1 + torch.randperm(BLOCKS - 1))[: B * 4].view(B, 4).int(),
    }  # fmt: skip


def angles(n: int) -> dict[str, Tensor]:
    theta = torch.rand(n, RD // 2) * 6
    return {"cos": theta.cos(), "sin": theta.sin()}


def cache(pages: int, rows: int, layout: str, width: int = DH) -> Tensor:
    """A cache full of rows, packed in a layout or plain."""
    x = torch.randn(pages * rows, width)
    if not layout:
        return x.view(pages, rows, width)
    parsed = RowLayout.parse(layout)
    packed = torch.zeros((pages, parsed.page_bytes(rows)), dtype=torch.uint8)
    parsed.store(packed, torch.arange(pages * rows), parsed.pack(x))
    return packed


def pair(*shape: int, layout: str = ACT) -> dict[str, Tensor]:
    codes, scales = quantize(torch.randn(*shape), Layout.parse(layout))
    return {"codes": codes, "scales": scales}


def hyper() -> dict[str, Any]:
    rows = 2 * HC + HC * HC
    return {
        "h": torch.randn(T, HC, D), "fn": torch.randn(rows, HC * D) / 20, "base": torch.randn(rows),
        "scale": torch.ones(3), "norm_eps": EPS, "hc_eps": EPS, "iters": 20,
    }  # fmt: skip


def post() -> dict[str, Any]:
    return {"y": torch.randn(T, D), "post": torch.rand(T, HC), "comb": torch.rand(T, HC, HC)}


def compressor(layout: str, rotate: bool) -> dict[str, Any]:
    b = batch()
    n = len(b["ends"])
    return {
        "kv": torch.randn(T, 2 * DH), "gate": torch.randn(T, 2 * DH), "ape": torch.randn(RATIO, 2 * DH),
        "state": torch.randn(2, 2 * RATIO, 2, 2 * DH), "weight": 1 + torch.randn(DH) / 4, "eps": EPS, **angles(n),
        "cache": cache(BLOCKS, BLOCK // RATIO, layout), "table": b["block_table"], "ends": b["ends"],
        "positions": b["positions"], "requests": b["requests"], "query_start": b["query_start"], "slots": b["slots"],
        "ratio": RATIO, "overlap": True, "dtype": torch.float32, "rotate": rotate, "rows": layout,
    }  # fmt: skip


def attention(layout: str, topk: bool) -> dict[str, Any]:
    b = batch()
    return {
        "q": torch.randn(T, HEADS, DH), "window": cache(PAGES, PAGE, layout), "window_table": b["window_table"],
        "cache": cache(BLOCKS, BLOCK // RATIO, layout), "block_table": b["block_table"],
        "topk": torch.stack([torch.randperm(3) for _ in range(T)]).int() if topk else None,
        "sink": torch.randn(HEADS), "requests": b["requests"], "positions": b["positions"], "scale": 0.3,
        "window_size": WINDOW, "ratio": RATIO, **angles(T), "rows": layout,
    }  # fmt: skip


def index(layout: str, rows: str) -> dict[str, Any]:
    b = batch()
    return {
        "q": torch.randn(T, HEADS, DH), **angles(T), "weights": torch.randn(T, HEADS),
        "cache": cache(BLOCKS, BLOCK // RATIO, rows), "table": b["block_table"], "requests": b["requests"],
        "positions": b["positions"], "query_start": b["query_start"], "ratio": RATIO, "topk": TOPK, "rows": rows,
        "layout": layout,
    }  # fmt: skip


def insert(layout: str) -> dict[str, Any]:
    b = batch()
    return {
        "q": torch.randn(T, HEADS, DH), "kv": torch.randn(T, DH), **angles(T), "eps": EPS,
        "cache": cache(PAGES, PAGE, layout), "table": b["window_table"], "requests": b["requests"],
        "positions": b["positions"], "rows": layout,
    }  # fmt: skip


def experts() -> dict[str, Any]:
    weights = {"w13": torch.randn(6, 2 * D, D) / 8, "w2": torch.randn(6, D, D) / 8}
    chosen = torch.stack([torch.randperm(6)[:3] for _ in range(T)])
    return {**weights, "indices": chosen, "weights": torch.rand(T, 3), "limit": LIMIT}


def scaled(*shape: int, rows: int, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """A product of quantised operands [..., 256] and [rows, 256]."""
    x, w = pair(*shape, 256), pair(rows, 256, layout=TILE)
    return {
        **x, "weight": w["codes"], "weight_scales": w["scales"], "layout": ACT, "weight_layout": TILE, "dtype": dtype,
    }  # fmt: skip


def scaled_experts(layout: str) -> dict[str, Any]:
    """Experts whose weights stay packed."""
    w13, w2 = (pair(6, n * D, D, layout=layout) for n in (2, 1))
    weights = {"w13": w13["codes"], "w13_scales": w13["scales"], "w2": w2["codes"], "w2_scales": w2["scales"]}
    routes = {name: experts()[name] for name in ("indices", "weights", "limit")}
    layouts = {"layout": ACT, "inner_layout": ACT, "w13_layout": layout, "w2_layout": layout, "dtype": torch.float32}
    return {**pair(T, D), **weights, **routes, **layouts}


ANGLES = """v0 = aten.to.dtype(a0, float32)
v1 = aten.unsqueeze.default(v0, -1)
v2 = aten.mul.Tensor(v1, a1)
v3 = aten.cos.default(v2)
v4 = aten.sin.default(v2)
return v3, v4,"""
GATHER = """v0 = aten.index.Tensor(a0, [a1])
return v0,"""
ADD = """v0 = aten.to.dtype(a0, float32)
v1 = aten.add.Tensor(a1, v0)
v2 = aten.to.dtype(v1, KIND)
return v2,"""


def pointwise(program: str, *inputs: Tensor) -> dict[str, Any]:
    return {"inputs": list(inputs), "sizes": [], "program": program}


CASES: dict[str, tuple[str, Callable[[], dict[str, Any]]]] = {
    "rms_norm": ("rms_norm", lambda: {"x": torch.randn(T, D), "weight": torch.randn(D), "eps": EPS}),
    "rms_norm_pair_quant": (
        "rms_norm_pair_quant",
        lambda: {"q": torch.randn(T, D), "q_weight": torch.randn(D), "kv": torch.randn(T, D),
                 "kv_weight": torch.randn(D), "eps": EPS, "layout": ACT},
    ),
    "hc_post_pre_norm": ("hc_post_pre_norm", lambda: hyper() | post() | {"weight": torch.randn(D)}),
    "hc_post_pre_norm_quant": (
        "hc_post_pre_norm_quant", lambda: hyper() | post() | {"weight": torch.randn(D), "layout": ACT},
    ),
    "hc_head_norm": (
        "hc_head_norm",
        lambda: {"h": torch.randn(T, HC, D), "fn": torch.randn(HC, HC * D) / 20, "base": torch.randn(HC),
                 "scale": torch.ones(1), "weight": torch.randn(D), "norm_eps": EPS, "hc_eps": EPS},
    ),
    "rope": ("rope", lambda: {"x": torch.randn(T, D), **angles(T), "inverse": False}),
    "insert": ("qk_norm_rope_insert", lambda: insert("")),
    "insert packed": ("qk_norm_rope_insert", lambda: insert(ROWS)),
    "compressor": ("compressor_pool_norm_rope_insert", lambda: compressor("", False)),
    "compressor packed": ("compressor_pool_norm_rope_insert", lambda: compressor(ROWS, False)),
    "compressor index": ("compressor_pool_norm_rope_insert", lambda: compressor(INDEX_ROWS, True)),
    "update": (
        "compressor_update",
        lambda: {k: compressor("", False)[k] for k in ("state", "kv", "gate", "positions", "requests", "query_start",
                                                       "slots")},
    ),
    "index": ("index_rope_topk", lambda: index("", "")),
    "index packed": ("index_rope_topk", lambda: index(INDEX, INDEX_ROWS)),
    "attention": ("sparse_attention_inverse_rope", lambda: attention("", True)),
    "attention packed": (
        "sparse_attention_inverse_rope_quant", lambda: attention(ROWS, False) | {"groups": 2, "layout": ACT},
    ),
    "route_topk": (
        "route_topk",
        lambda: {"logits": torch.randn(T, 8), "bias": torch.randn(8) / 4, "k": 3, "scale": 1.5, "eps": 1e-20},
    ),
    "route_hash": (
        "route_hash",
        lambda: {"logits": torch.randn(T, 8), "ids": torch.randint(0, 32, (T,)).int(),
                 "tid2eid": torch.randint(0, 8, (32, 3)).int(), "scale": 1.5, "eps": 1e-20},
    ),
    "experts": ("moe_experts", lambda: experts() | {"x": torch.randn(T, D)}),
    "experts packed": (
        "moe_experts_quant",
        lambda: experts() | pair(T, D) | {"layout": ACT, "inner_layout": ACT, "dtype": torch.float32},
    ),
    "swiglu_quant": (
        "swiglu_quant", lambda: {"gate": torch.randn(T, D), "up": torch.randn(T, D), "limit": LIMIT, "layout": ACT},
    ),
    "hc_post": ("hc_post", lambda: post() | {"h": torch.randn(T, HC, D)}),
    "linear_fp32": ("linear_fp32", lambda: {"x": torch.randn(T, 256), "weight": torch.randn(48, 256)}),
    "scaled": ("scaled_linear", lambda: scaled(T, rows=144)),
    "scaled grouped": ("scaled_grouped_output", lambda: scaled(T, 2, rows=160)),
    "scaled experts packed": ("scaled_moe_experts", lambda: scaled_experts(MXFP4)),
    "scaled experts packed fp8": ("scaled_moe_experts", lambda: scaled_experts(TILE)),
    "pointwise angles": ("pointwise", lambda: pointwise(ANGLES, torch.arange(5000, 5000 + T).int(), torch.rand(16))),
    "pointwise gather": ("pointwise", lambda: pointwise(GATHER, torch.randn(T, D), torch.randint(0, T, (9,)).int())),
    "pointwise add": ("pointwise", lambda: pointwise(ADD, torch.randn(T, D), torch.randn(T, D))),
    "quantize": ("quantize", lambda: {"x": torch.randn(T, D), "layout": ACT}),
    "quantize fp4": ("quantize", lambda: {"x": torch.randn(T, D), "layout": INDEX}),
    "dequantize": (
        "dequantize", lambda: pair(256, 200, layout="e4m3:128x128:e8m0")
        | {"layout": "e4m3:128x128:e8m0", "dtype": torch.float32},
    ),
    "dequantize fp4": (
        "dequantize",
        lambda: pair(3, 64, 96, layout="e2m1:1x32:e8m0") | {"layout": "e2m1:1x32:e8m0", "dtype": torch.float32},
    ),
    "dequantize channel": (
        "dequantize",
        lambda: pair(64, 96, layout="e4m3:1x*:float32") | {"layout": "e4m3:1x*:float32", "dtype": torch.float32},
    ),
    "pack_rows": ("pack_rows", lambda: {"x": torch.randn(T, DH), "rows": ROWS}),
    "hadamard": ("hadamard", lambda: {"x": torch.randn(T, DH)}),
}  # fmt: skip


# Float arguments that a plan in bfloat16 has in bfloat16; a compressor pools in float32.
IN_16_BITS = frozenset(("h", "y", "x", "q", "kv", "gate", "up", "cache", "window", "w13", "w2"))
POOLED = frozenset(("kv", "gate"))


def held(name: str, argument: str, value: Any, dtype: torch.dtype) -> Any:
    """An argument of an operator as a plan in `dtype` has it."""
    if isinstance(value, torch.dtype):
        return dtype
    if argument == "program":
        return value.replace("KIND", str(dtype).removeprefix("torch."))
    if argument == "inputs" and value[0].dim() == 2:  # the first, of what is gathered or added
        return [value[0].to(dtype), *value[1:]]
    ours = argument in IN_16_BITS and not (name.startswith("compressor") and argument in POOLED)
    return value.to(dtype) if ours and isinstance(value, Tensor) and value.dtype == torch.float32 else value


def arguments(case: str, dtype: torch.dtype = torch.float32) -> tuple[str, dict[str, Any]]:
    """Operator as a plan names it, and arguments by name in the order of its schema, of a model in `dtype`."""
    from atomc.ops import OPS

    name, make = CASES[case]
    made = make()
    order = [a.name for a in OPS[name].overload._schema.arguments]
    return f"atom.{name}.default", {n: held(name, n, made[n], dtype) for n in order if n in made}
