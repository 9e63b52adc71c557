"""The small pieces every part of DeepSeek-V4 is made of: linear, RMSNorm, RoPE and its frequencies (spec 2.0, 2.2).

Shape suffixes: T tokens, D hidden_size, H heads, N rows completed in this step, n streams.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from atomc.models.deepseek_v4.config import DeepseekV4Config


class Linear(nn.Module):
    """`x @ weightᵀ`, weight [out, in], no bias (V4 has none)."""

    def __init__(self, in_features: int, out_features: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features, dtype=dtype), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class RMSNorm(nn.Module):
    """`x * rsqrt(mean(x²) + eps) * weight`, in fp32 with one cast at the end (spec 2.0)."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim, dtype=torch.float32), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        x_f = x.float()
        rstd = torch.rsqrt(x_f.square().mean(-1, keepdim=True) + self.eps)
        return (x_f * rstd * self.weight).to(x.dtype)


def unit_rms(x: Tensor, eps: float) -> Tensor:
    """RMSNorm without a weight: the per-head q norm (spec 2.3), fp32, rounded once."""
    x_f = x.float()
    return (x_f * torch.rsqrt(x_f.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


class Angles(NamedTuple):
    """cos and sin of the rotation angles: [T, rd/2] at token positions, or [N, rd/2] at compressed-row positions."""

    cos: Tensor
    sin: Tensor


def angles(positions: Tensor, inv_freq: Tensor) -> Angles:
    """Angles `position * f_i` in fp32: positions [T], inv_freq [rd/2]."""
    theta = positions.float().unsqueeze(-1) * inv_freq
    return Angles(theta.cos(), theta.sin())


def rotate(x: Tensor, at: Angles, inverse: bool = False) -> Tensor:
    """RoPE on the trailing channels, interleaved pairs (spec 2.2): x [T, d] or [T, H, d], at [T, rd/2]."""
    cos, sin = at
    if x.dim() == 3:
        cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    rd = 2 * cos.shape[-1]
    nope, pe = x[..., :-rd], x[..., -rd:].float()
    re, im = pe[..., 0::2], pe[..., 1::2]
    if inverse:  # multiply by the conjugate
        turned = torch.stack((re * cos + im * sin, im * cos - re * sin), dim=-1)
    else:
        turned = torch.stack((re * cos - im * sin, im * cos + re * sin), dim=-1)
    return torch.cat((nope, turned.flatten(-2).to(x.dtype)), dim=-1)


def inverse_frequencies(config: DeepseekV4Config, compressed: bool) -> Tensor:
    """[rd/2] fp32 rotation frequencies: plain for SWA layers, YaRN with the larger base for CSA and HCA (spec 2.2)."""
    rd = config.qk_rope_head_dim
    theta = config.compress_rope_theta if compressed else config.rope_theta
    freq = 1.0 / (theta ** (torch.arange(0, rd, 2, dtype=torch.float32) / rd))
    scaling = config.rope_scaling
    if not compressed or scaling is None:
        return freq

    def channel(rotations: float) -> float:
        """Index of the pair that turns `rotations` times over the original context."""
        context = scaling.original_max_position_embeddings
        return rd * math.log(context / (2 * math.pi * rotations)) / (2 * math.log(theta))

    low = max(math.floor(channel(scaling.beta_fast)), 0)
    high = min(math.ceil(channel(scaling.beta_slow)), rd - 1)
    span = max(high - low, 0.001)  # equal bounds: a step, without dividing by zero
    gamma = ((torch.arange(rd // 2, dtype=torch.float32) - low) / span).clamp(0, 1)
    return freq / scaling.factor * gamma + freq * (1 - gamma)


def swiglu(gate: Tensor, up: Tensor, limit: float) -> Tensor:
    """Clamped SwiGLU in fp32 (spec 2.8): the gate has an upper clamp only."""
    return F.silu(gate.float().clamp(max=limit)) * up.float().clamp(min=-limit, max=limit)
