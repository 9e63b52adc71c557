"""Routed experts: the grouped linear layer, and experts + SwiGLU + weighted sum as one operator (spec 2.8)."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from atomc.ops.quantize import dequantize, quantize
from atomc.ops.registry import define


def _grouped_fake(x: torch.Tensor, weight: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    return x.new_empty((*indices.shape, weight.shape[1]))


@define(
    "grouped_linear(Tensor x, Tensor weight, Tensor indices) -> Tensor",
    tokens="x",
    spec="2.8, 6.1 K21",
    fake=_grouped_fake,
)
def grouped_linear(x: torch.Tensor, weight: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Apply to each (token, choice) the matrix of its expert.

    Args:
        x: [T, K] one row per token, or [T, k, K] one per choice. weight: [E, N, K]. indices: [T, k] int64; -1 where
            the expert is another rank's: the result is 0 there.
    Returns:
        [T, k, N] in x's dtype.
    """
    return by_expert(x, weight.shape[1], indices, weight.__getitem__)


def by_expert(
    x: torch.Tensor, width: int, indices: torch.Tensor, matrix: Callable[[int], torch.Tensor]
) -> torch.Tensor:
    """`grouped_linear` with `matrix(expert)` [width, K], asked for once and only for experts that have tokens."""
    out = x.new_zeros((*indices.shape, width))
    for expert in torch.unique(indices[indices >= 0]).tolist():
        token, choice = torch.where(indices == expert)
        rows = x[token] if x.dim() == 2 else x[token, choice]
        out[token, choice] = F.linear(rows, matrix(expert))
    return out


def weighted_swiglu(h: torch.Tensor, weights: torch.Tensor, limit: float) -> torch.Tensor:
    """[..., 2I], gate then up, and weights [...] -> [..., I] fp32: clamped SwiGLU times the routing weight (2.8)."""
    gate, up = h.float().chunk(2, dim=-1)
    return F.silu(gate.clamp(max=limit)) * up.clamp(min=-limit, max=limit) * weights.unsqueeze(-1)


@define(
    "moe_experts(Tensor x, Tensor w13, Tensor w2, Tensor indices, Tensor weights, float limit) -> Tensor",
    tokens="x",
    spec="2.8, 6.1 K21-K22",
    fake=lambda x, *_, **__: x.new_empty(x.shape, dtype=torch.float32),
)
def moe_experts(
    x: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor, limit: float
) -> torch.Tensor:
    """`sum_k w2[e_k] (w_k * swiglu(w13[e_k] x))`; the routing weight is applied before w2, as the reference does.

    Args:
        x: [T, D]. w13: [E, 2I, D], gate rows then up rows. w2: [E, D, I]. indices: [T, k], -1 for an expert of another
            rank, which adds nothing. weights: [T, k] fp32.
    Returns:
        [T, D] fp32.
    """
    a = weighted_swiglu(grouped_linear(x, w13, indices), weights, limit)
    return grouped_linear(a.to(x.dtype), w2, indices).float().sum(dim=1)


@define(
    "moe_experts_quant(Tensor codes, Tensor scales, Tensor w13, Tensor w2, Tensor indices, Tensor weights, float limit,"
    " str layout, str inner_layout, ScalarType dtype) -> Tensor",
    tokens="codes",
    spec="2.8, 3.4, 6.1 K21-K22",
    fake=lambda codes, _s, _a, w2, *_: codes.new_empty((codes.shape[0], w2.shape[1]), dtype=torch.float32),
)
def moe_experts_quant(
    codes: torch.Tensor,
    scales: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    indices: torch.Tensor,
    weights: torch.Tensor,
    limit: float,
    layout: str,
    inner_layout: str,
    dtype: torch.dtype,
) -> torch.Tensor:
    """`moe_experts` of a quantised x; what enters w2 is quantised after the routing weight (spec 2.8, 3.4).

    Args:
        codes, scales: x [T, D] in `layout`. w13: [E, 2I, D], w2: [E, D, I] in `dtype`, the compute dtype.
        inner_layout: of the input of w2.
    Returns:
        [T, D] fp32.
    """
    x = dequantize(codes, scales, layout, dtype)
    a = weighted_swiglu(grouped_linear(x, w13, indices), weights, limit).to(dtype)
    a = dequantize(*quantize(a, inner_layout), inner_layout, dtype)
    return grouped_linear(a, w2, indices).float().sum(dim=1)
