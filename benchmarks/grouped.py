"""Routed experts by torch's grouped product: no step waits for the device, so that a CUDA graph can hold it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def by_expert(indices: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """Of choices [T, k]: the pairs in the order of their experts [T k], and where each expert's pairs end [E] int32."""
    chosen = indices.flatten()
    counts = torch.zeros(experts, dtype=torch.int32, device=indices.device)
    counts = counts.scatter_add(0, chosen, torch.ones_like(chosen, dtype=torch.int32))
    return chosen.argsort(stable=True), counts.cumsum(0).int()


def grouped_linear(x: Tensor, weight: Tensor, indices: Tensor) -> Tensor:
    """`atom.grouped_linear`: x [T, K] or [T, k, K] bf16, weight [E, N, K], indices [T, k] -> [T, k, N]."""
    order, ends = by_expert(indices, weight.shape[0])
    rows = x[order // indices.shape[1]] if x.dim() == 2 else x.flatten(0, 1)[order]
    y = F.grouped_mm(rows, weight.transpose(1, 2), offs=ends)
    return torch.empty_like(y).index_copy(0, order, y).unflatten(0, indices.shape)


def grouped_experts(x: Tensor, w13: Tensor, w2: Tensor, indices: Tensor, weights: Tensor, limit: float) -> Tensor:
    """`atom.moe_experts`, sorted once for both products.

    Args:
        x: [T, D] bf16. w13: [E, 2I, D]. w2: [E, D, I]. indices: [T, k]. weights: [T, k] fp32.
    Returns:
        [T, D] fp32.
    """
    order, ends = by_expert(indices, w13.shape[0])
    rows = x[order // indices.shape[1]]
    gate, up = F.grouped_mm(rows, w13.transpose(1, 2), offs=ends).float().chunk(2, dim=-1)
    a = F.silu(gate.clamp(max=limit)) * up.clamp(-limit, limit) * weights.flatten()[order].unsqueeze(-1)
    y = F.grouped_mm(a.to(x.dtype), w2.transpose(1, 2), offs=ends)
    back = torch.empty_like(y).index_copy(0, order, y)
    return back.unflatten(0, indices.shape).float().sum(1)
