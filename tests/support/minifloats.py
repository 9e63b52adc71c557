"""The number formats from their definitions, in rational arithmetic, and nearest-even encoding by comparison alone.

Independent of `atomc.formats`: definitions are those of OCP's 8-bit floating point (OFP8) and microscaling (MX)
specifications and, for FNUZ, of the bias plus one, no -0, one NaN at 0x80. Encoding counts the midpoints between
neighbours that lie below a magnitude; a midpoint itself goes to the even code. No rounding happens anywhere in it.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from fractions import Fraction
from functools import cache, cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# What a code stands for: a number, -0, an infinity or NaN, the last three as floats.
Value = Fraction | float


@dataclass(frozen=True)
class Definition:
    """A binary format of 1 + exponent + mantissa bits. `ieee`: the top exponent holds inf and NaN."""

    exponent: int
    mantissa: int
    bias: int
    ieee: bool = False
    fnuz: bool = False
    nans: tuple[int, ...] = ()

    @property
    def sign(self) -> int:
        return 1 << (self.exponent + self.mantissa)

    def value(self, code: int) -> Value:
        if code in self.nans:
            return math.nan
        sign = -1 if code & self.sign else 1
        field, fraction = code >> self.mantissa & ((1 << self.exponent) - 1), code & ((1 << self.mantissa) - 1)
        if self.ieee and field == (1 << self.exponent) - 1:
            return math.nan if fraction else sign * math.inf
        significand = Fraction(fraction, 1 << self.mantissa) + (field > 0)
        number = sign * significand * Fraction(2) ** (max(field, 1) - self.bias)
        return -0.0 if number == 0 and sign < 0 else number

    @cached_property
    def magnitudes(self) -> list[Fraction]:
        """Of the codes 0, 1, 2, ... as far as they are finite."""
        values = (self.value(code) for code in range(self.sign))
        return [v for v in values if isinstance(v, Fraction)]

    def negative(self, code: NDArray[np.int64]) -> NDArray[np.int64]:
        """Codes of the negated numbers."""
        return np.where(code == 0, 0, code | self.sign) if self.fnuz else code | self.sign


@dataclass(frozen=True)
class Integer:
    """int8 without -128."""

    def value(self, code: int) -> Value:
        return Fraction(code - 256 if code & 0x80 else code)

    @cached_property
    def magnitudes(self) -> list[Fraction]:
        return [Fraction(n) for n in range(128)]

    def negative(self, code: NDArray[np.int64]) -> NDArray[np.int64]:
        return -code & 0xFF


DEFINITIONS: dict[str, Definition | Integer] = {
    "e4m3": Definition(4, 3, 7, nans=(0x7F, 0xFF)),
    "e4m3fnuz": Definition(4, 3, 8, fnuz=True, nans=(0x80,)),
    "e5m2": Definition(5, 2, 15, ieee=True),
    "e5m2fnuz": Definition(5, 2, 16, fnuz=True, nans=(0x80,)),
    "e2m1": Definition(2, 1, 1),
    "int8": Integer(),
}


def exactly(x: Value) -> float:
    """The float64 that a number is; it is one, or this is a fault of the test."""
    assert not isinstance(x, Fraction) or Fraction(float(x)) == x
    return float(x)


@cache
def midpoints(name: str) -> NDArray[np.float64]:
    """Between neighbouring magnitudes."""
    return np.array([exactly((a + b) / 2) for a, b in itertools.pairwise(DEFINITIONS[name].magnitudes)])


def encoded(name: str, x: Tensor) -> Tensor:
    """uint8 codes of float x: nearest, ties to even, saturating. NaN has no code here: leave it out."""
    values, middles = x.double().numpy(), midpoints(name)
    below = np.searchsorted(middles, np.abs(values), side="left")
    upto = np.searchsorted(middles, np.abs(values), side="right")
    code = np.where((below != upto) & (below % 2 == 1), upto, below)
    code = np.where(np.signbit(values), DEFINITIONS[name].negative(code), code)
    return torch.from_numpy(code.astype(np.uint8))


def decoded(name: str, codes: Tensor) -> Tensor:
    """float64 values of codes (uint8)."""
    table = [exactly(DEFINITIONS[name].value(code)) for code in range(16 if name == "e2m1" else 256)]
    return torch.tensor(table, dtype=torch.float64)[codes.long()]


def ceil_log2(x: Fraction) -> int:
    """The least e with x <= 2^e."""
    e = x.numerator.bit_length() - x.denominator.bit_length()
    while x > Fraction(2) ** e:
        e += 1
    while x <= Fraction(2) ** (e - 1):
        e -= 1
    return e


def with_neighbours(x: Tensor) -> Tensor:
    """float32 x, and of each the next number below and above."""
    return torch.cat([x, x.nextafter(torch.tensor(-math.inf)), x.nextafter(torch.tensor(math.inf))])
