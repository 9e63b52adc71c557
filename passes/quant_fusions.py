"""The spellings of what is fused with quantisation, and of products of quantised operands (spec 3.4, 6.1).

Each is written with the explicit `quantize` and `dequantize` that `Quantize` puts into a graph. Layouts in the examples
are sentinels, as numbers are: a match reads them off the graph.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Graph

from atomc.passes.fuse import Fuse
from atomc.passes.fusions import _ATTENTION, _HC, _ITERS, _POST, ABSENT, EPS, F32, LAYOUT, LIMIT, ROWS
from atomc.passes.graph import calls
from atomc.passes.pattern import Example, Of, Spelling

atom = torch.ops.atom
INNER, WEIGHT, WEIGHT_2 = "e4m3:1x11:e8m0:0.0625", "e4m3:3x13:e8m0", "e4m3:5x17:e8m0"
E4M3, E8M0 = torch.float8_e4m3fn, torch.float8_e8m0fnu
DTYPES = (F32, torch.bfloat16)
# A pair may be expanded for several readers: each product takes the codes themselves.
_SHARED = frozenset({atom.dequantize.default})


def _rms_norm_pair_quant(
    q: Tensor, q_weight: Tensor, kv: Tensor, kv_weight: Tensor, eps: float, layout: str
) -> tuple[Tensor, Tensor, Tensor]:
    qn, kvn = atom.rms_norm_pair(q, q_weight, kv, kv_weight, eps)
    codes, scales = atom.quantize(qn, layout)
    return codes, scales, kvn


def _hc_post_pre_norm_quant(
    h: Tensor, y: Tensor, post: Tensor, comb: Tensor, fn: Tensor, base: Tensor, scale: Tensor, weight: Tensor,
    norm_eps: float, hc_eps: float, iters: int, layout: str,
) -> tuple[Tensor, ...]:  # fmt: skip
    h, x, post, comb = atom.hc_post_pre_norm(h, y, post, comb, fn, base, scale, weight, norm_eps, hc_eps, iters)
    codes, scales = atom.quantize(x, layout)
    return h, x, post, comb, codes, scales


def _swiglu_quant(gate: Tensor, up: Tensor, limit: float, layout: str) -> tuple[Tensor, Tensor]:
    codes, scales = atom.quantize(atom.swiglu(gate, up, limit), layout)
    return codes, scales


def _moe_experts_quant(
    codes: Tensor, scales: Tensor, w13: Tensor, w2: Tensor, indices: Tensor, weights: Tensor, limit: float, layout: str,
    inner_layout: str, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    gate, up = atom.grouped_linear(atom.dequantize(codes, scales, layout, dtype), w13, indices).chunk(2, dim=-1)
    a = F.silu(gate.float().clamp(max=limit)) * up.float().clamp(min=-limit, max=limit) * weights.unsqueeze(-1)
    a = atom.dequantize(*atom.quantize(a.to(dtype), inner_layout), inner_layout, dtype)
    out: Tensor = atom.grouped_linear(a, w2, indices).float().sum(dim=1)
    return out


def _attention_quant(
    q: Tensor, window: Tensor, window_table: Tensor, cache: Tensor | None, block_table: Tensor, topk: Tensor | None,
    sink: Tensor, requests: Tensor, positions: Tensor, scale: float, window_size: int, ratio: int, cos: Tensor,
    sin: Tensor, rows: str, groups: int, layout: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    told = (rows,) if rows else ()
    o = atom.sparse_attention_inverse_rope(
        q, window, window_table, cache, block_table, topk, sink, requests, positions, scale, window_size, ratio,
        cos, sin, *told,
    )  # fmt: skip
    codes, scales = atom.quantize(o.flatten(-2).unflatten(-1, (groups, -1)), layout)
    return codes, scales


def _scaled_linear(
    codes: Tensor, scales: Tensor, weight: Tensor, weight_scales: Tensor, layout: str, weight_layout: str,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    w = atom.dequantize(weight, weight_scales, weight_layout, dtype)
    return F.linear(atom.dequantize(codes, scales, layout, dtype), w)


def _scaled_grouped_output(
    codes: Tensor, scales: Tensor, weight: Tensor, weight_scales: Tensor, layout: str, weight_layout: str,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    w = atom.dequantize(weight, weight_scales, weight_layout, dtype).unflatten(0, (codes.shape[1], -1))
    z = torch.bmm(atom.dequantize(codes, scales, layout, dtype).transpose(0, 1), w.transpose(1, 2))
    return z.transpose(0, 1).flatten(-2)


def _scaled_moe_experts(
    codes: Tensor, scales: Tensor, w13: Tensor, w13_scales: Tensor, w2: Tensor, w2_scales: Tensor, indices: Tensor,
    weights: Tensor, limit: float, layout: str, inner_layout: str, w13_layout: str, w2_layout: str, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    dense = (atom.dequantize(w13, w13_scales, w13_layout, dtype), atom.dequantize(w2, w2_scales, w2_layout, dtype))
    out: Tensor = atom.moe_experts_quant(
        codes, scales, *dense, indices, weights, limit, layout, inner_layout, dtype
    )  # fmt: skip
    return out


def group_counts(graph: Graph) -> list[dict[str, Any]]:
    """`groups` of every quantised tensor [T, groups, K]."""
    found = {
        value.shape[1]
        for node in calls(graph)
        if node.target is atom.quantize.default and (value := node.args[0].meta["val"]).dim() == 3  # type: ignore[union-attr]
    }
    return [{"groups": n} for n in sorted(n for n in found if isinstance(n, int))]


_X: dict[str, Example] = {"codes": Of((7, 22), E4M3), "scales": Of((7, 4), E8M0), "layout": LAYOUT}
_ROUTED: dict[str, Example] = {"indices": Of((7, 3), torch.int64), "weights": Of((7, 3), F32), "limit": LIMIT}

RMS_NORM_PAIR_QUANT = Fuse(
    "rms_norm_pair_quant",
    (
        Spelling(
            _rms_norm_pair_quant,
            {"q": Of((7, 22)), "q_weight": Of((22,), F32), "kv": Of((7, 26)), "kv_weight": Of((26,), F32), "eps": EPS,
             "layout": LAYOUT},
        ),
    ),
)  # fmt: skip
HC_POST_PRE_NORM_QUANT = Fuse(
    "hc_post_pre_norm_quant",
    (
        Spelling(
            _hc_post_pre_norm_quant,
            {**_HC, **_POST, "weight": Of((22,), F32), "iters": _ITERS, "layout": LAYOUT},
        ),
    ),
)
SWIGLU_QUANT = Fuse(
    "swiglu_quant",
    (Spelling(_swiglu_quant, {"gate": Of((7, 22)), "up": Of((7, 22)), "limit": LIMIT, "layout": LAYOUT}),),
)
MOE_EXPERTS_QUANT = Fuse(
    "moe_experts_quant",
    tuple(
        Spelling(
            _moe_experts_quant,
            {**_X, "w13": Of((5, 26, 22), dtype), "w2": Of((5, 22, 13), dtype), **_ROUTED, "inner_layout": INNER},
            fixed={"dtype": dtype},
            shared=_SHARED,
        )
        for dtype in DTYPES
    ),
)
_HEADS: dict[str, Example] = {**_ATTENTION, "q": Of((7, 48, 22)), "sink": Of((48,), F32), "layout": LAYOUT}
ATTENTION_INVERSE_ROPE_QUANT = Fuse(
    "sparse_attention_inverse_rope_quant",
    tuple(
        Spelling(_attention_quant, {**_HEADS, "rows": rows, **dict.fromkeys(absent)}, fixed_from=group_counts)
        for rows in (ROWS, "")
        for absent in ABSENT
    ),
)
SCALED_LINEAR = Fuse(
    "scaled_linear",
    tuple(
        Spelling(
            _scaled_linear,
            {**_X, "weight": Of((26, 22), E4M3), "weight_scales": Of((9, 2), E8M0), "weight_layout": WEIGHT},
            fixed={"dtype": dtype},
            shared=_SHARED,
        )
        for dtype in DTYPES
    ),
)
SCALED_GROUPED_OUTPUT = Fuse(
    "scaled_grouped_output",
    tuple(
        Spelling(
            _scaled_grouped_output,
            {"codes": Of((7, 2, 22), E4M3), "scales": Of((7, 2, 4), E8M0), "layout": LAYOUT,
             "weight": Of((26, 22), E4M3), "weight_scales": Of((9, 2), E8M0), "weight_layout": WEIGHT},
            fixed={"dtype": dtype},
            shared=_SHARED,
        )
        for dtype in DTYPES
    ),
)  # fmt: skip
SCALED_MOE_EXPERTS = Fuse(
    "scaled_moe_experts",
    tuple(
        Spelling(
            _scaled_moe_experts,
            {**_X, "w13": Of((5, 26, 22), E4M3), "w13_scales": Of((5, 9, 2), E8M0), "w13_layout": WEIGHT,
             "w2": Of((5, 22, 13), E4M3), "w2_scales": Of((5, 5, 1), E8M0), "w2_layout": WEIGHT_2, **_ROUTED,
             "inner_layout": INNER},
            fixed={"dtype": dtype},
            shared=_SHARED,
        )
        for dtype in DTYPES
    ),
)  # fmt: skip
