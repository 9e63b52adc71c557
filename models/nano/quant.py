"""Weight formats of the checkpoint, scales being powers of two: FP8 e4m3 per 128x128 tile, FP4 e2m1 per 32 columns."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Final, NamedTuple

import torch
from torch import Tensor

from atomc.formats import FP8_TILE, MXFP4, dequantize, quantize
from atomc.formats.element import encode_e2m1, pack_e2m1
from atomc.formats.layout import scales_of
from atomc.formats.scale import store_scale
from atomc.models.nano.weights import WeightSpec

# With a floor where the least scale begins: blocks of zeros have that one, byte 1, in what was shipped.
_FP8: Final = replace(FP8_TILE, floor=FP8_TILE.top * 2.0**-126)
_FP4: Final = replace(MXFP4, floor=MXFP4.top * 2.0**-126)


class Quantized(NamedTuple):
    """`values`: float8_e4m3fn `[..., o, i]`, or int8 `[..., o, i/2]` with two e2m1 codes; `scale`: float8_e8m0fnu."""

    values: Tensor
    scale: Tensor


def quantize_fp8(weight_oi: Tensor) -> Quantized:
    """Of `[o, i]`; edge tiles may be smaller."""
    return Quantized(*quantize(weight_oi, _FP8))


def dequantize_fp8(q: Quantized) -> Tensor:
    """fp32 `[o, i]`."""
    return dequantize(*q, FP8_TILE)


def _round_e2m1(x: Tensor) -> Tensor:
    """Nearest e2m1 value, ties to even, saturating: no table, so that a CUDA graph can hold it."""
    magnitude = x.abs()
    step = torch.where(magnitude < 2, 0.5, torch.where(magnitude < 4, 1.0, 2.0))
    return ((magnitude / step).round() * step).clamp(max=MXFP4.top).copysign(x)


def _round_fp4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """e2m1 values `[..., i/32, 32]` and fp32 scales `[..., i/32, 1]`.

    Of the scale that avoids saturation and half of it, each group takes the one with the smaller square error.
    """
    groups = weight.float().unflatten(-1, (-1, MXFP4.columns))
    high = scales_of(groups.abs().amax(-1, keepdim=True), _FP4)
    low = (high / 2).clamp(min=2.0**-126)
    rounded, errors = [], []
    for scale in (high, low):
        rounded.append(_round_e2m1(groups / scale))
        errors.append((rounded[-1] * scale - groups).square().sum(-1, keepdim=True))
    take_low = errors[1] < errors[0]
    return torch.where(take_low, rounded[1], rounded[0]), torch.where(take_low, low, high)


def quantize_fp4(weight: Tensor) -> Quantized:
    """The low nibble of a byte holds the even column."""
    values, scale = _round_fp4(weight)
    return Quantized(pack_e2m1(encode_e2m1(values).flatten(-2)), store_scale(scale.squeeze(-1), MXFP4.scale))


def dequantize_fp4(q: Quantized) -> Tensor:
    """fp32 `[..., o, i]`."""
    return dequantize(*q, MXFP4)


def round_trip(weight: Tensor, spec: WeightSpec) -> Tensor:
    """The fp32 value a weight has once shipped."""
    if spec.format == "fp8":
        return dequantize_fp8(quantize_fp8(weight))
    if spec.format == "fp4":
        values, scale = _round_fp4(weight)
        return (values * scale).flatten(-2)
    return weight.bfloat16().float() if spec.format == "bf16" else weight


def shipped_weights(weights: Mapping[str, Tensor], specs: Mapping[str, WeightSpec]) -> dict[str, Tensor]:
    """Every weight rounded to its storage format."""
    return {name: round_trip(value, specs[name]) for name, value in weights.items()}
