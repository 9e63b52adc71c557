"""Root-mean-square norm and rotary embedding of DeepSeek-V4."""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from atomc.models.nano.config import LayerKind, NanoConfig

Weights = Mapping[str, Tensor]


class Rope(NamedTuple):
    """`cos`, `sin`: fp32 `[T, rope_dim / 2]`."""

    cos: Tensor
    sin: Tensor


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """Over the last dim; statistics and product in fp32, one cast at the end."""
    y = x.float()
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    return (y if weight is None else y * weight.float()).to(x.dtype)


def rope_table(config: NanoConfig, kind: LayerKind, length: int, device: torch.device | None = None) -> Rope:
    """SWA layers: plain RoPE. Layers with a compressor: the second theta with YaRN (no magnitude scaling)."""
    dim = config.qk_rope_head_dim
    exponent = torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim
    if kind == "swa":
        frequency = config.rope_theta**-exponent
    else:
        theta, yarn = config.compress_rope_theta, config.rope_scaling
        low, high = (
            dim * math.log(yarn.original_max_position_embeddings / (beta * 2 * math.pi)) / (2 * math.log(theta))
            for beta in (yarn.beta_fast, yarn.beta_slow)
        )
        low, high = max(math.floor(low), 0), min(math.ceil(high), dim - 1)
        ramp = ((torch.arange(dim // 2, device=device) - low) / max(high - low, 1e-3)).clamp(0, 1)
        frequency = theta**-exponent * (1 - ramp + ramp / yarn.factor)
    angle = torch.arange(length, dtype=torch.float32, device=device)[:, None] * frequency
    return Rope(angle.cos(), angle.sin())


def apply_rope(x: Tensor, rope: Rope, heads: bool = False, inverse: bool = False) -> Tensor:
    """Rotate the last channels, interleaved pairs. `x`: `[B, T, d]`, or `[B, T, H, d]` with `heads`."""
    cos, sin = (rope.cos[:, None], rope.sin[:, None]) if heads else rope
    sin = -sin if inverse else sin
    width = 2 * cos.shape[-1]
    a, b = x[..., -width:].float().unflatten(-1, (-1, 2)).unbind(-1)
    rotated = torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)
    return torch.cat([x[..., :-width], rotated.to(x.dtype)], -1)
