"""RMS normalisation (spec 2.0, 2.3): with a weight, without one (per-head q norm), and the q/kv pair of attention."""

from __future__ import annotations

import torch

from atomc.ops.quantize import pair_like, quantize
from atomc.ops.registry import define


@define("rms_norm(Tensor x, Tensor? weight, float eps) -> Tensor", tokens="x", spec="2.0, 2.3")
def rms_norm(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    """`x * rsqrt(mean(x^2) + eps) * weight` over the last dim; statistics and products in fp32, one cast at the end.

    Args:
        x: [..., D], any float dtype.
        weight: [D] or None (spec 2.3: the per-head q norm has no weight).
    """
    x_f = x.float()
    y = x_f * torch.rsqrt(x_f.square().mean(-1, keepdim=True) + eps)
    return (y if weight is None else y * weight).to(x.dtype)


@define(
    "rms_norm_pair(Tensor q, Tensor q_weight, Tensor kv, Tensor kv_weight, float eps) -> (Tensor, Tensor)",
    tokens="q",
    spec="2.3, 6.1 K8",
)
def rms_norm_pair(
    q: torch.Tensor, q_weight: torch.Tensor, kv: torch.Tensor, kv_weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """q_norm and kv_norm in one pass: q [T, qr], kv [T, dh] -> the same shapes."""
    return rms_norm(q, q_weight, eps), rms_norm(kv, kv_weight, eps)


@define(
    "rms_norm_pair_quant(Tensor q, Tensor q_weight, Tensor kv, Tensor kv_weight, float eps, str layout)"
    " -> (Tensor, Tensor, Tensor)",
    tokens="q",
    spec="2.3, 3.4, 6.1 K8",
    fake=lambda q, _q, kv, _k, _e, layout: (*pair_like(q, tuple(q.shape), layout), kv.new_empty(kv.shape)),
)
def rms_norm_pair_quant(
    q: torch.Tensor, q_weight: torch.Tensor, kv: torch.Tensor, kv_weight: torch.Tensor, eps: float, layout: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`rms_norm_pair`, the normed q quantised for wq_b and the indexer: -> its codes and scales, normed kv."""
    return *quantize(rms_norm(q, q_weight, eps), layout), rms_norm(kv, kv_weight, eps)
