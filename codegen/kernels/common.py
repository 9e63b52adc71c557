"""What kernels share: scales as powers of two, E8M0 and E2M1 decoding, inside a kernel (spec 3.2, 3.4)."""

from __future__ import annotations

import triton
import triton.language as tl


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
def group_scale(amax, FLOOR: tl.constexpr, TOP: tl.constexpr):
    """The scale of groups with those largest magnitudes: a power of two, rounded up (spec 3.4)."""
    return power_of_two_above(tl.math.div_rn(tl.maximum(amax, FLOOR), TOP + 0.0 * amax))


@triton.jit
def e2m1_value(code):
    """float32 of e2m1 codes 0 .. 15 (integers): magnitudes 0, .5, 1, 1.5, 2, 3, 4, 6; bit 3 is the sign."""
    c = code.to(tl.int32)
    magnitude = c & 7
    # As a float32: exponent field and a mantissa bit moved into place, times 2^126; 0.5, a subnormal, comes out right.
    bits = (magnitude << 22) | ((c & 8) << 28)
    return bits.to(tl.float32, bitcast=True) * 8.507059173023462e37  # 2^126
