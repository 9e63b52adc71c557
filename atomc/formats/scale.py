"""Scales: E8M0 (a power of two in a byte), and the rules by which a block's scale follows from its largest magnitude.

All powers of two are made from the bits of a float32, never from a floating logarithm, so they are exact.
"""

from __future__ import annotations

from typing import Final, Literal

import torch
from torch import Tensor

# e8m0: a byte, 2^(byte - 127), rounded up. float32: amax / largest as it is. pow2: as e8m0, but stored as a float32.
Scale = Literal["e8m0", "float32", "pow2"]

E8M0_BIAS: Final = 127
E8M0_NAN: Final = 0xFF
_MANTISSA: Final = 0x007F_FFFF
_EXPONENT: Final = 0x7F80_0000


def decode_e8m0(scale: Tensor) -> Tensor:
    """float32 values `2^(byte - 127)` of an E8M0 tensor (float8_e8m0fnu or its bytes, uint8); byte 0xFF is NaN."""
    byte = scale.view(torch.uint8).to(torch.int32)
    # A byte is the exponent field of a float32; 2^-127 alone lies below the normal numbers, at half of 2^-126.
    bits = torch.where(byte == 0, 0x0040_0000, byte << 23)
    return torch.where(byte == E8M0_NAN, 0x7FC0_0000, bits).view(torch.float32)


def encode_e8m0(power: Tensor) -> Tensor:
    """float8_e8m0fnu of float32 powers of two 2^-126 .. 2^127; inf and NaN give the NaN code 0xFF."""
    return (power.view(torch.int32) >> 23).to(torch.uint8).view(torch.float8_e8m0fnu)


def power_of_two_above(ratio: Tensor) -> Tensor:
    """The smallest power of two not below `ratio` (float32 >= 0), at least 2^-126; 0 gives 1, inf and NaN give inf.

    Of `amax / largest` it is exactly 2^ceil(log2(amax / largest)): the next float32 above m 2^k, divided by m 2^j with
    1 <= m < 2, is more than half a unit above 2^(k-j), so a quotient is never rounded onto or across a power of two.
    That holds of a division only: a product with 1 / 127 is a binade too low just above every 127 x 2^k.
    """
    bits = (ratio.view(torch.int32) + _MANTISSA).bitwise_and_(_EXPONENT)
    # NaN's bits carry into the sign; masked, they are an exponent of zero: put the mark back.
    bits = torch.where(ratio.isfinite(), bits, _EXPONENT)
    return torch.where(bits == 0, 0x3F80_0000, bits).view(torch.float32)


def block_scale(amax: Tensor, largest: float, kind: Scale) -> Tensor:
    """float32 scale of blocks whose largest magnitude is `amax` (float32 >= 0): what brings it to at most `largest`.

    A block of zeros has scale 1, any other at least 2^-126 (a quotient below the normal numbers has no precision left).
    A block with inf or NaN has scale inf, which no code survives: it decodes to NaN.
    """
    # Divided by a tensor: CUDA makes a division by a number a product with its reciprocal.
    ratio = (amax / amax.new_full((), largest)).clamp(min=2.0**-126)
    scale = ratio if kind == "float32" else power_of_two_above(ratio)
    return torch.where(amax.isfinite(), torch.where(amax == 0, 1.0, scale), torch.inf)


def store_scale(scale: Tensor, kind: Scale) -> Tensor:
    """A scale as it is stored: float8_e8m0fnu, or float32 with NaN where a block has no finite scale."""
    if kind == "e8m0":
        return encode_e8m0(scale)
    return torch.where(scale.isfinite(), scale, torch.nan)


def check_scales(stored: Tensor) -> None:
    """Raise `ValueError` unless the dtype is one that scales are stored in."""
    if stored.dtype not in (torch.float8_e8m0fnu, torch.float32, torch.bfloat16):
        found = str(stored.dtype).removeprefix("torch.")
        raise ValueError(f"scales are float8_e8m0fnu, float32 or bfloat16, not {found}")


def load_scale(stored: Tensor) -> Tensor:
    """float32 values of stored scales: float8_e8m0fnu, float32, or bfloat16 (some Base releases).

    Raises:
        ValueError: any other dtype.
    """
    check_scales(stored)
    return decode_e8m0(stored) if stored.dtype == torch.float8_e8m0fnu else stored.float()
