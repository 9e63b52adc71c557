"""Manifold-constrained hyper-connections: n residual streams, mixed by a doubly stochastic matrix at every sublayer."""

import torch
import torch.nn.functional as F
from torch import Tensor

from atomc.models.nano.config import NanoConfig
from atomc.models.nano.layers import Weights
from atomc.models.nano.sinkhorn import sinkhorn


def hc_mix(h_BTnD: Tensor, w: Weights, name: str, eps: float) -> Tensor:
    """The coefficients before scale and base, fp32 `[B, T, rows]`; the norm is applied after the GEMM."""
    u = h_BTnD.flatten(-2)
    mix = F.linear(u, w[f"{name}_fn"].to(u.dtype)).float()
    return mix * torch.rsqrt(u.float().square().mean(-1, keepdim=True) + eps)


def hc_collapse(h_BTnD: Tensor, pre_BTn: Tensor) -> Tensor:
    """Weighted sum of the streams, `[B, T, D]`."""
    streams = h_BTnD.unbind(-2)
    x = sum(pre_BTn[..., j, None] * stream.float() for j, stream in enumerate(streams))
    assert isinstance(x, Tensor)
    return x.to(h_BTnD.dtype)


def hc_pre(h_BTnD: Tensor, w: Weights, name: str, c: NanoConfig) -> tuple[Tensor, Tensor, Tensor]:
    """The sublayer input `[B, T, D]`, `post` `[B, T, n]` and the doubly stochastic `comb` `[B, T, n, n]`."""
    n = c.hc_mult
    mix, base, scale = hc_mix(h_BTnD, w, name, c.rms_norm_eps), w[f"{name}_base"], w[f"{name}_scale"]
    pre = torch.sigmoid(mix[..., :n] * scale[0] + base[:n]) + c.hc_eps
    post = 2 * torch.sigmoid(mix[..., n : 2 * n] * scale[1] + base[n : 2 * n])
    logits = (mix[..., 2 * n :] * scale[2] + base[2 * n :]).unflatten(-1, (n, n))
    return hc_collapse(h_BTnD, pre), post, sinkhorn(logits, c.hc_sinkhorn_iters, c.hc_eps)


def hc_post(y_BTD: Tensor, h_BTnD: Tensor, post_BTn: Tensor, comb_BTnn: Tensor) -> Tensor:
    """Spelled out stream by stream: a batched 4x4 matmul would not fuse."""
    y, streams = y_BTD.float(), [stream.float() for stream in h_BTnD.unbind(-2)]
    out = []
    for k in range(len(streams)):
        mixed = post_BTn[..., k, None] * y
        for j, stream in enumerate(streams):
            mixed = mixed + comb_BTnn[..., j, k, None] * stream
        out.append(mixed)
    return torch.stack(out, -2).to(h_BTnD.dtype)


def hc_head(h_BTnD: Tensor, w: Weights, c: NanoConfig) -> Tensor:
    """The final collapse: `pre` coefficients only."""
    mix = hc_mix(h_BTnD, w, "hc_head", c.rms_norm_eps)
    return hc_collapse(h_BTnD, torch.sigmoid(mix * w["hc_head_scale"] + w["hc_head_base"]) + c.hc_eps)
