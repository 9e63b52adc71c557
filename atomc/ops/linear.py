"""The linear layers that stay in full precision: router, compressors, index weights, lm head (spec 2.5 - 2.8)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from atomc.ops.registry import define


@define(
    "linear_fp32(Tensor x, Tensor weight) -> Tensor",
    tokens="x",
    spec="2.5-2.8, 6.1 K7, K20",
    fake=lambda x, weight: x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=torch.float32),
)
def linear_fp32(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`x @ weightᵀ` in fp32 of x [..., K] and weight [N, K], each bf16 or fp32: nothing is rounded before the sums."""
    return F.linear(x.float(), weight.float())
