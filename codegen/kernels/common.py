"""What kernels share, inside a kernel: scales as powers of two, E8M0 and E2M1 decoding, cosines (spec 2.2, 3.2)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

ASM = not triton.knobs.runtime.interpret  # assembly has no interpreter
TL = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def power_of_two_above(ratio):
    """The smallest power of two not below a positive float32, at least 2^-126 (`atomc.formats.scale`)."""
    bits = (ratio.to(tl.int32, bitcast=True) + 0x007FFFFF) & 0x7F800000
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def inverse_power(scale):
    """1 / scale of a power of two 2^-126 .. 2^126, exact."""
    return (0x7F000000 - scale.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)


@triton.jit
def e8m0_byte(scale):
    """The E8M0 byte of a power of two."""
    return (scale.to(tl.int32, bitcast=True) >> 23).to(tl.uint8)


@triton.jit
def e8m0_value(byte):
    """2^(byte - 127) as float32; byte 0xFF gives NaN."""
    wide = byte.to(tl.int32)
    bits = tl.where(wide == 0, 0x00400000, wide << 23)
    return tl.where(wide == 255, 0x7FC00000, bits).to(tl.float32, bitcast=True)


@triton.jit
def e2m1_value(code):
    """float32 of e2m1 codes 0 .. 15 (integers): magnitudes 0, .5, 1, 1.5, 2, 3, 4, 6; bit 3 is the sign."""
    c = code.to(tl.int32)
    magnitude = c & 7
    # As a float32: exponent field and a mantissa bit moved into place, times 2^126; 0.5, a subnormal, comes out right.
    bits = (magnitude << 22) | ((c & 8) << 28)
    return bits.to(tl.float32, bitcast=True) * 8.507059173023462e37  # 2^126


@triton.jit
def turn(theta):
    """cos and sin of fp32 angles below 2^28, off by less than 2e-7.

    The compiler's own are as accurate, but keep a table in memory for arguments that do not occur here. Quarter turns
    are taken off in fp64, for a few numbers a token.
    """
    wide = theta.to(tl.float64)
    k = tl.floor(wide * 0.6366197723675814 + 0.5)
    r = (wide - k * 1.5707963267948966).to(tl.float32)
    z = r * r
    s = r + r * z * (-1.6666654611e-1 + z * (8.3321608736e-3 + z * -1.9515295891e-4))
    c = 1.0 - 0.5 * z + z * z * (4.166664568298827e-2 + z * (-1.388731625493765e-3 + z * 2.443315711809948e-5))
    quarter = k.to(tl.int32)
    odd = (quarter & 1) == 1
    cos, sin = tl.where(odd, s, c), tl.where(odd, c, s)
    return tl.where(((quarter + 1) & 2) == 2, -cos, cos), tl.where((quarter & 2) == 2, -sin, sin)


@triton.jit
def cosine(theta):
    """The cosine, see `turn`."""
    return turn(theta)[0]


@triton.jit
def sine(theta):
    """The sine, see `turn`."""
    return turn(theta)[1]
