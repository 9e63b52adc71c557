"""Manifold-constrained hyper-connections, mHC (spec 2.1): n residual streams, mixed before and after each sublayer."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from atomc.models.deepseek_v4.config import DeepseekV4Config


class Residual(NamedTuple):
    """What travels between sublayers: the streams, and the sublayer output that has yet to be mixed into them.

    The mixing of a sublayer's output (post) is left to the reader of the residual, so that it stands next to the
    following sublayer's pre and the two fuse, across layer borders too.
    """

    h: Tensor  # [T, n, D]
    y: Tensor  # [T, D] output of the last sublayer
    post: Tensor  # [T, n] fp32
    comb: Tensor  # [T, n, n] fp32

    def streams(self) -> Tensor:
        """[T, n, D]: `h'[k] = post_k·y + Σ_j comb[j][k]·h[j]` in fp32 (HC_post)."""
        mixed = torch.matmul(self.comb.transpose(-1, -2), self.h.float())
        return (self.post.unsqueeze(-1) * self.y.unsqueeze(-2) + mixed).to(self.h.dtype)


def enter(x_TD: Tensor, n: int) -> Residual:
    """The embedding as a residual: every stream is x, and an identity mix with nothing to add leaves it so, exactly."""
    h = x_TD.unsqueeze(-2).expand(-1, n, -1).contiguous()
    zeros = torch.zeros((x_TD.shape[0], n), dtype=torch.float32, device=x_TD.device)
    eye = torch.eye(n, dtype=torch.float32, device=x_TD.device)
    return Residual(h, x_TD, zeros, eye.expand(x_TD.shape[0], n, n).contiguous())


def mix_logits(h: Tensor, fn: Tensor, eps: float) -> Tensor:
    """`(fn · u) · rsqrt(mean(u²) + eps)` with u the concatenated streams, all in fp32."""
    u = h.flatten(-2).float()
    return F.linear(u, fn) * torch.rsqrt(u.square().mean(-1, keepdim=True) + eps)


def collapse(pre: Tensor, h: Tensor) -> Tensor:
    """`Σ_j pre_j · h[j]`, accumulated in fp32: pre [T, n], h [T, n, D] -> [T, D]."""
    return (pre.unsqueeze(-1) * h).sum(dim=-2).to(h.dtype)


class HyperConnection(nn.Module):
    """HC_pre of one sublayer. fn [2n+n², nD], base [2n+n²], scale [3]: rows are pre, post, comb (row-major)."""

    def __init__(self, config: DeepseekV4Config) -> None:
        super().__init__()
        n = self.n = config.hc_mult
        self.iters, self.hc_eps, self.norm_eps = config.hc_sinkhorn_iters, config.hc_eps, config.rms_norm_eps
        rows = 2 * n + n * n
        self.fn = nn.Parameter(torch.empty(rows, n * config.hidden_size), requires_grad=False)
        self.base = nn.Parameter(torch.empty(rows), requires_grad=False)
        self.scale = nn.Parameter(torch.empty(3), requires_grad=False)

    def forward(self, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Streams [T, n, D] -> x [T, D], post [T, n], comb [T, n, n]."""
        n = self.n
        pre_m, post_m, comb_m = mix_logits(h, self.fn, self.norm_eps).split([n, n, n * n], dim=-1)
        pre_b, post_b, comb_b = self.base.split([n, n, n * n])
        pre_s, post_s, comb_s = self.scale.unbind(0)
        pre = torch.sigmoid(pre_m * pre_s + pre_b) + self.hc_eps
        post = 2 * torch.sigmoid(post_m * post_s + post_b)
        comb = self.sinkhorn(comb_m.unflatten(-1, (n, n)) * comb_s + comb_b.view(n, n))
        return collapse(pre, h), post, comb

    def sinkhorn(self, a: Tensor) -> Tensor:
        """Doubly stochastic projection of logits [T, n, n]: softmax rows, columns, then rows and columns in turn."""
        a = torch.softmax(a, dim=-1) + self.hc_eps
        a = a / (a.sum(dim=-2, keepdim=True) + self.hc_eps)
        for _ in range(self.iters - 1):
            a = a / (a.sum(dim=-1, keepdim=True) + self.hc_eps)
            a = a / (a.sum(dim=-2, keepdim=True) + self.hc_eps)
        return a


class HyperHead(nn.Module):
    """HC_head: the final collapse of the streams. fn [n, nD], base [n], scale [1]."""

    def __init__(self, config: DeepseekV4Config) -> None:
        super().__init__()
        n = config.hc_mult
        self.hc_eps, self.norm_eps = config.hc_eps, config.rms_norm_eps
        self.fn = nn.Parameter(torch.empty(n, n * config.hidden_size), requires_grad=False)
        self.base = nn.Parameter(torch.empty(n), requires_grad=False)
        self.scale = nn.Parameter(torch.empty(1), requires_grad=False)

    def forward(self, h: Tensor) -> Tensor:
        pre = torch.sigmoid(mix_logits(h, self.fn, self.norm_eps) * self.scale + self.base) + self.hc_eps
        return collapse(pre, h)
