"""Arguments of the operators that fusions make: two requests in one step, caches with what other requests left."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from atomc.passes.fuse import Fuse
from atomc.passes.pattern import Of, Spelling, parameters
from tests.support.graphs import TOKENS, apply, assert_same, by_references, randn, traced

D, HEADS, DH, RD, STREAMS, EXPERTS, TOPK = 16, 3, 12, 4, 4, 6, 2
LENGTHS = (TOKENS, 1, 5)


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def batch(tokens: int) -> dict[str, Tensor]:
    """Two requests in one step: the first has one token, the second the others; caches are poisoned with NaN."""
    split = min(1, tokens - 1)
    requests = torch.tensor([0] * split + [1] * (tokens - split), dtype=torch.int32)
    positions = torch.cat((torch.arange(split), torch.arange(8, 8 + tokens - split))).int()
    return {
        "requests": requests, "positions": positions, "query_start": ints(0, split, tokens), "slots": ints(1, 0),
        "table": ints(3, 1, 6, 2, 5, 4).view(2, 3),
    }  # fmt: skip


def cache(pages: int, rows: int, width: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(pages, rows, width).to(dtype)


def angles(n: int) -> tuple[Tensor, Tensor]:
    theta = torch.randn(n, RD // 2)
    return theta.cos(), theta.sin()


def post_inputs(t: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    return randn(t, STREAMS, D, dtype=dtype), randn(t, D, dtype=dtype), randn(t, STREAMS), randn(t, STREAMS, STREAMS)


def pair(t: int, dtype: torch.dtype) -> dict[str, Any]:
    return {"qkv": randn(t, D + DH, dtype=dtype), "q_weight": randn(D), "kv_weight": randn(DH), "eps": 1e-6}


def insertion(t: int, dtype: torch.dtype) -> dict[str, Any]:
    cos, sin = angles(t)
    b = batch(t)
    return {
        "q": randn(t, HEADS, DH, dtype=dtype), "kv": randn(t, DH, dtype=dtype), "cos": cos, "sin": sin, "eps": 1e-6,
        "cache": cache(7, 8, DH, dtype), "table": b["table"], "requests": b["requests"], "positions": b["positions"],
    }  # fmt: skip


def compressor(overlap: bool) -> Callable[[int, torch.dtype], dict[str, Any]]:
    def make(t: int, dtype: torch.dtype) -> dict[str, Any]:
        width, ring = (2 * DH, 8) if overlap else (DH, 4)
        b = batch(t)
        ends = [i for i in range(t) if (int(b["positions"][i]) + 1) % 4 == 0]
        cos, sin = angles(len(ends) + 1)
        return {
            "kv": randn(t, width), "gate": randn(t, width), "ape": randn(4, width), "state": randn(2, ring, 2, width),
            "weight": randn(DH), "eps": 1e-6, "cos": cos, "sin": sin, "cache": cache(7, 8, DH, dtype),
            "table": b["table"], "ends": ints(*ends, -1), "positions": b["positions"], "requests": b["requests"],
            "query_start": b["query_start"], "slots": b["slots"], "ratio": 4, "overlap": overlap,
        }  # fmt: skip

    return make


def indexer(t: int, dtype: torch.dtype) -> dict[str, Any]:
    cos, sin = angles(t)
    b = batch(t)
    return {
        "q": randn(t, HEADS, DH, dtype=dtype), "cos": cos, "sin": sin, "weights": torch.rand(t, HEADS),
        "cache": cache(7, 8, DH, dtype), "table": b["table"], "requests": b["requests"], "positions": b["positions"],
        "query_start": b["query_start"], "ratio": 4, "topk": 3,
    }  # fmt: skip


def attention(*absent: str) -> Callable[[int, torch.dtype], dict[str, Any]]:
    def make(t: int, dtype: torch.dtype) -> dict[str, Any]:
        cos, sin = angles(t)
        b = batch(t)
        topk = torch.stack([torch.randperm(4)[:3] for _ in range(t)]).int()
        inputs = {
            "q": randn(t, HEADS, DH, dtype=dtype), "window": cache(7, 8, DH, dtype), "window_table": b["table"],
            "cache": cache(7, 8, DH, dtype), "block_table": b["table"], "topk": topk, "sink": randn(HEADS),
            "requests": b["requests"], "positions": b["positions"], "scale": 0.3, "window_size": 6,
            "ratio": 0 if "cache" in absent else 4, "cos": cos, "sin": sin,
        }  # fmt: skip
        return {**inputs, **dict.fromkeys(absent)}

    return make


def pre(t: int, dtype: torch.dtype) -> dict[str, Any]:
    rows = 2 * STREAMS + STREAMS**2
    return {
        "h": randn(t, STREAMS, D, dtype=dtype), "fn": 0.2 * randn(rows, STREAMS * D), "base": randn(rows),
        "scale": randn(3), "weight": randn(D), "norm_eps": 1e-6, "hc_eps": 1e-3, "iters": 3,
    }  # fmt: skip


def post_pre(t: int, dtype: torch.dtype) -> dict[str, Any]:
    parts = dict(zip(("h", "y", "post", "comb"), post_inputs(t, dtype), strict=True))
    return {**pre(t, dtype), **parts}


def head(t: int, dtype: torch.dtype) -> dict[str, Any]:
    inputs = pre(t, dtype)
    del inputs["iters"]
    return {**inputs, "fn": 0.2 * randn(STREAMS, STREAMS * D), "base": randn(STREAMS), "scale": randn(1)}


def spelling_of(step: Fuse, example: dict[str, Any], dtype: torch.dtype) -> tuple[Spelling, dict[str, Any]]:
    """The spelling that takes these arguments, and all of its arguments: tensors, flags, texts and the dtype."""
    for spelling in step.spellings:
        fixed = {**spelling.fixed}
        given = {"dtype": dtype, "rows": "", "layout": "", "rotate": False, **example}
        known = {k: given[k] for k in parameters(spelling.fn) if k in given}
        tensors = all(isinstance(given.get(k), Tensor) == isinstance(v, Of) for k, v in spelling.examples.items())
        constants = all(given.get(k) == v for k, v in spelling.constants.items())
        texts = all(given.get(k) for k, v in spelling.sentinels.items() if isinstance(v, str))
        if tensors and constants and texts and all(given.get(k) == v for k, v in fixed.items()):
            return spelling, known
    raise AssertionError(f"no spelling of {step.op} takes {sorted(example)}")


def check_neighbours(
    step: Fuse, make: Callable[[int, torch.dtype], dict[str, Any]], dtype: torch.dtype, first: tuple[Fuse, ...] = ()
) -> GraphModule:
    """The operators of a spelling become one, once, and it computes and writes what they do; the fused graph."""
    spelling, known = spelling_of(step, make(TOKENS, dtype), dtype)
    tensors = [k for k, v in known.items() if isinstance(v, Tensor)]

    def plain(*values: Tensor) -> Any:
        return spelling.fn(**{**known, **dict(zip(tensors, values, strict=True))})

    gm, unfused = (traced(plain, *(known[k] for k in tensors)) for _ in range(2))
    apply(gm, *first, step, expected={step.label: 1})
    for tokens in LENGTHS:
        values = [make(tokens, dtype)[k] for k in tensors]
        copies = [v.clone() for v in values]
        assert_same(by_references(gm, *values), by_references(unfused, *copies))
        assert_same(values, copies)  # what is written, is written alike
    return gm
