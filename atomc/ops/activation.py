"""Clamped SwiGLU (spec 2.8)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from atomc.ops.registry import define


@define("swiglu(Tensor gate, Tensor up, float limit) -> Tensor", tokens="gate", spec="2.8")
def swiglu(gate: torch.Tensor, up: torch.Tensor, limit: float) -> torch.Tensor:
    """`silu(min(gate, limit)) * clamp(up, -limit, limit)` in fp32, cast to gate's dtype; shapes [..., I]."""
    a = F.silu(gate.float().clamp(max=limit)) * up.float().clamp(min=-limit, max=limit)
    return a.to(gate.dtype)
