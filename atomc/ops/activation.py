"""Clamped SwiGLU (spec 2.8)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from atomc.ops.quantize import Pair, pair_like, quantize
from atomc.ops.registry import define


@define("swiglu(Tensor gate, Tensor up, float limit) -> Tensor", tokens="gate", spec="2.8")
def swiglu(gate: torch.Tensor, up: torch.Tensor, limit: float) -> torch.Tensor:
    """`silu(min(gate, limit)) * clamp(up, -limit, limit)` in fp32, cast to gate's dtype; shapes [..., I]."""
    a = F.silu(gate.float().clamp(max=limit)) * up.float().clamp(min=-limit, max=limit)
    return a.to(gate.dtype)


@define(
    "swiglu_quant(Tensor gate, Tensor up, float limit, str layout) -> (Tensor, Tensor)",
    tokens="gate",
    spec="2.8, 3.4, 6.1 K22",
    fake=lambda gate, _up, _limit, layout: pair_like(gate, tuple(gate.shape), layout),
)
def swiglu_quant(gate: torch.Tensor, up: torch.Tensor, limit: float, layout: str) -> Pair:
    """`swiglu`, then `quantize` for the product that follows."""
    return quantize(swiglu(gate, up, limit), layout)
