"""Manifold-constrained hyper-connections, mHC (spec 2.1): pre, post, head, and the fusions of spec 6.1 K2-K5."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from atomc.ops.norm import rms_norm
from atomc.ops.quantize import pair_like, quantize
from atomc.ops.registry import define

Pre = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def sinkhorn(comb: torch.Tensor, hc_eps: float, iters: int) -> torch.Tensor:
    """Project positive matrices [..., n, n] towards the doubly stochastic ones; ends with a column step."""
    comb = comb / (comb.sum(dim=-2, keepdim=True) + hc_eps)
    for _ in range(iters - 1):
        comb = comb / (comb.sum(dim=-1, keepdim=True) + hc_eps)
        comb = comb / (comb.sum(dim=-2, keepdim=True) + hc_eps)
    return comb


def coefficients(mix: torch.Tensor, base: torch.Tensor, scale: torch.Tensor, n: int, hc_eps: float, iters: int) -> Pre:
    """Pre [..., n], post [..., n] and comb [..., n, n] from the 2n + n^2 mixing logits (spec 2.1, steps 3-6)."""
    pre_m, post_m, comb_m = mix.split([n, n, n * n], dim=-1)
    pre_b, post_b, comb_b = base.split([n, n, n * n])
    pre_s, post_s, comb_s = scale.unbind(0)
    pre = torch.sigmoid(pre_m * pre_s + pre_b) + hc_eps
    post = 2 * torch.sigmoid(post_m * post_s + post_b)
    comb = torch.softmax(comb_m.unflatten(-1, (n, n)) * comb_s + comb_b.view(n, n), dim=-1) + hc_eps
    return pre, post, sinkhorn(comb, hc_eps, iters)


def _pre_fake(h: torch.Tensor, *_: object) -> Pre:
    """Shapes of the three results; the reference itself would run 40 steps on fakes for them."""
    n, lead = h.shape[-2], h.shape[:-2]
    f32 = torch.float32
    return h.new_empty((*lead, h.shape[-1])), h.new_empty((*lead, n), dtype=f32), h.new_empty((*lead, n, n), dtype=f32)


def _post_pre_fake(h: torch.Tensor, *_: object) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    return h.new_empty(h.shape), *_pre_fake(h)


@define(
    "hc_pre(Tensor h, Tensor fn, Tensor base, Tensor scale, float norm_eps, float hc_eps, int iters)"
    " -> (Tensor, Tensor, Tensor)",
    tokens="h",
    spec="2.1, 6.1 K1-K2",
    fake=_pre_fake,
)
def hc_pre(
    h: torch.Tensor,
    fn: torch.Tensor,
    base: torch.Tensor,
    scale: torch.Tensor,
    norm_eps: float,
    hc_eps: float,
    iters: int,
) -> Pre:
    """Collapse n residual streams into the input of a sublayer.

    Args:
        h: [..., n, D] streams. fn: [2n + n^2, nD] fp32. base: [2n + n^2] fp32. scale: [3] fp32.
    Returns:
        x [..., D] in h's dtype, post [..., n] fp32, comb [..., n, n] fp32.
    """
    u = h.flatten(-2).float()
    mix = F.linear(u, fn) * torch.rsqrt(u.square().mean(-1, keepdim=True) + norm_eps)
    pre, post, comb = coefficients(mix, base, scale, h.shape[-2], hc_eps, iters)
    x = (pre.unsqueeze(-1) * h).sum(dim=-2).to(h.dtype)
    return x, post, comb


@define("hc_post(Tensor h, Tensor y, Tensor post, Tensor comb) -> Tensor", tokens="h", spec="2.1, 6.1 K3")
def hc_post(h: torch.Tensor, y: torch.Tensor, post: torch.Tensor, comb: torch.Tensor) -> torch.Tensor:
    """`h'[k] = post_k * y + sum_j comb[j][k] * h[j]` in fp32, cast to h's dtype.

    Args:
        h: [..., n, D]. y: [..., D], the sublayer's output. post: [..., n]. comb: [..., n, n].
    """
    mixed = torch.matmul(comb.transpose(-1, -2), h.float())
    return (post.unsqueeze(-1) * y.unsqueeze(-2) + mixed).to(h.dtype)


@define(
    "hc_head(Tensor h, Tensor fn, Tensor base, Tensor scale, float norm_eps, float hc_eps) -> Tensor",
    tokens="h",
    spec="2.1, 6.1 K5",
)
def hc_head(
    h: torch.Tensor, fn: torch.Tensor, base: torch.Tensor, scale: torch.Tensor, norm_eps: float, hc_eps: float
) -> torch.Tensor:
    """Collapse the streams before the final norm: h [..., n, D], fn [n, nD], base [n], scale [1] -> [..., D]."""
    u = h.flatten(-2).float()
    mix = F.linear(u, fn) * torch.rsqrt(u.square().mean(-1, keepdim=True) + norm_eps)
    pre = torch.sigmoid(mix * scale + base) + hc_eps
    return (pre.unsqueeze(-1) * h).sum(dim=-2).to(h.dtype)


@define(
    "hc_pre_norm(Tensor h, Tensor fn, Tensor base, Tensor scale, Tensor weight, float norm_eps, float hc_eps,"
    " int iters) -> (Tensor, Tensor, Tensor)",
    tokens="h",
    spec="6.1 K2",
    fake=_pre_fake,
)
def hc_pre_norm(
    h: torch.Tensor,
    fn: torch.Tensor,
    base: torch.Tensor,
    scale: torch.Tensor,
    weight: torch.Tensor,
    norm_eps: float,
    hc_eps: float,
    iters: int,
) -> Pre:
    """`hc_pre`, then the sublayer's RMSNorm with `weight` [D]."""
    x, post, comb = hc_pre(h, fn, base, scale, norm_eps, hc_eps, iters)
    return rms_norm(x, weight, norm_eps), post, comb


@define(
    "hc_post_pre_norm(Tensor h, Tensor y, Tensor post, Tensor comb, Tensor fn, Tensor base, Tensor scale,"
    " Tensor weight, float norm_eps, float hc_eps, int iters) -> (Tensor, Tensor, Tensor, Tensor)",
    tokens="h",
    spec="6.1 K4",
    fake=_post_pre_fake,
)
def hc_post_pre_norm(
    h: torch.Tensor,
    y: torch.Tensor,
    post: torch.Tensor,
    comb: torch.Tensor,
    fn: torch.Tensor,
    base: torch.Tensor,
    scale: torch.Tensor,
    weight: torch.Tensor,
    norm_eps: float,
    hc_eps: float,
    iters: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Post of one sublayer, pre and norm of the next: -> updated streams, normed input, new post, new comb."""
    h = hc_post(h, y, post, comb)
    x, post, comb = hc_pre_norm(h, fn, base, scale, weight, norm_eps, hc_eps, iters)
    return h, x, post, comb


Quantised = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def _post_pre_quant_fake(h: torch.Tensor, *args: object) -> Quantised:
    layout = args[-1]
    assert isinstance(layout, str)
    return *_post_pre_fake(h), *pair_like(h, (*h.shape[:-2], h.shape[-1]), layout)


@define(
    "hc_post_pre_norm_quant(Tensor h, Tensor y, Tensor post, Tensor comb, Tensor fn, Tensor base, Tensor scale,"
    " Tensor weight, float norm_eps, float hc_eps, int iters, str layout)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    tokens="h",
    spec="3.4, 6.1 K4",
    fake=_post_pre_quant_fake,
)
def hc_post_pre_norm_quant(
    h: torch.Tensor,
    y: torch.Tensor,
    post: torch.Tensor,
    comb: torch.Tensor,
    fn: torch.Tensor,
    base: torch.Tensor,
    scale: torch.Tensor,
    weight: torch.Tensor,
    norm_eps: float,
    hc_eps: float,
    iters: int,
    layout: str,
) -> Quantised:
    """`hc_post_pre_norm`, the normed input also quantised: -> its four results, then codes and scales of x."""
    results = hc_post_pre_norm(h, y, post, comb, fn, base, scale, weight, norm_eps, hc_eps, iters)
    return *results, *quantize(results[1], layout)


@define(
    "hc_head_norm(Tensor h, Tensor fn, Tensor base, Tensor scale, Tensor weight, float norm_eps, float hc_eps)"
    " -> Tensor",
    tokens="h",
    spec="6.1 K5",
)
def hc_head_norm(
    h: torch.Tensor,
    fn: torch.Tensor,
    base: torch.Tensor,
    scale: torch.Tensor,
    weight: torch.Tensor,
    norm_eps: float,
    hc_eps: float,
) -> torch.Tensor:
    """`hc_head`, then the final RMSNorm with `weight` [D]."""
    return rms_norm(hc_head(h, fn, base, scale, norm_eps, hc_eps), weight, norm_eps)
