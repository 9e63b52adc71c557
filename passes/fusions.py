"""The spellings of every fused operator: how the mathematics is written, here and in transformers.

Each spelling's parameters are its operator's. Numbers in the examples are sentinels: a match reads them off the graph.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Graph, Node

from atomc.ops import activation, hyper_connection, norm, rope, router
from atomc.passes.canonicalize import END
from atomc.passes.fuse import Emitter, Fuse
from atomc.passes.graph import aten, calls
from atomc.passes.pattern import Example, Of, Spelling

EPS, HC_EPS, LIMIT, SCALE, SUM_EPS = 0.00123, 0.00217, 3.21, 1.77, 0.00031
F32, I32 = torch.float32, torch.int32
atom = torch.ops.atom

Adapt = Callable[[Emitter, dict[str, Any]], dict[str, Any]]


# RMSNorm and RoPE ------------------------------------------------------------------------------------------------


def _head_norm(x: Tensor, eps: float) -> Tensor:
    return norm.rms_norm(x, None, eps)


RMS_NORM = Fuse("rms_norm", (Spelling(norm.rms_norm, {"x": Of((7, 22)), "weight": Of((22,), F32), "eps": EPS}),))
RMS_NORM_UNIT = Fuse(
    "rms_norm",
    (Spelling(_head_norm, {"x": Of((7, 3, 22)), "eps": EPS}, adapt=lambda _, known: {**known, "weight": None}),),
    variant="_unit",
)
_ROPE: dict[str, Example] = {"x": Of((7, 3, 22)), "cos": Of((7, 1, 5), F32), "sin": Of((7, 1, 5), F32)}


def _half_rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE as `x * cos + rotate_half(x) * sin` with doubled angles: x [B, H, S, d], cos [B, S, rd/2]."""
    cos = cos.repeat_interleave(2, dim=-1).unsqueeze(1)
    sin = sin.repeat_interleave(2, dim=-1).unsqueeze(1)
    nope, pe = x[..., : -cos.shape[-1]], x[..., -cos.shape[-1] :]
    turned = torch.stack((-pe[..., 1::2], pe[..., 0::2]), dim=-1).flatten(-2)
    return torch.cat([nope, ((pe.float() * cos) + (turned.float() * sin)).to(x.dtype)], dim=-1)


def _half_rotated_back(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return _half_rotated(x, cos, -sin)


def _with_heads(inverse: bool) -> Adapt:
    """The angles of [B, H, S, d] for the operator: [B, S, rd/2] -> [B, 1, S, rd/2] in fp32."""

    def prepared(emit: Emitter, angle: Node) -> Node:
        if angle.meta["val"].dtype != F32:  # rounded before, not after: the products are in fp32 either way
            angle = emit.call(aten.to.dtype, angle, F32)
        return emit.call(aten.unsqueeze.default, angle, -3)

    def adapt(emit: Emitter, known: dict[str, Any]) -> dict[str, Any]:
        return {**known, "cos": prepared(emit, known["cos"]), "sin": prepared(emit, known["sin"]), "inverse": inverse}

    return adapt


_HALF: dict[str, Example] = {"x": Of((2, 3, 7, 22)), "cos": Of((2, 7, 5), F32), "sin": Of((2, 7, 5), F32)}
# The doubling of the angles, done once for all that is rotated by them.
_DOUBLED = frozenset({aten.repeat_interleave.self_int, aten.unsqueeze.default, aten.neg.default})


def _rope(inverse: bool) -> tuple[Spelling, ...]:
    halves, adapt = _half_rotated_back if inverse else _half_rotated, _with_heads(inverse)
    # Where all channels are rotated, the slice that takes them is no operation.
    whole = ({**_ROPE, "x": Of((7, 3, 10))}, {**_HALF, "x": Of((2, 3, 7, 10))})
    return (
        *(Spelling(rope.rope, e, fixed={"inverse": inverse}) for e in (_ROPE, whole[0])),
        *(Spelling(halves, e, adapt=adapt, shared=_DOUBLED, source="transformers") for e in (_HALF, whole[1])),
    )


ROPE = Fuse("rope", _rope(inverse=False))
ROPE_INVERSE = Fuse("rope", _rope(inverse=True), variant="_inverse")

# Hyper-connections -----------------------------------------------------------------------------------------------

_HC: dict[str, Example] = {
    "h": Of((7, 4, 22)), "fn": Of((24, 88), F32), "base": Of((24,), F32), "scale": Of((3,), F32),
    "norm_eps": EPS, "hc_eps": HC_EPS,
}  # fmt: skip
_HEAD: dict[str, Example] = {**_HC, "fn": Of((4, 88), F32), "base": Of((4,), F32), "scale": Of((1,), F32)}
_POST: dict[str, Example] = {
    "h": Of((7, 4, 22)), "y": Of((7, 22)), "post": Of((7, 4), F32), "comb": Of((7, 4, 4), F32),
}  # fmt: skip


def _normed_first(h: Tensor, fn: Tensor, norm_eps: float) -> Tensor:
    """The mixing logits with the normalisation before the linear layer, not after."""
    u = h.flatten(-2).float()
    return F.linear(u * torch.rsqrt(u.square().mean(-1, keepdim=True) + norm_eps), fn)


def _hc_pre_normed_first(
    h: Tensor, fn: Tensor, base: Tensor, scale: Tensor, norm_eps: float, hc_eps: float, iters: int
) -> hyper_connection.Pre:
    mix = _normed_first(h, fn, norm_eps)
    pre, post, comb = hyper_connection.coefficients(mix, base, scale, h.shape[-2], hc_eps, iters)
    return (pre.unsqueeze(-1) * h).sum(dim=-2).to(h.dtype), post, comb


def _hc_head_normed_first(h: Tensor, fn: Tensor, base: Tensor, scale: Tensor, norm_eps: float, hc_eps: float) -> Tensor:
    pre = torch.sigmoid(_normed_first(h, fn, norm_eps) * scale + base) + hc_eps
    return (pre.unsqueeze(-1) * h).sum(dim=-2).to(h.dtype)


def sinkhorn_counts(graph: Graph) -> list[dict[str, Any]]:
    """`iters` of every unrolled Sinkhorn iteration: the lengths of the chains of `a / (sum(a) + eps)`, longest first.

    One column step comes first, then `iters - 1` times a row step and a column step.
    """
    length: dict[Node, int] = {}
    for node in calls(graph):
        if _normalises(node):
            length[node] = 1 + length.pop(node.args[0], 0)  # type: ignore[arg-type]
    return [{"iters": n} for n in sorted({(n + 1) // 2 for n in length.values()}, reverse=True)]


def _normalises(node: Node) -> bool:
    """`a / (a.sum(dim, keepdim=True) + eps)`."""
    below = node.args[1] if node.target is aten.div.Tensor else None
    total = below.args[0] if isinstance(below, Node) and below.target is aten.add.Tensor else None
    return isinstance(total, Node) and total.target is aten.sum.dim_IntList and total.args[0] is node.args[0]


HC_PRE = Fuse(
    "hc_pre",
    (
        Spelling(hyper_connection.hc_pre, _HC, fixed_from=sinkhorn_counts),
        Spelling(_hc_pre_normed_first, _HC, fixed_from=sinkhorn_counts, source="transformers"),
    ),
)
HC_HEAD = Fuse(
    "hc_head",
    (
        Spelling(hyper_connection.hc_head, _HEAD),
        Spelling(_hc_head_normed_first, _HEAD, source="transformers"),
    ),
)
HC_POST = Fuse("hc_post", (Spelling(hyper_connection.hc_post, _POST),))

# MoE -------------------------------------------------------------------------------------------------------------

_ROUTER: dict[str, Example] = {"logits": Of((7, 101), F32), "scale": SCALE, "eps": SUM_EPS}


def _moe_experts(x: Tensor, w13: Tensor, w2: Tensor, indices: Tensor, weights: Tensor, limit: float) -> Tensor:
    gate, up = atom.grouped_linear(x, w13, indices).chunk(2, dim=-1)
    a = F.silu(gate.float().clamp(max=limit)) * up.float().clamp(min=-limit, max=limit) * weights.unsqueeze(-1)
    out: Tensor = atom.grouped_linear(a.to(x.dtype), w2, indices).float().sum(dim=1)
    return out


SWIGLU = Fuse("swiglu", (Spelling(activation.swiglu, {"gate": Of((7, 22)), "up": Of((7, 22)), "limit": LIMIT}),))
ROUTE_TOPK = Fuse("route_topk", (Spelling(router.route_topk, {**_ROUTER, "bias": Of((101,), F32), "k": 37}),))
ROUTE_HASH = Fuse(
    "route_hash",
    (Spelling(router.route_hash, {**_ROUTER, "ids": Of((7,), I32), "tid2eid": Of((53, 3), I32)}),
     Spelling(router.route_hash, {**_ROUTER, "ids": Of((7,), torch.int64), "tid2eid": Of((53, 3), torch.int64)},
              source="transformers")),
)  # fmt: skip
MOE_EXPERTS = Fuse(
    "moe_experts",
    (
        Spelling(
            _moe_experts,
            {
                "x": Of((7, 22)),
                "w13": Of((5, 26, 22)),
                "w2": Of((5, 22, 13)),
                "indices": Of((7, 3), torch.int64),
                "weights": Of((7, 3), F32),
                "limit": LIMIT,
            },
        ),
    ),
)

# Fusions of operators with their neighbours ------------------------------------------------------------------------

_CACHE: dict[str, Example] = {
    "cache": Of((11, 13, 22)), "table": Of((2, 17), I32), "requests": Of((7,), I32), "positions": Of((7,), I32),
}  # fmt: skip
_ANGLES: dict[str, Example] = {"cos": Of((7, 5), F32), "sin": Of((7, 5), F32)}
_RATIO, _TOPK, _ITERS = 1009, 1013, 31  # integers that occur nowhere else; the reference runs _ITERS iterations


def _rms_norm_pair(qkv: Tensor, q_weight: Tensor, kv_weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The q and kv norms read the two parts of one merged projection."""
    rank = q_weight.shape[0]
    return atom.rms_norm(qkv[..., :rank], q_weight, eps), atom.rms_norm(qkv[..., rank:], kv_weight, eps)


def _parts(emit: Emitter, known: dict[str, Any]) -> dict[str, Any]:
    rank = known["q_weight"].meta["val"].shape[0]
    q = emit.call(aten.slice.Tensor, known["qkv"], -1, 0, rank)
    return {**known, "q": q, "kv": emit.call(aten.slice.Tensor, known["qkv"], -1, rank, END)}


def _qk_norm_rope_insert(
    q: Tensor, kv: Tensor, cos: Tensor, sin: Tensor, eps: float, cache: Tensor, table: Tensor, requests: Tensor,
    positions: Tensor, rows: str,
) -> Tensor:  # fmt: skip
    row = atom.rope(kv, cos, sin, False)
    if rows:
        atom.packed_insert(cache, atom.pack_rows(row, rows), table, requests, positions, rows)
    else:
        atom.cache_insert(cache, row, table, requests, positions)
    out: Tensor = atom.rope(atom.rms_norm(q, None, eps), cos.unsqueeze(-2), sin.unsqueeze(-2), False)
    return out


def _compressor(
    kv: Tensor, gate: Tensor, ape: Tensor, state: Tensor, weight: Tensor, eps: float, cos: Tensor, sin: Tensor,
    cache: Tensor, table: Tensor, ends: Tensor, positions: Tensor, requests: Tensor, query_start: Tensor,
    slots: Tensor, ratio: int, overlap: bool, dtype: torch.dtype, rotate: bool, rows: str,
) -> None:  # fmt: skip
    pooled = atom.compressor_pool(kv, gate, ape, state, ends, positions, requests, query_start, slots, overlap)
    row = atom.rope(atom.rms_norm(pooled.to(dtype), weight, eps), cos, sin, False)
    if rotate:
        row = atom.hadamard(row)
    if rows:
        packed = atom.pack_rows(row, rows)
        atom.compressed_packed_insert(cache, packed, table, ends, positions, requests, ratio, rows)
    else:
        atom.compressed_insert(cache, row, table, ends, positions, requests, ratio)


def _index_rope_topk(
    q: Tensor, cos: Tensor, sin: Tensor, weights: Tensor, cache: Tensor, table: Tensor, requests: Tensor,
    positions: Tensor, query_start: Tensor, ratio: int, topk: int, rows: str, layout: str,
) -> Tensor:  # fmt: skip
    q = atom.rope(q, cos.unsqueeze(-2), sin.unsqueeze(-2), False)
    if layout:
        q = atom.dequantize(*atom.quantize(atom.hadamard(q), layout), layout, q.dtype)
    told = (rows,) if rows else ()
    out: Tensor = atom.index_topk(q, weights, cache, table, requests, positions, query_start, ratio, topk, *told)
    return out


def _attention_inverse_rope(
    q: Tensor, window: Tensor, window_table: Tensor, cache: Tensor | None, block_table: Tensor, topk: Tensor | None,
    sink: Tensor, requests: Tensor, positions: Tensor, scale: float, window_size: int, ratio: int, cos: Tensor,
    sin: Tensor, rows: str,
) -> Tensor:  # fmt: skip
    told = (rows,) if rows else ()
    o = atom.sparse_attention(
        q, window, window_table, cache, block_table, topk, sink, requests, positions, scale, window_size, ratio, *told
    )
    out: Tensor = atom.rope(o, cos.unsqueeze(-2), sin.unsqueeze(-2), True)
    return out


def _hc_pre_norm(
    h: Tensor, fn: Tensor, base: Tensor, scale: Tensor, weight: Tensor, norm_eps: float, hc_eps: float, iters: int
) -> tuple[Tensor, Tensor, Tensor]:
    x, post, comb = atom.hc_pre(h, fn, base, scale, norm_eps, hc_eps, iters)
    return atom.rms_norm(x, weight, norm_eps), post, comb


def _hc_post_pre_norm(
    h: Tensor, y: Tensor, post: Tensor, comb: Tensor, fn: Tensor, base: Tensor, scale: Tensor, weight: Tensor,
    norm_eps: float, hc_eps: float, iters: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    h = atom.hc_post(h, y, post, comb)
    x, post, comb = atom.hc_pre_norm(h, fn, base, scale, weight, norm_eps, hc_eps, iters)
    return h, x, post, comb


def _hc_head_norm(
    h: Tensor, fn: Tensor, base: Tensor, scale: Tensor, weight: Tensor, norm_eps: float, hc_eps: float
) -> Tensor:
    out: Tensor = atom.rms_norm(atom.hc_head(h, fn, base, scale, norm_eps, hc_eps), weight, norm_eps)
    return out


RMS_NORM_PAIR = Fuse(
    "rms_norm_pair",
    (
        Spelling(
            _rms_norm_pair,
            {"qkv": Of((7, 48)), "q_weight": Of((22,), F32), "kv_weight": Of((26,), F32), "eps": EPS},
            adapt=_parts,
        ),
    ),
)
# Row layouts of packed caches: sentinels that stand for any, of 22 channels.
ROWS = "12:e4m3:1x6:e8m0:0.0625+10"
_PACKED: dict[str, Example] = {**_CACHE, "cache": Of((11, 13 * 35), torch.uint8), "rows": ROWS}
_PLAIN: dict[str, Example] = {**_CACHE, "rows": ""}
_DTYPES = (F32, torch.bfloat16)
_QKV: dict[str, Example] = {"q": Of((7, 3, 22)), "kv": Of((7, 22)), **_ANGLES, "eps": EPS}
QK_NORM_ROPE_INSERT = Fuse(
    "qk_norm_rope_insert", tuple(Spelling(_qk_norm_rope_insert, {**_QKV, **cache}) for cache in (_PLAIN, _PACKED))
)
_POOL: dict[str, Example] = {
    "weight": Of((22,), F32), "eps": EPS, "cos": Of((2, 5), F32), "sin": Of((2, 5), F32),
    "ends": Of((2,), I32), "query_start": Of((3,), I32), "slots": Of((2,), I32), "ratio": _RATIO,
}  # fmt: skip
_CSA: dict[str, Example] = {
    "kv": Of((7, 44), F32), "gate": Of((7, 44), F32), "ape": Of((4, 44), F32), "state": Of((3, 8, 2, 44), F32),
}  # fmt: skip
_HCA: dict[str, Example] = {
    "kv": Of((7, 22), F32), "gate": Of((7, 22), F32), "ape": Of((4, 22), F32), "state": Of((3, 4, 2, 22), F32),
}  # fmt: skip
COMPRESSOR = Fuse(
    "compressor_pool_norm_rope_insert",
    tuple(
        Spelling(_compressor, {**_POOL, **kind, **cache}, fixed={"overlap": kind is _CSA, "dtype": dtype, "rotate": r})
        for kind, cache, r in ((_CSA, _PACKED, True), (_CSA, _PACKED, False), (_HCA, _PACKED, False),
                                  (_CSA, _PLAIN, False), (_HCA, _PLAIN, False))
        for dtype in _DTYPES
    ),
)  # fmt: skip
LAYOUT = "e4m3:1x7:e8m0:0.0625"
_INDEX: dict[str, Example] = {
    "q": Of((7, 3, 32)), **_ANGLES, "weights": Of((7, 3), F32), "query_start": Of((3,), I32), "ratio": _RATIO,
    "topk": _TOPK,
}  # fmt: skip
INDEX_ROPE_TOPK = Fuse(
    "index_rope_topk",
    tuple(
        Spelling(_index_rope_topk, {**_INDEX, **cache, "layout": layout})
        for cache, layout in ((_PACKED, LAYOUT), (_PACKED, ""), (_PLAIN, ""))
    ),
)
_ATTENTION: dict[str, Example] = {
    "q": Of((7, 3, 22)), "window": Of((11, 13, 22)), "window_table": Of((2, 17), I32), "cache": Of((11, 13, 22)),
    "block_table": Of((2, 19), I32), "topk": Of((7, 9), I32), "sink": Of((3,), F32), "requests": Of((7,), I32),
    "positions": Of((7,), I32), "scale": SCALE, "window_size": _TOPK, "ratio": _RATIO, **_ANGLES,
}  # fmt: skip
ABSENT = ((), ("topk",), ("topk", "cache"))  # CSA, HCA, SWA
ATTENTION_INVERSE_ROPE = Fuse(
    "sparse_attention_inverse_rope",
    tuple(
        Spelling(_attention_inverse_rope, {**_ATTENTION, "rows": rows, **dict.fromkeys(absent)})
        for rows in (ROWS, "")
        for absent in ABSENT
    ),
)


HC_PRE_NORM = Fuse("hc_pre_norm", (Spelling(_hc_pre_norm, {**_HC, "weight": Of((22,), F32), "iters": _ITERS}),))
HC_POST_PRE_NORM = Fuse(
    "hc_post_pre_norm",
    (Spelling(_hc_post_pre_norm, {**_HC, **_POST, "weight": Of((22,), F32), "iters": _ITERS}),),
)
HC_HEAD_NORM = Fuse("hc_head_norm", (Spelling(_hc_head_norm, {**_HEAD, "weight": Of((22,), F32)}),))
