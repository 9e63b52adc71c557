"""Every fused operator: its spelling is found, and its reference computes what the plain operations compute."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from atomc.models.deepseek_v4 import layers, moe
from atomc.models.deepseek_v4.hyper_connection import HyperConnection, HyperHead, Residual
from atomc.ops import OPS
from atomc.passes import fusions
from atomc.passes.fuse import Fuse
from tests.support.graphs import TOKENS, apply, assert_same, by_references, operators, randn, text, traced
from tests.support.tiny import tiny_config

D, HEADS, DH, RD, STREAMS, EXPERTS, TOPK = 16, 3, 12, 4, 4, 6, 2
LENGTHS = (TOKENS, 1, 5)
atom = torch.ops.atom
Make = Callable[[int, torch.dtype], tuple[Tensor, ...]]


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


# -- operators that are plain mathematics in the model: the model's own modules ----------------------------------------


def random(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        with torch.no_grad():
            parameter.copy_(torch.randn(parameter.shape) * 0.5)
    return module


def lifted(fn: Callable[..., Any], inputs: int) -> tuple[Callable[..., Any], list[Tensor]]:
    """A module as a function of its inputs and then its parameters; any other function as it is."""
    if not isinstance(fn, nn.Module):
        return fn, []
    names = [name for name, _ in fn.named_parameters()]

    def call(*values: Tensor) -> Any:
        return torch.func.functional_call(fn, dict(zip(names, values[inputs:], strict=True)), values[:inputs])

    return call, [p.data for p in fn.parameters()]


CONFIG = tiny_config(hidden_size=D, hc_sinkhorn_iters=3, n_routed_experts=EXPERTS, num_experts_per_tok=TOPK,
                     moe_intermediate_size=8, quantization_config=None)  # fmt: skip


def norm_inputs(t: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    return (randn(t, D, dtype=dtype),)


def head_inputs(t: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    return randn(t, HEADS, DH, dtype=dtype), *angles(t)


def stream_inputs(t: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    return (randn(t, STREAMS, D, dtype=dtype),)


def post_inputs(t: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    return randn(t, STREAMS, D, dtype=dtype), randn(t, D, dtype=dtype), randn(t, STREAMS), randn(t, STREAMS, STREAMS)


def expert_inputs(t: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    weights = torch.rand(t, TOPK)
    indices = torch.stack([torch.randperm(EXPERTS)[:TOPK] for _ in range(t)])
    return randn(t, D, dtype=dtype), weights, indices


def route_inputs(t: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    return randn(t, D, dtype=dtype), torch.randint(0, CONFIG.vocab_size, (t,), dtype=torch.int32)


def shared(gate: Tensor, up: Tensor) -> Tensor:
    return layers.swiglu(gate, up, 0.6).to(gate.dtype)


def gate(hash_routing: bool) -> nn.Module:
    module = random(moe.Gate(CONFIG, hash_routing))
    if hash_routing:
        with torch.no_grad():
            table = torch.stack([torch.randperm(EXPERTS)[:TOPK] for _ in range(CONFIG.vocab_size)])
            module.get_parameter("tid2eid").copy_(table)
    return module


def two(t: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    return randn(t, D, dtype=dtype), randn(t, D, dtype=dtype)


MODULES: dict[str, tuple[Fuse, Callable[..., Any], Make]] = {
    "rms_norm": (fusions.RMS_NORM, random(layers.RMSNorm(D, 1e-6)), norm_inputs),
    "rms_norm_unit": (fusions.RMS_NORM_UNIT, lambda x, c, s: layers.unit_rms(x, 1e-6), head_inputs),
    "rope": (fusions.ROPE, lambda x, c, s: layers.rotate(x, layers.Angles(c, s)), head_inputs),
    "rope_row": (fusions.ROPE, lambda x, c, s: layers.rotate(x[:, 0], layers.Angles(c, s)), head_inputs),
    "rope_inverse": (fusions.ROPE_INVERSE, lambda x, c, s: layers.rotate(x, layers.Angles(c, s), True), head_inputs),
    "hc_pre": (fusions.HC_PRE, random(HyperConnection(CONFIG)), stream_inputs),
    "hc_head": (fusions.HC_HEAD, random(HyperHead(CONFIG)), stream_inputs),
    "hc_post": (fusions.HC_POST, lambda *parts: Residual(*parts).streams(), post_inputs),
    "swiglu": (fusions.SWIGLU, shared, two),
    "route_topk": (fusions.ROUTE_TOPK, gate(hash_routing=False), route_inputs),
    "route_hash": (fusions.ROUTE_HASH, gate(hash_routing=True), route_inputs),
}


# What remains of each: the operator, its results, and what prepares its arguments.
PREPARED = ["aten.unsqueeze", "aten.unsqueeze"]
GOLDEN: dict[str, list[str]] = {
    "rms_norm": ["atom.rms_norm"],
    "rms_norm_unit": ["atom.rms_norm"],
    "rope": [*PREPARED, "atom.rope"],
    "rope_row": ["aten.select.int", "atom.rope"],
    "rope_inverse": [*PREPARED, "atom.rope"],
    "hc_pre": ["atom.hc_pre", *["getitem"] * 3],
    "hc_head": ["atom.hc_head"],
    "hc_post": ["atom.hc_post"],
    "swiglu": ["atom.swiglu"],
    "route_topk": ["aten.linear", "atom.route_topk", *["getitem"] * 2],
    "route_hash": ["aten.linear", "atom.route_hash", *["getitem"] * 2],
    "rms_norm_pair": ["aten.slice.Tensor", "aten.slice.Tensor", "atom.rms_norm_pair", *["getitem"] * 2],
    "qk_norm_rope_insert": ["atom.qk_norm_rope_insert"],
    "compressor_csa": ["atom.compressor_pool_norm_rope_insert"],
    "compressor_hca": ["atom.compressor_pool_norm_rope_insert"],
    "index_rope_topk": ["atom.index_rope_topk"],
    "attention_csa": ["atom.sparse_attention_inverse_rope"],
    "attention_hca": ["atom.sparse_attention_inverse_rope"],
    "attention_swa": ["atom.sparse_attention_inverse_rope"],
    "hc_pre_norm": ["atom.hc_pre_norm", *["getitem"] * 3],
    "hc_post_pre_norm": ["atom.hc_post_pre_norm", *["getitem"] * 4],
    "hc_head_norm": ["atom.hc_head_norm"],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MODULES)
def test_the_models_modules_become_operators_that_compute_the_same(name: str, dtype: torch.dtype) -> None:
    step, fn, make = MODULES[name]
    example = make(TOKENS, dtype)
    fn, weights = lifted(fn, len(example))
    gm = traced(fn, *example, *weights)
    apply(gm, step, expected={step.label: 1})
    casts = ["aten.to.dtype"] * (dtype != torch.float32 and step.op.startswith("route"))
    assert operators(gm) == [*casts, *GOLDEN[name]]
    for tokens in LENGTHS:
        inputs = (*make(tokens, dtype), *weights)
        assert_same(by_references(gm, *inputs), fn(*inputs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_routed_experts(dtype: torch.dtype) -> None:
    example = expert_inputs(TOKENS, dtype)
    fn, weights = lifted(random(moe.Experts(CONFIG, dtype)), len(example))
    gm, plain = (traced(fn, *example, *weights) for _ in range(2))
    apply(gm, fusions.MOE_EXPERTS, expected={"fuse_moe_experts": 1})
    assert operators(gm) == ["atom.moe_experts"]
    for tokens in LENGTHS:
        inputs = (*expert_inputs(tokens, dtype), *weights)
        assert_same(by_references(gm, *inputs), by_references(plain, *inputs))


# -- operators with their neighbours: the spelling, run by the references of what it is made of -----------------------


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


NEIGHBOURS: dict[str, tuple[Fuse, int, Callable[[int, torch.dtype], dict[str, Any]], tuple[Fuse, ...]]] = {
    "rms_norm_pair": (fusions.RMS_NORM_PAIR, 0, pair, ()),
    "qk_norm_rope_insert": (fusions.QK_NORM_ROPE_INSERT, 0, insertion, ()),
    "compressor_csa": (fusions.COMPRESSOR, 0, compressor(overlap=True), ()),
    "compressor_hca": (fusions.COMPRESSOR, 1, compressor(overlap=False), ()),
    "index_rope_topk": (fusions.INDEX_ROPE_TOPK, 0, indexer, ()),
    "attention_csa": (fusions.ATTENTION_INVERSE_ROPE, 0, attention(), ()),
    "attention_hca": (fusions.ATTENTION_INVERSE_ROPE, 1, attention("topk"), ()),
    "attention_swa": (fusions.ATTENTION_INVERSE_ROPE, 2, attention("topk", "cache"), ()),
    "hc_pre_norm": (fusions.HC_PRE_NORM, 0, pre, ()),
    "hc_post_pre_norm": (fusions.HC_POST_PRE_NORM, 0, post_pre, (fusions.HC_PRE_NORM,)),
    "hc_head_norm": (fusions.HC_HEAD_NORM, 0, head, ()),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NEIGHBOURS)
def test_neighbours_become_one_operator_that_computes_the_same(name: str, dtype: torch.dtype) -> None:
    step, index, make, first = NEIGHBOURS[name]
    spelling = step.spellings[index]
    example = make(TOKENS, dtype)
    tensors = [k for k, v in example.items() if isinstance(v, Tensor)]

    def plain(*values: Tensor) -> Any:
        return spelling.fn(**{**example, **dict(zip(tensors, values, strict=True))})

    gm, unfused = (traced(plain, *(example[k] for k in tensors)) for _ in range(2))
    apply(gm, *first, step, expected={step.label: 1})
    assert operators(gm) == GOLDEN[name]
    for tokens in LENGTHS:
        values = [make(tokens, dtype)[k] for k in tensors]
        copies = [v.clone() for v in values]
        assert_same(by_references(gm, *values), by_references(unfused, *copies))
        assert_same(values, copies)  # what is written, is written alike


# -- what is nearly an operator, and is not ----------------------------------------------------------------------------


def rotated_in_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE of Llama: pairs (i, i + rd/2), not (2i, 2i + 1)."""
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    a, b = x[..., -4:-2], x[..., -2:]
    return torch.cat((x[..., :-4], a * cos - b * sin, b * cos + a * sin), dim=-1)


def rotated_the_other_way_round(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    a, b = x[..., -4:][..., 1::2], x[..., -4:][..., 0::2]  # odd channels first
    turned = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1)
    return torch.cat((x[..., :-4], turned.flatten(-2)), dim=-1)


def untransposed(h: Tensor, y: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    return post.unsqueeze(-1) * y.unsqueeze(-2) + torch.matmul(comb, h)


def clamped_below(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate.clamp(-0.6, 0.6)) * up.clamp(-0.6, 0.6)


def biased_weights(logits: Tensor, bias: Tensor) -> Tensor:
    scores = F.softplus(logits).sqrt() + bias
    indices = torch.topk(scores, TOPK, dim=-1, sorted=False).indices
    weights = scores.gather(-1, indices)  # of the biased scores: another mathematics
    return weights / (weights.sum(-1, keepdim=True) + 1e-20) * 1.5


def two_epsilons(qkv: Tensor, q_weight: Tensor, kv_weight: Tensor) -> tuple[Tensor, Tensor]:
    return atom.rms_norm(qkv[..., :D], q_weight, 1e-6), atom.rms_norm(qkv[..., D:], kv_weight, 1e-5)


def forward_after_attention(**known: Any) -> Tensor:
    cos, sin = known.pop("cos").unsqueeze(-2), known.pop("sin").unsqueeze(-2)
    out: Tensor = atom.rope(atom.sparse_attention(*known.values()), cos, sin, False)
    return out


def pre_with_another_eps(**known: Any) -> Any:
    weight = known.pop("weight")
    x, post, comb = atom.hc_pre(*known.values())
    return atom.rms_norm(x, weight, 1e-3), post, comb


def rotated_back_before_topk(**known: Any) -> Any:
    cos, sin = known.pop("cos").unsqueeze(-2), known.pop("sin").unsqueeze(-2)
    return atom.index_topk(atom.rope(known.pop("q"), cos, sin, True), *known.values())


def tensors_of(make: Callable[[int, torch.dtype], dict[str, Any]], fn: Callable[..., Any]) -> tuple[Any, list[Tensor]]:
    example = make(TOKENS, torch.float32)
    names = [k for k, v in example.items() if isinstance(v, Tensor)]
    call = lambda *values: fn(**{**example, **dict(zip(names, values, strict=True))})  # noqa: E731
    return call, [example[k] for k in names]


def streams_and(t: int) -> list[Tensor]:
    return list(post_inputs(t, torch.float32))


NEAR: dict[str, tuple[Fuse, Callable[[], tuple[Callable[..., Any], list[Tensor]]]]] = {
    "rope of halves": (fusions.ROPE, lambda: (rotated_in_halves, [*head_inputs(TOKENS, torch.float32)])),
    "rope, odd first": (fusions.ROPE, lambda: (rotated_the_other_way_round, [*head_inputs(TOKENS, torch.float32)])),
    "rope inverse": (fusions.ROPE_INVERSE, lambda: (rotated_in_halves, [*head_inputs(TOKENS, torch.float32)])),
    "post untransposed": (fusions.HC_POST, lambda: (untransposed, streams_and(TOKENS))),
    "gate clamped below": (fusions.SWIGLU, lambda: (clamped_below, [*two(TOKENS, torch.float32)])),
    "biased weights": (fusions.ROUTE_TOPK, lambda: (biased_weights, [randn(TOKENS, 6), randn(6)])),
    "two epsilons": (fusions.RMS_NORM_PAIR, lambda: (two_epsilons, [randn(TOKENS, D + DH), randn(D), randn(DH)])),
    "rope after attention": (
        fusions.ATTENTION_INVERSE_ROPE, lambda: tensors_of(attention(), forward_after_attention),
    ),
    "pre with another eps": (fusions.HC_PRE_NORM, lambda: tensors_of(pre, pre_with_another_eps)),
    "index queries rotated back": (fusions.INDEX_ROPE_TOPK, lambda: tensors_of(indexer, rotated_back_before_topk)),
}  # fmt: skip


@pytest.mark.parametrize("name", NEAR)
def test_what_is_nearly_an_operator_is_left_alone(name: str) -> None:
    step, make = NEAR[name]
    fn, inputs = make()
    gm, untouched = (traced(fn, *inputs) for _ in range(2))
    apply(untouched)
    apply(gm, step, expected={step.label: 0})
    assert text(gm) == text(untouched)


def test_every_operator_with_a_fusion_is_tested_here() -> None:
    from atomc.passes import pipelines

    fused = {p.op for p in pipelines.fusion() if isinstance(p, Fuse)}
    tested = {case[0].op for case in MODULES.values()} | {case[0].op for case in NEIGHBOURS.values()} | {"moe_experts"}
    assert tested == fused
    assert fused <= set(OPS)
