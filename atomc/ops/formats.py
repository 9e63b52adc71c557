"""Number formats of DeepSeek-V4 weights and activations: E8M0 scales, FP8 e4m3 tiles, FP4 e2m1 groups (spec 3.2, 3.4).

All scales are exact powers of two, found from the bits of the largest magnitude (never from a floating log2).
Large matrices are expanded a band of rows at a time, so that dequantising needs the input, the output and little else.
"""

import math
from collections.abc import Iterator
from typing import Final

import torch
from torch import Tensor

TILE: Final = 128  # FP8 weights: one scale per TILE x TILE
GROUP: Final = 32  # FP4: one scale per GROUP consecutive columns
E4M3_MAX: Final = 448.0
E2M1_MAX: Final = 6.0
E8M0_BIAS: Final = 127
E8M0_NAN: Final = 0xFF

_E2M1: Final = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_BAND: Final = 1 << 20  # elements expanded at a time


def decode_e8m0(scale: Tensor) -> Tensor:
    """float32 values `2^(byte - 127)` of an E8M0 tensor (float8_e8m0fnu or its bytes, uint8); byte 0xFF is NaN."""
    byte = scale.view(torch.uint8).to(torch.int32)
    # A byte is the exponent field of a float32; 2^-127 alone lies below the normal numbers, at half of 2^-126.
    bits = torch.where(byte == 0, 0x0040_0000, byte << 23)
    return torch.where(byte == E8M0_NAN, 0x7FC0_0000, bits).view(torch.float32)


def encode_e8m0(exponent: Tensor) -> Tensor:
    """float8_e8m0fnu of integer exponents -127 .. 127 (2^exponent); 128 is the NaN code."""
    return (exponent + E8M0_BIAS).to(torch.uint8).view(torch.float8_e8m0fnu)


def scale_exponent(amax: Tensor, largest: float) -> Tensor:
    """int32 `ceil(log2(amax / largest))`, exact: the smallest power of two that brings amax to at most `largest`.

    amax: float32 >= 0. Zero gives 0 (scale 1), inf and NaN give 128 (the NaN code of E8M0); others lie in -126 .. 127.
    """
    mantissa, exponent = torch.frexp(amax)
    bound_mantissa, bound_exponent = math.frexp(largest)
    # amax = m·2^e and largest = M·2^E with m, M in [0.5, 1): the ratio exceeds 2^(e-E) exactly if m > M.
    exponent = exponent - bound_exponent + (mantissa > bound_mantissa)
    exponent = torch.where(amax > 0, exponent.clamp(-126, 127), 0)
    return torch.where(amax.isfinite(), exponent, E8M0_NAN - E8M0_BIAS).to(torch.int32)


def quantize_fp8_block(weight: Tensor) -> tuple[Tensor, Tensor]:
    """FP8 of [..., o, i]: float8_e4m3fn [..., o, i] and float8_e8m0fnu [..., ceil(o/128), ceil(i/128)] (spec 3.2).

    Scale `2^ceil(log2(amax/448))` per tile, round to nearest even. A tile with inf or NaN gets the NaN scale.
    """
    rows, columns = weight.shape[-2:]
    flat = weight.detach().reshape(-1, rows, columns).float()
    padded = torch.nn.functional.pad(flat.abs(), (0, -columns % TILE, 0, -rows % TILE))
    amax = padded.unflatten(1, (-1, TILE)).unflatten(3, (-1, TILE)).amax((2, 4))
    scale = encode_e8m0(scale_exponent(amax, E4M3_MAX))
    values = torch.empty(flat.shape, dtype=torch.float8_e4m3fn, device=weight.device)
    for m, start, stop, factor in _tile_bands(decode_e8m0(scale), rows, columns):
        values[m, start:stop] = _to_e4m3(flat[m, start:stop] / factor)
    return values.view(weight.shape), scale.view(*weight.shape[:-2], *scale.shape[1:])


def dequantize_fp8_block(weight: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Values [..., o, i] of an FP8 weight; scale [..., ceil(o/128), ceil(i/128)] as E8M0, or float (Base releases).

    Every e4m3 value times a power of two is exact in float32 and in bfloat16. Raises `ValueError` on shapes or dtypes
    that are not this format.
    """
    if weight.dtype != torch.float8_e4m3fn:
        raise ValueError(f"an FP8 weight is float8_e4m3fn, not {weight.dtype}")
    rows, columns = weight.shape[-2:]
    expected = (*weight.shape[:-2], -(-rows // TILE), -(-columns // TILE))
    if tuple(scale.shape) != expected:
        raise ValueError(f"FP8 weight {tuple(weight.shape)} needs scales {expected}, found {tuple(scale.shape)}")
    flat = weight.reshape(-1, rows, columns)
    factors = _scale_values(scale).reshape(-1, *expected[-2:])
    out = torch.empty(flat.shape, dtype=dtype, device=weight.device)
    for m, start, stop, factor in _tile_bands(factors, rows, columns):
        out[m, start:stop] = flat[m, start:stop].float() * factor
    return out.view(weight.shape)


def _tile_bands(factors: Tensor, rows: int, columns: int) -> Iterator[tuple[int, int, int, Tensor]]:
    """(matrix, first row, end row, factors [rows of the band, columns]) over factors [M, ceil(o/128), ceil(i/128)]."""
    tiles = max(1, _BAND // max(1, TILE * columns))
    for m in range(factors.shape[0]):
        for first in range(0, factors.shape[1], tiles):
            start, stop = first * TILE, min((first + tiles) * TILE, rows)
            wide = factors[m, first : first + tiles].repeat_interleave(TILE, 1)[:, :columns]
            yield m, start, stop, wide.repeat_interleave(TILE, 0)[: stop - start]


def _scale_values(scale: Tensor) -> Tensor:
    if scale.dtype == torch.float8_e8m0fnu:
        return decode_e8m0(scale)
    if scale.dtype in (torch.float32, torch.bfloat16):
        return scale.float()
    raise ValueError(f"scales are float8_e8m0fnu, float32 or bfloat16, not {scale.dtype}")


def _to_e4m3(x: Tensor) -> Tensor:
    return x.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def quantize_fp8_group(x: Tensor, group: int, amax_floor: float = 1e-4) -> tuple[Tensor, Tensor]:
    """FP8 of activations [..., K]: float8_e4m3fn [..., K], one float8_e8m0fnu scale per `group` (spec 3.4).

    amax is floored at `amax_floor`. Raises `ValueError` if `group` does not divide K.
    """
    grouped = _in_groups(x, group)
    amax = grouped.abs().amax(-1).clamp(min=amax_floor)
    scale = encode_e8m0(scale_exponent(amax, E4M3_MAX))
    return _to_e4m3(grouped / decode_e8m0(scale).unsqueeze(-1)).flatten(-2), scale


def dequantize_fp8_group(values: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Inverse of `quantize_fp8_group`; the group width is the ratio of the last dimensions."""
    grouped: Tensor = values.unflatten(-1, (scale.shape[-1], -1)).float()
    return (grouped * _scale_values(scale).unsqueeze(-1)).flatten(-2).to(dtype)


def _in_groups(x: Tensor, group: int) -> Tensor:
    if x.shape[-1] % group:
        raise ValueError(f"{x.shape[-1]} columns are no multiple of the group of {group}")
    grouped: Tensor = x.detach().float().unflatten(-1, (-1, group))
    return grouped


def encode_e2m1(x: Tensor) -> Tensor:
    """uint8 codes 0 .. 15 of the nearest e2m1 values, ties to the even code, saturating at ±6; bit 3 is the sign."""
    a = x.abs()
    # Bounds are the midpoints between neighbours; a tie belongs to the even code, so >= where the upper code is even.
    code = (a > 0.25).to(torch.uint8)
    for reached in (a >= 0.75, a > 1.25, a >= 1.75, a > 2.5, a >= 3.5, a > 5.0):
        code += reached
    return code | (torch.signbit(x).to(torch.uint8) << 3)


def decode_e2m1(code: Tensor) -> Tensor:
    """float32 values of e2m1 codes (uint8, 0 .. 15)."""
    return torch.tensor((*_E2M1, *(-v for v in _E2M1)), device=code.device)[code.long()]


def pack_fp4(code: Tensor) -> Tensor:
    """int8 [..., i/2] of codes [..., i]: byte j holds column 2j in the low nibble and 2j+1 in the high (spec 3.2)."""
    if code.shape[-1] % 2:
        raise ValueError(f"{code.shape[-1]} columns cannot be packed in pairs")
    return (code[..., 0::2] | (code[..., 1::2] << 4)).view(torch.int8)


def unpack_fp4(packed: Tensor) -> Tensor:
    """uint8 codes [..., i] of packed int8 (or uint8) [..., i/2]."""
    byte = packed.view(torch.uint8)
    return torch.stack((byte & 15, byte >> 4), dim=-1).flatten(-2)


def quantize_fp4(weight: Tensor, amax_floor: float = 0.0) -> tuple[Tensor, Tensor]:
    """FP4 of [..., i]: packed int8 [..., i/2] and float8_e8m0fnu [..., i/32], scale `2^ceil(log2(amax/6))` (spec 3.2).

    Index activations floor amax at 6·2^-126 (spec 3.4). A group with inf or NaN gets the NaN scale. `ValueError` if 32
    does not divide the columns.
    """
    grouped = _in_groups(weight, GROUP)
    scale = encode_e8m0(scale_exponent(grouped.abs().amax(-1).clamp(min=amax_floor), E2M1_MAX))
    return pack_fp4(encode_e2m1(grouped / decode_e8m0(scale).unsqueeze(-1)).flatten(-2)), scale


def dequantize_fp4(packed: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Values [..., i] of packed FP4 [..., i/2] with scales [..., i/32]; exact in float32 and bfloat16.

    Raises `ValueError` on shapes or dtypes that are not this format.
    """
    if packed.dtype not in (torch.int8, torch.uint8):
        raise ValueError(f"packed FP4 is int8, not {packed.dtype}")
    expected = (*packed.shape[:-1], packed.shape[-1] * 2 // GROUP)
    if packed.shape[-1] * 2 % GROUP or tuple(scale.shape) != expected:
        raise ValueError(f"packed FP4 {tuple(packed.shape)} needs scales {expected}, found {tuple(scale.shape)}")
    bytes_, factors = packed.reshape(-1, packed.shape[-1]), _scale_values(scale).reshape(-1, expected[-1])
    pairs = decode_e2m1(unpack_fp4(torch.arange(256, dtype=torch.uint8, device=packed.device).unsqueeze(-1)))
    out = torch.empty(bytes_.shape[0], 2 * bytes_.shape[1], dtype=dtype, device=packed.device)
    step = max(1, _BAND // max(1, out.shape[1]))
    for start in range(0, out.shape[0], step):
        values = pairs[bytes_[start : start + step].view(torch.uint8).long()].flatten(-2)
        factor = factors[start : start + step].unsqueeze(-1)
        out[start : start + step] = (values.unflatten(-1, (-1, GROUP)) * factor).flatten(-2)
    return out.view(*packed.shape[:-1], out.shape[1])
