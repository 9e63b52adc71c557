"""Rounding to a layout, and the Hadamard rotation: what other kernels end with, and operators of their own (spec 3.4).

Illegal: blocks of several rows, or of a number of columns that is no power of two: a block is a part of a power-of-two
tile. Hadamard matrices of fewer than 16 or more than 256 rows: the matrix unit's least, and no model has more.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from atomc.codegen.device import Device, cdiv, power_of_two
from atomc.codegen.kernels.common import e8m0_byte, inverse_power, power_of_two_above
from atomc.formats import Layout


def layout_constants(text: str, block: int) -> dict[str, Any]:
    """What `quantize_row` must know of a layout, for rows in tiles of `block` columns."""
    layout = Layout.parse(text)
    width = min(layout.columns or block, block)  # a row shorter than a block is one
    if layout.rows != 1 or width & (width - 1):
        raise ValueError(f"{layout}: a kernel quantises blocks of one row and a power of two of columns")
    element = layout.element.name if layout.element.name in ("e2m1", "int8") else "fp8"
    return {
        "GROUP": width, "ELEMENT": element, "FLOOR": layout.floor, "TOP": float(layout.top), "SCALE": layout.scale,
    }  # fmt: skip


@triton.jit
def largest_magnitude(x, AXIS: tl.constexpr):
    """max |x| along an axis, through its bits: unlike a maximum of floats, it keeps NaN."""
    bits = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return tl.max(bits, AXIS).to(tl.float32, bitcast=True)


@triton.jit
def block_scale(amax, FLOOR: tl.constexpr, TOP: tl.constexpr, SCALE: tl.constexpr):
    """`atomc.formats.scale.block_scale`: zeros have scale 1, a block with inf or NaN has scale inf."""
    wide = tl.where(amax < FLOOR, FLOOR, amax)
    scale = tl.maximum(tl.math.div_rn(wide, tl.zeros_like(amax) + TOP), 1.1754943508222875e-38)
    if SCALE != "float32":
        scale = power_of_two_above(scale)
    return tl.where(amax < float("inf"), tl.where(wide == 0, 1.0, scale), float("inf"))


@triton.jit
def unscaled(x, scale, SCALE: tl.constexpr):
    """x / scale, exact where scales are powers of two."""
    if SCALE == "float32":
        return tl.math.div_rn(x, tl.zeros_like(x) + scale)
    return x * inverse_power(scale)


@triton.jit
def e2m1_code(x):
    """Codes 0 .. 15 of the nearest e2m1 values, ties to the even code, saturating; bit 3 is the sign."""
    a = tl.abs(x)
    code = (a > 0.25).to(tl.int32) + (a >= 0.75).to(tl.int32) + (a > 1.25).to(tl.int32) + (a >= 1.75).to(tl.int32)
    code += (a > 2.5).to(tl.int32) + (a >= 3.5).to(tl.int32) + (a > 5.0).to(tl.int32)
    return code | ((x.to(tl.int32, bitcast=True) >> 28) & 8)


@triton.jit
def store_codes(
    out, x, first, limit, BLOCK: tl.constexpr, ELEMENT: tl.constexpr, TOP: tl.constexpr,
):  # fmt: skip
    """Codes of x [BLOCK], already divided by its scales, of columns first .. limit of the row that `out` points to."""
    if ELEMENT == "e2m1":
        low, high = tl.split(tl.reshape(e2m1_code(x), (BLOCK // 2, 2)))
        column = first + 2 * tl.arange(0, BLOCK // 2)
        tl.store(out + column // 2, (low | (high << 4)).to(out.dtype.element_ty), mask=column < limit)
    else:
        column = first + tl.arange(0, BLOCK)
        x = tl.minimum(tl.maximum(x, -TOP), TOP)
        if ELEMENT == "int8":
            # Adding 1.5 x 2^23 leaves no bits below one: rounds to nearest even.
            x = (x + 12582912.0) - 12582912.0
        tl.store(out + column, x.to(out.dtype.element_ty), mask=column < limit)


@triton.jit
def quantize_row(
    codes, scales, x, first, limit, BLOCK: tl.constexpr, GROUP: tl.constexpr, ELEMENT: tl.constexpr,
    FLOOR: tl.constexpr, TOP: tl.constexpr, SCALE: tl.constexpr,
):  # fmt: skip
    """Round columns first .. first + BLOCK of one row (fp32; those from `limit` on are left out) and store the pair.

    `codes` and `scales` point to the row's; `first` is a multiple of GROUP, GROUP a part of BLOCK.
    """
    column = first + tl.arange(0, BLOCK)
    tile = tl.reshape(tl.where(column < limit, x, 0.0), (BLOCK // GROUP, GROUP))
    scale = block_scale(largest_magnitude(tile, 1), FLOOR, TOP, SCALE)
    scaled = unscaled(tile, scale[:, None], SCALE)
    store_codes(codes, tl.reshape(scaled, (BLOCK,)), first, limit, BLOCK, ELEMENT, TOP)
    group = first // GROUP + tl.arange(0, BLOCK // GROUP)
    if SCALE == "e8m0":
        tl.store(scales + group, e8m0_byte(scale), mask=group * GROUP < limit)
    else:
        tl.store(scales + group, tl.where(scale < float("inf"), scale, float("nan")), mask=group * GROUP < limit)


@triton.jit
def quantize_rows(
    x, codes, scales, K: tl.constexpr, CODES: tl.constexpr, SCALES: tl.constexpr, BLOCK: tl.constexpr,
    GROUP: tl.constexpr, ELEMENT: tl.constexpr, FLOOR: tl.constexpr, TOP: tl.constexpr, SCALE: tl.constexpr,
):  # fmt: skip
    """A tile of BLOCK columns of a row of x [M, K] -> codes [M, CODES], scales [M, SCALES] (spec 3.4)."""
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * BLOCK
    column = first + tl.arange(0, BLOCK)
    values = tl.load(x + row * K + column, mask=column < K, other=0.0).to(tl.float32)
    quantize_row(codes + row * CODES, scales + row * SCALES, values, first, K, BLOCK, GROUP, ELEMENT, FLOOR, TOP, SCALE)


def empty_pair(device: Device, shape: tuple[int, ...], layout: str) -> tuple[Tensor, Tensor]:
    """Memory for the codes and scales of values of that shape."""
    known = Layout.parse(layout)
    codes = device.empty(known.code_shape(shape), known.element.storage)
    return codes, device.empty(known.scale_shape(shape), known.scale_dtype)


def quantize(device: Device, x: Tensor, layout: str) -> tuple[Tensor, Tensor]:
    """See `atomc.ops.quantize.quantize`: x [..., K]."""
    k = x.shape[-1]
    rows = x.numel() // k
    codes, scales = empty_pair(device, tuple(x.shape), layout)
    known = Layout.parse(layout)
    block = power_of_two(k) if known.columns == 0 else max(min(power_of_two(k), 2048), known.columns)
    constants = layout_constants(layout, block)
    constants |= {"K": k, "CODES": codes.shape[-1], "SCALES": scales.shape[-1], "BLOCK": block}
    args = {"x": x, "codes": codes, "scales": scales}
    device.launch(quantize_rows, (rows, cdiv(k, block)), args, constants, warps=min(max(block // 512, 1), 16))
    return codes, scales


# -- Hadamard ----------------------------------------------------------------------------------------------------------


@triton.jit
def hadamard_signs(N: tl.constexpr, dtype: tl.constexpr):
    """The Hadamard matrix [N, N] of Sylvester's order with entries ±1, N <= 256: the parity of i & j."""
    both = tl.arange(0, N)[:, None] & tl.arange(0, N)[None, :]
    both = both ^ (both >> 4)
    both = both ^ (both >> 2)
    both = both ^ (both >> 1)
    return (1 - 2 * (both & 1)).to(tl.float32).to(dtype)


@triton.jit
def hadamard_tile(x, N: tl.constexpr):
    """The orthonormal transform of each row of x [R >= 16, N] in fp32: products with ±1 are exact, sums are fp32."""
    signs = hadamard_signs(N, x.dtype)
    norm: tl.constexpr = N**-0.5
    if x.dtype == tl.float32:
        return tl.dot(x, signs, input_precision="ieee") * norm
    return tl.dot(x, signs) * norm


@triton.jit
def hadamard_vector(x, N: tl.constexpr, LOG: tl.constexpr):
    """The orthonormal transform of x [N], N = 2^LOG, fp32, by butterflies."""
    for _ in tl.static_range(LOG):
        a, b = tl.split(tl.reshape(x, (N // 2, 2)))
        # The lowest bit of the index becomes the highest; after LOG rounds each is where it was.
        x = tl.reshape(tl.trans(tl.join(a + b, a - b)), (N,))
    norm: tl.constexpr = N**-0.5
    return x * norm


@triton.jit
def hadamard_rows(x, out, M, N: tl.constexpr, BM: tl.constexpr):
    """BM rows of x [M, N] (spec 2.7)."""
    m = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    at = m[:, None] * N + tl.arange(0, N)[None, :]
    keep = m[:, None] < M
    y = hadamard_tile(tl.load(x + at, mask=keep, other=0.0), N)
    tl.store(out + at, y.to(out.dtype.element_ty), mask=keep)


@triton.jit
def hadamard_row(x, out, N: tl.constexpr, LOG: tl.constexpr):
    """A row of x [M, N] in float32, where the matrix of a product would not fit shared memory."""
    at = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
    y = hadamard_vector(tl.load(x + at).to(tl.float32), N, LOG)
    tl.store(out + at, y.to(out.dtype.element_ty))


def hadamard(device: Device, x: Tensor) -> Tensor:
    """See `atomc.ops.quantize.hadamard`: x [..., N]."""
    n = x.shape[-1]
    if n & (n - 1) or not 16 <= n <= 256:
        raise ValueError(f"a Hadamard rotation of {n} channels: a kernel has a power of two of them, 16 to 256")
    rows = x.numel() // n
    out = device.empty(x.shape, x.dtype)
    if x.dtype == torch.float32 and n > 128:
        device.launch(hadamard_row, (rows,), {"x": x, "out": out}, {"N": n, "LOG": n.bit_length() - 1}, warps=1)
        return out
    bm = 64 if device.tokens > 16 and x.dtype != torch.float32 else 16
    device.launch(hadamard_rows, (cdiv(rows, bm),), {"x": x, "out": out, "M": rows}, {"N": n, "BM": bm})
    return out
