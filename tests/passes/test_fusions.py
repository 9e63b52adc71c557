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
from tests.support.fusion_cases import (
    DH,
    EXPERTS,
    HEADS,
    LENGTHS,
    STREAMS,
    TOPK,
    D,
    angles,
    attention,
    check_neighbours,
    compressor,
    head,
    indexer,
    insertion,
    pair,
    post_inputs,
    post_pre,
    pre,
)  # fmt: skip
from tests.support.graphs import TOKENS, apply, assert_same, by_references, operators, randn, text, traced
from tests.support.tiny import tiny_config

atom = torch.ops.atom
Make = Callable[[int, torch.dtype], tuple[Tensor, ...]]


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


NEIGHBOURS: dict[str, tuple[Fuse, Callable[[int, torch.dtype], dict[str, Any]], tuple[Fuse, ...]]] = {
    "rms_norm_pair": (fusions.RMS_NORM_PAIR, pair, ()),
    "qk_norm_rope_insert": (fusions.QK_NORM_ROPE_INSERT, insertion, ()),
    "compressor_csa": (fusions.COMPRESSOR, compressor(overlap=True), ()),
    "compressor_hca": (fusions.COMPRESSOR, compressor(overlap=False), ()),
    "index_rope_topk": (fusions.INDEX_ROPE_TOPK, indexer, ()),
    "attention_csa": (fusions.ATTENTION_INVERSE_ROPE, attention(), ()),
    "attention_hca": (fusions.ATTENTION_INVERSE_ROPE, attention("topk"), ()),
    "attention_swa": (fusions.ATTENTION_INVERSE_ROPE, attention("topk", "cache"), ()),
    "hc_pre_norm": (fusions.HC_PRE_NORM, pre, ()),
    "hc_post_pre_norm": (fusions.HC_POST_PRE_NORM, post_pre, (fusions.HC_PRE_NORM,)),
    "hc_head_norm": (fusions.HC_HEAD_NORM, head, ()),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NEIGHBOURS)
def test_neighbours_become_one_operator_that_computes_the_same(name: str, dtype: torch.dtype) -> None:
    step, make, first = NEIGHBOURS[name]
    gm = check_neighbours(step, make, dtype, first)
    assert operators(gm) == GOLDEN[name]


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
    fused = {v.op for v in vars(fusions).values() if isinstance(v, Fuse)}
    tested = {case[0].op for case in MODULES.values()} | {case[0].op for case in NEIGHBOURS.values()} | {"moe_experts"}
    assert tested == fused
    assert fused <= set(OPS)
