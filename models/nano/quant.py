"""Weight formats of the checkpoint, scales being powers of two: FP8 e4m3 per 128x128 tile, FP4 e2m1 per 32 columns."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from atomc.models.nano.weights import WeightSpec

TILE = 128
GROUP = 32
E4M3_MAX = 448.0
E2M1_MAX = 6.0
E8M0_BIAS = 127

# Twice the magnitude of an e2m1 value (0, 1, 2, 3, 4, 6, 8, 12) -> its three-bit code.
_E2M1_CODE = torch.tensor([0, 1, 2, 3, 4, 0, 5, 0, 6, 0, 0, 0, 7], dtype=torch.uint8)
_E2M1_VALUE = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


class Quantized(NamedTuple):
    """`values`: float8_e4m3fn `[..., o, i]`, or int8 `[..., o, i/2]` with two e2m1 codes; `scale`: float8_e8m0fnu."""

    values: Tensor
    scale: Tensor


def _exponent_above(amax: Tensor, largest: float) -> Tensor:
    """ceil(log2(amax / largest)), exactly, as int32; the smallest exponent of E8M0 where amax is zero."""
    mantissa, exponent = torch.frexp(amax.float() / largest)
    exponent = torch.where(mantissa == 0.5, exponent - 1, exponent)
    return torch.where(amax > 0, exponent, 1 - E8M0_BIAS).clamp(1 - E8M0_BIAS, E8M0_BIAS)


def _to_e8m0(exponent: Tensor) -> Tensor:
    return (exponent + E8M0_BIAS).to(torch.uint8).view(torch.float8_e8m0fnu)


def _from_e8m0(scale: Tensor) -> Tensor:
    return torch.exp2((scale.view(torch.uint8).int() - E8M0_BIAS).float())


def _tile_exponent(weight_oi: Tensor) -> Tensor:
    o, i = weight_oi.shape
    padded = F.pad(weight_oi.abs(), (0, -i % TILE, 0, -o % TILE))
    return _exponent_above(padded.unflatten(0, (-1, TILE)).unflatten(2, (-1, TILE)).amax((1, 3)), E4M3_MAX)


def _spread_tiles(scale: Tensor, shape: torch.Size) -> Tensor:
    return scale.repeat_interleave(TILE, 0)[: shape[0]].repeat_interleave(TILE, 1)[:, : shape[1]]


def quantize_fp8(weight_oi: Tensor) -> Quantized:
    """Of `[o, i]`; edge tiles may be smaller."""
    exponent = _tile_exponent(weight_oi)
    scale = _spread_tiles(torch.exp2(exponent.float()), weight_oi.shape)
    return Quantized((weight_oi.float() / scale).to(torch.float8_e4m3fn), _to_e8m0(exponent))


def dequantize_fp8(q: Quantized) -> Tensor:
    """fp32 `[o, i]`."""
    return q.values.float() * _spread_tiles(_from_e8m0(q.scale), q.values.shape)


def _round_e2m1(x: Tensor) -> Tensor:
    """Nearest e2m1 value, ties to even, saturating."""
    magnitude = x.abs()
    step = torch.where(magnitude < 2, 0.5, torch.where(magnitude < 4, 1.0, 2.0))
    return ((magnitude / step).round() * step).clamp(max=E2M1_MAX).copysign(x)


def _round_fp4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """e2m1 values `[..., i/32, 32]` and scale exponents `[..., i/32, 1]`.

    Of the exponent that avoids saturation and the one below it, each group takes the one with the smaller square error.
    """
    groups = weight.float().unflatten(-1, (-1, GROUP))
    high = _exponent_above(groups.abs().amax(-1, keepdim=True), E2M1_MAX)
    low = (high - 1).clamp(min=1 - E8M0_BIAS)
    rounded, errors = [], []
    for exponent in (high, low):
        scale = torch.exp2(exponent.float())
        rounded.append(_round_e2m1(groups / scale))
        errors.append((rounded[-1] * scale - groups).square().sum(-1, keepdim=True))
    take_low = errors[1] < errors[0]
    return torch.where(take_low, rounded[1], rounded[0]), torch.where(take_low, low, high)


def quantize_fp4(weight: Tensor) -> Quantized:
    """The low nibble of a byte holds the even column."""
    values, exponent = _round_fp4(weight)
    table = _E2M1_CODE.to(weight.device)
    code = table[(values.abs() * 2).long()] | (torch.signbit(values).to(torch.uint8) << 3)
    low, high = code.flatten(-2).unflatten(-1, (-1, 2)).unbind(-1)
    return Quantized((low | (high << 4)).view(torch.int8), _to_e8m0(exponent.squeeze(-1)))


def dequantize_fp4(q: Quantized) -> Tensor:
    """fp32 `[..., o, i]`."""
    packed = q.values.view(torch.uint8)
    code = torch.stack([packed & 15, packed >> 4], -1).flatten(-2)
    table = _E2M1_VALUE.to(packed.device)
    values = torch.cat([table, -table])[code.long()]
    weight: Tensor = values.unflatten(-1, (-1, GROUP)) * _from_e8m0(q.scale)[..., None]
    return weight.flatten(-2)


def round_trip(weight: Tensor, spec: WeightSpec) -> Tensor:
    """The fp32 value a weight has once shipped."""
    if spec.format == "fp8":
        return dequantize_fp8(quantize_fp8(weight))
    if spec.format == "fp4":
        values, exponent = _round_fp4(weight)
        return (values * torch.exp2(exponent.float())).flatten(-2)
    return weight.bfloat16().float() if spec.format == "bf16" else weight


def shipped_weights(weights: Mapping[str, Tensor], specs: Mapping[str, WeightSpec]) -> dict[str, Tensor]:
    """Every weight rounded to its storage format."""
    return {name: round_trip(value, specs[name]) for name, value in weights.items()}
