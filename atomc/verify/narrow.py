"""What an FP8 product on Hopper loses: its matrix unit adds with 13 bits below the largest term.

A step of the unit takes 32 products and the sum so far, exactly; aligns them to the largest exponent among them, cuts
each off 13 bits below it, towards zero, and does the same with their sum (measured: "FP22", e8m13; DeepSeek-V3, section
3.3.2, which is why every block of 128 is added in fp32). Of a block of 128 columns:

    unit      2^-13 · the largest of |x||w| and |sum so far|: what one number may lose, 0 .. unit, half of it on average
    cut       the products that are not 0, 128 at most; in each of 4 steps the sum so far, and the new sum
    bias      ½ unit for each number cut, against its sign: products of either sign cancel
    spread    unit · √(numbers cut / 12): the standard deviation of so many losses; of blocks, added in quadrature

A product that scales each 32 columns in fp32, or multiplies in bf16, loses less. Targets whose unit keeps fp32's bits,
and the cpu, lose nothing here.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

BLOCK: Final = 128  # columns whose sum is added in fp32 by every kernel
STEP: Final = 32
KEPT: Final = 2.0**-13
SPREADS: Final = 6.0  # standard deviations: of a few million sums none is further off
FP8: Final = (torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz)


def loss(x: Tensor, w: Tensor) -> Tensor:
    """How far x wᵀ may be off: [..., T, N] of float64 x [..., T, K] and w [..., N, K], values of FP8 codes."""
    sums = 2 * BLOCK // STEP
    bias, spread = (x.new_zeros((*x.shape[:-1], w.shape[-2])) for _ in range(2))
    for at in range(0, x.shape[-1], BLOCK):
        a, b = x[..., at : at + BLOCK], w[..., at : at + BLOCK]
        largest = _outer(a.abs().amax(-1), b.abs().amax(-1))
        total, signs = torch.zeros_like(bias), (a.sign(), b.sign())
        for k in range(0, a.shape[-1], STEP):
            total = total + a[..., k : k + STEP] @ b[..., k : k + STEP].mT
            largest = torch.maximum(largest, total.abs())
        unit = KEPT * largest
        bias += unit * (signs[0] @ signs[1].mT + sums * total.sign()) / 2
        spread += unit.square() * (signs[0].abs() @ signs[1].abs().mT + sums) / 12
    return bias.abs() + SPREADS * spread.sqrt()


def _outer(a: Tensor, b: Tensor) -> Tensor:
    return a.unsqueeze(-1) * b.unsqueeze(-2)
