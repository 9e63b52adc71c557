"""Routed experts: the grouped linear layer, and experts + SwiGLU + weighted sum as one operator (spec 2.8)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

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
        x: [T, K] one row per token, or [T, k, K] one per choice. weight: [E, N, K]. indices: [T, k] int64.
    Returns:
        [T, k, N] in x's dtype.
    """
    out = x.new_empty((*indices.shape, weight.shape[1]))
    for expert in torch.unique(indices).tolist():
        token, choice = torch.where(indices == expert)
        rows = x[token] if x.dim() == 2 else x[token, choice]
        out[token, choice] = F.linear(rows, weight[expert])
    return out


@define(
    "moe_experts(Tensor x, Tensor w13, Tensor w2, Tensor indices, Tensor weights, float limit) -> Tensor",
    tokens="x",
    spec="2.8, 6.1 K21-K22",
    fake=lambda x, *_, **__: torch.empty_like(x, dtype=torch.float32),
)
def moe_experts(
    x: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor, limit: float
) -> torch.Tensor:
    """`sum_k w2[e_k] (w_k * swiglu(w13[e_k] x))`; the routing weight is applied before w2, as the reference does.

    Args:
        x: [T, D]. w13: [E, 2I, D], gate rows then up rows. w2: [E, D, I]. indices: [T, k]. weights: [T, k] fp32.
    Returns:
        [T, D] fp32.
    """
    gate, up = grouped_linear(x, w13, indices).chunk(2, dim=-1)
    a = F.silu(gate.float().clamp(max=limit)) * up.float().clamp(min=-limit, max=limit) * weights.unsqueeze(-1)
    return grouped_linear(a.to(x.dtype), w2, indices).float().sum(dim=1)
