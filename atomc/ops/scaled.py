"""Products of quantised operands (spec 3.4): what a target with narrow matrix instructions runs; the codes stay packed.

The meaning is the product of the dequantised operands, accumulated in fp32: codes are exact in fp32, and so is each of
their products, so that a kernel may multiply codes and scale the sums of a block.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from atomc.ops.experts import by_expert, weighted_swiglu
from atomc.ops.quantize import dequantize, quantize
from atomc.ops.registry import define

F32 = torch.float32


@define(
    "scaled_linear(Tensor codes, Tensor scales, Tensor weight, Tensor weight_scales, str layout, str weight_layout,"
    " ScalarType dtype) -> Tensor",
    tokens="codes",
    spec="3.4, 6.1 K6",
    fake=lambda codes, _s, weight, _w, _l, _wl, dtype: codes.new_empty(
        (*codes.shape[:-1], weight.shape[0]), dtype=dtype
    ),
)
def scaled_linear(
    codes: torch.Tensor,
    scales: torch.Tensor,
    weight: torch.Tensor,
    weight_scales: torch.Tensor,
    layout: str,
    weight_layout: str,
    dtype: torch.dtype,
) -> torch.Tensor:
    """`x @ weightᵀ` of a quantised x [..., K] and weight [N, K] -> [..., N] in `dtype`."""
    x, w = dequantize(codes, scales, layout, F32), dequantize(weight, weight_scales, weight_layout, F32)
    return F.linear(x, w).to(dtype)


@define(
    "scaled_grouped_output(Tensor codes, Tensor scales, Tensor weight, Tensor weight_scales, str layout,"
    " str weight_layout, ScalarType dtype) -> Tensor",
    tokens="codes",
    spec="2.4, 6.1 K18",
    fake=lambda codes, _s, weight, _w, _l, _wl, dtype: codes.new_empty((codes.shape[0], weight.shape[0]), dtype=dtype),
)
def scaled_grouped_output(
    codes: torch.Tensor,
    scales: torch.Tensor,
    weight: torch.Tensor,
    weight_scales: torch.Tensor,
    layout: str,
    weight_layout: str,
    dtype: torch.dtype,
) -> torch.Tensor:
    """wo_a: each group of heads times its own rows of the weight: x [T, g, K], weight [g r, K] -> [T, g r]."""
    x, w = dequantize(codes, scales, layout, F32), dequantize(weight, weight_scales, weight_layout, F32)
    z = torch.bmm(x.transpose(0, 1), w.unflatten(0, (x.shape[1], -1)).transpose(1, 2))
    return z.transpose(0, 1).flatten(1).to(dtype)


@define(
    "scaled_moe_experts(Tensor codes, Tensor scales, Tensor w13, Tensor w13_scales, Tensor w2, Tensor w2_scales,"
    " Tensor indices, Tensor weights, float limit, str layout, str inner_layout, str w13_layout, str w2_layout,"
    " ScalarType dtype) -> Tensor",
    tokens="codes",
    spec="2.8, 3.4, 6.1 K21-K22",
    fake=lambda codes, _s, _a, _b, w2, *_: codes.new_empty((codes.shape[0], w2.shape[1]), dtype=F32),
)
def scaled_moe_experts(
    codes: torch.Tensor,
    scales: torch.Tensor,
    w13: torch.Tensor,
    w13_scales: torch.Tensor,
    w2: torch.Tensor,
    w2_scales: torch.Tensor,
    indices: torch.Tensor,
    weights: torch.Tensor,
    limit: float,
    layout: str,
    inner_layout: str,
    w13_layout: str,
    w2_layout: str,
    dtype: torch.dtype,
) -> torch.Tensor:
    """`moe_experts_quant` with packed experts: codes [E, 2I, D] and [E, D, I] with their scales.

    `dtype` is what the results of both products and the input of the second are rounded to. With scales that are
    powers of two this is `moe_experts_quant` of the dequantised experts; with float32 scales, that rounds each
    dequantised number to `dtype`, and this does not.
    """
    x = dequantize(codes, scales, layout, F32)
    h = by_expert(x, w13.shape[1], indices, lambda e: dequantize(w13[e], w13_scales[e], w13_layout, F32)).to(dtype)
    a = weighted_swiglu(h, weights, limit).to(dtype)
    a = dequantize(*quantize(a, inner_layout), inner_layout, F32)
    y = by_expert(a, w2.shape[1], indices, lambda e: dequantize(w2[e], w2_scales[e], w2_layout, F32)).to(dtype)
    return y.float().sum(dim=1)
