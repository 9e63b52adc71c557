"""GEMM of quantised operands: y = x wᵀ, each scaled by blocks (spec 3.2, 3.4, 6.1 K6, K18, K19).

A step of K lies within one scale block of x and of w, so the matrix unit multiplies bare codes and sums the step; the
sum is scaled in fp32 and added in fp32 (the matrix unit's own FP8 sums keep fewer bits on Hopper). Scales of whole rows
(ptpc) are applied once, at the end. Two kinds of products:

    scaled_gemm   e4m3 codes of the target's dialect; e2m1 codes are expanded to it in registers, exactly.
    mx_gemm       targets with scaled matrix instructions (`Target.mx == "native"`): E8M0 scales for 32 values, in
                  hardware, and packed e2m1 as it is.

Terms: weight first, splits: see `gemm`. group: of heads, in `scaled_grouped_output`; a linear layer has one.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from atomc.codegen.aot import KernelError
from atomc.codegen.device import Device, cdiv
from atomc.codegen.kernels.common import e8m0_value
from atomc.codegen.kernels.gemm import Tiles, choose, keep, launch_with_splits, load_rows, load_tokens, place, rows_of
from atomc.formats import Layout


@triton.jit
def as_bytes(packed):
    """Stored e2m1 pairs, int8, as unsigned bytes."""
    return packed.to(tl.uint8, bitcast=True)


@triton.jit
def expand(packed, FNUZ: tl.constexpr):
    """e2m1 [rows, n / 2] -> e4m3 [rows, n] of 2^-6 (FNUZ: 2^-7) times the value: the code's bits, moved into place."""
    byte = as_bytes(packed)
    code = tl.interleave(byte & 15, byte >> 4)
    magnitude, sign = (code & 7) << 2, (code & 8) << 4
    if FNUZ:
        sign = tl.where(magnitude == 0, 0, sign)  # its -0 is NaN
        return (magnitude | sign).to(tl.uint8).to(tl.float8e4b8, bitcast=True)
    else:
        return (magnitude | sign).to(tl.uint8).to(tl.float8e4nv, bitcast=True)


@triton.jit
def load_scale(at, inside=None):
    """float32 scales: stored as E8M0 bytes or as they are."""
    stored = tl.load(at) if inside is None else tl.load(at, mask=inside, other=0)
    return e8m0_value(stored) if at.dtype.element_ty == tl.uint8 else stored.to(tl.float32)


@triton.jit
def along(v, ROWS: tl.constexpr):
    """A vector beside the rows, or the columns, of a tile."""
    return v[:, None] if ROWS else v[None, :]


@triton.jit
def add_step(
    acc, a, xs, w_at, ws_at, kw, step, KW: tl.constexpr, SW: tl.constexpr, W_BLOCK: tl.constexpr, BK: tl.constexpr,
    ONE_ROW: tl.constexpr, X_SCALED: tl.constexpr, FNUZ: tl.constexpr, FIRST: tl.constexpr, EXACT: tl.constexpr,
    LEAN: tl.constexpr,
):  # fmt: skip
    """acc + (a bᵀ) xs ws of one step, with xs and ws constant along K. LEAN: see `scaled_gemm`."""
    b = load_rows(w_at, kw, step, KW, SW)
    b = expand(b, FNUZ) if SW < BK else b
    if EXACT and not X_SCALED and W_BLOCK == 0:
        acc = tl.dot(b, a.T, acc) if FIRST else tl.dot(a, b.T, acc)
    else:
        product = tl.dot(b, a.T) if FIRST else tl.dot(a, b.T)
        if W_BLOCK > 0:
            ws = load_scale(ws_at + step * BK // W_BLOCK)
            if X_SCALED and ONE_ROW and not LEAN:
                product *= along(xs * ws, not FIRST)
            else:
                product = product * along(xs, not FIRST) if X_SCALED else product
                product *= ws if ONE_ROW else along(ws, FIRST)
        elif X_SCALED:
            product *= along(xs, not FIRST)
        acc += product
    return acc


@triton.jit
def load_e8m0(at, inside=None):
    """E8M0 bytes of scales: as they are stored, or of float32 powers of two."""
    stored = tl.load(at) if inside is None else tl.load(at, mask=inside, other=0)
    return stored if at.dtype.element_ty == tl.uint8 else (stored.to(tl.int32, bitcast=True) >> 23).to(tl.uint8)


@triton.jit
def add_mx_step(
    acc, a, inside, xs_at, w_at, ws_at, kw, step, K: tl.constexpr, SX: tl.constexpr, SW: tl.constexpr,
    X_BLOCK: tl.constexpr, W_BLOCK: tl.constexpr, BK: tl.constexpr, FIRST: tl.constexpr,
):  # fmt: skip
    """acc + a bᵀ of one step by scaled matrix instructions: 32 columns are part of one block of x and one of w."""
    b = load_rows(w_at, kw, step, K * SW // BK, SW)
    k32 = step * BK + 32 * tl.arange(0, BK // 32)[None, :]
    k32 = k32 if K % BK == 0 else tl.minimum(k32, K - 1)
    xs = load_e8m0(xs_at[:, None] + k32 // X_BLOCK, inside[:, None])
    ws = load_e8m0(ws_at[:, None] + k32 // W_BLOCK)
    x_form: tl.constexpr = "e2m1" if SX < BK else "e4m3"
    w_form: tl.constexpr = "e2m1" if SW < BK else "e4m3"
    a, b = as_bytes(a) if SX < BK else a, as_bytes(b) if SW < BK else b
    if FIRST:
        acc = tl.dot_scaled(b, ws, w_form, a.T, xs, x_form, acc)
    else:
        acc = tl.dot_scaled(a, xs, x_form, b.T, ws, w_form, acc)
    return acc


@triton.jit
def finish(
    acc, xs_at, inside, ws_at, X_BLOCK: tl.constexpr, W_BLOCK: tl.constexpr, FIRST: tl.constexpr, FACTOR: tl.constexpr
):  # fmt: skip
    """acc times the scales of whole rows, and what the expansion left out."""
    if X_BLOCK == 0:
        acc *= along(load_scale(xs_at, inside), not FIRST)
    if W_BLOCK == 0:
        acc *= along(load_scale(ws_at), FIRST)
    return acc * FACTOR


@triton.jit
def weight_at(
    w, w_scale, group, n0, kw, N: tl.constexpr, START: tl.constexpr, BN: tl.constexpr, KW: tl.constexpr,
    W_ROWS: tl.constexpr, SCALES: tl.constexpr, ONE_ROW: tl.constexpr,
):  # fmt: skip
    """Pointers to the codes [BN, step] and the scales, [BN] or one, of rows n0 + START .. of a group's N rows."""
    n, first = rows_of(n0, N, START, BN), group * N + n0
    scale_row = (first + START) // W_ROWS if ONE_ROW else (first + n) // W_ROWS
    return w + first.to(tl.int64) * KW + (n[:, None] * KW + kw[None, :]), w_scale + scale_row * SCALES


@triton.jit
def scaled_gemm(
    x, x_scale, w, w_scale, out, M, N: tl.constexpr, K: tl.constexpr, GROUPS: tl.constexpr, X_BLOCK: tl.constexpr,
    W_BLOCK: tl.constexpr, W_ROWS: tl.constexpr, X_PACKED: tl.constexpr, W_PACKED: tl.constexpr, MX: tl.constexpr,
    FNUZ: tl.constexpr, FACTOR: tl.constexpr, EXACT: tl.constexpr, HALVES: tl.constexpr,
    FIRST: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """A tile of x [M, GROUPS, K] w [GROUPS, N, K]ᵀ -> [M, GROUPS N], or a split's share: out is then fp32 [SPLITS, ..].

    X_BLOCK, W_BLOCK: columns of a scale block, 0: the whole row. W_ROWS: rows of it. FACTOR: what expansion left out.
    MX: scaled matrix instructions. EXACT: the matrix unit's own sums have fp32 precision. HALVES: 2: the tile has 2 BN
    rows of the weight, and the sums of a step need registers for half of it only; LEAN keeps the first half's from
    living on into the second.
    """
    tiles_n: tl.constexpr = (N + HALVES * BN - 1) // (HALVES * BN)
    tile_m, tile_n = place(tl.program_id(0), M, BM, GROUPS * tiles_n)
    group, split = tile_n // tiles_n, tl.program_id(1)
    m0, n0 = tile_m * BM, tile_n % tiles_n * (HALVES * BN)
    steps: tl.constexpr = (K + BK - 1) // BK
    share: tl.constexpr = (steps + SPLITS - 1) // SPLITS
    # Stored bytes of a row, and of a step of it.
    KX: tl.constexpr = K // 2 if X_PACKED else K
    KW: tl.constexpr = K // 2 if W_PACKED else K
    SX: tl.constexpr = BK // 2 if X_PACKED else BK
    SW: tl.constexpr = BK // 2 if W_PACKED else BK
    x_scales: tl.constexpr = (K + X_BLOCK - 1) // X_BLOCK if X_BLOCK else 1
    w_scales: tl.constexpr = (K + W_BLOCK - 1) // W_BLOCK if W_BLOCK else 1
    one_row: tl.constexpr = W_ROWS % BN == 0 and N % BN == 0 and not MX  # a tile, or half of it, has one scale
    m, kx, kw = tl.arange(0, BM), tl.arange(0, SX), tl.arange(0, SW)
    inside, x_row = m0 + m < M, m0.to(tl.int64) * GROUPS + group
    x_at = x + x_row * KX + (m[:, None] * (GROUPS * KX) + kx[None, :])
    xs_at = x_scale + x_row * x_scales + m * (GROUPS * x_scales)
    w_at, ws_at = weight_at(w, w_scale, group, n0, kw, N, 0, BN, KW, W_ROWS, w_scales, one_row)
    acc = tl.zeros((BN, BM) if FIRST else (BM, BN), tl.float32)
    if HALVES == 2:
        w_at_2, ws_at_2 = weight_at(w, w_scale, group, n0, kw, N, BN, BN, KW, W_ROWS, w_scales, one_row)
        acc_2 = acc
    for step in range(split * share, min(steps, (split + 1) * share)):
        a = load_tokens(x_at, inside, kx, step, KX, SX)
        if MX:
            acc = add_mx_step(acc, a, inside, xs_at, w_at, ws_at, kw, step, K, SX, SW, X_BLOCK, W_BLOCK, BK, FIRST)
        else:
            a = expand(a, FNUZ) if X_PACKED else a
            xs = load_scale(xs_at + step * BK // X_BLOCK, inside) if X_BLOCK > 0 else 1.0
            acc = add_step(acc, a, xs, w_at, ws_at, kw, step, KW, SW, W_BLOCK, BK, one_row, X_BLOCK > 0, FNUZ, FIRST,
                           EXACT, HALVES == 2)  # fmt: skip
        if HALVES == 2:
            acc_2 = add_step(acc_2, a, xs, w_at_2, ws_at_2, kw, step, KW, SW, W_BLOCK, BK, one_row, X_BLOCK > 0, FNUZ,
                             FIRST, EXACT, False)  # fmt: skip
    row: tl.constexpr = GROUPS * N
    at = out + split.to(tl.int64) * M * row + group * N
    acc = finish(acc, xs_at, inside, ws_at, X_BLOCK, W_BLOCK, FIRST, FACTOR)
    keep(acc, at, m0, n0, M, N, row, FIRST, BM, BN)
    if HALVES == 2:
        acc_2 = finish(acc_2, xs_at, inside, ws_at_2, X_BLOCK, W_BLOCK, FIRST, FACTOR)
        keep(acc_2, at, m0, n0 + BN, M, N, row, FIRST, BM, BN)


# -- host --------------------------------------------------------------------------------------------------------------


def check_layouts(device: Device, x: Layout, w: Layout, k: int) -> None:
    """Refuse what no kernel here multiplies.

    Raises:
        KernelError: says which layout, and why.
    """
    for what, layout in (("weight", w), ("activation", x)):
        element, told = layout.element, f"a product with {what} layout {layout} on {device.target.name}"
        if element.packed == 1 and not (element.name.startswith("e4m3") and element.dialect == device.target.fp8):
            raise KernelError(f"no kernel for {told}: it multiplies e2m1, and e4m3 of the {device.target.fp8} dialect.")
        if layout.columns and layout.columns % 32:
            raise KernelError(f"no kernel for {told}: a step of K within a block of {layout.columns} columns is no 32.")
        if element.packed == 2 and k % 2:
            raise KernelError(f"no kernel for {told}: K = {k} is odd, and two codes share a byte.")
    if x.rows != 1:
        raise KernelError(f"no kernel for activation layout {x}: a scale is of one token.")


def configure(device: Device, x: Layout, w: Layout, n: int, k: int, groups: int) -> tuple[bool, int, Tiles]:
    """(whether by scaled matrix instructions, into how many halves a tile is parted, the configuration)."""
    tiles = choose(device, n, k, 1, groups)
    powers = all(layout.scale in ("e8m0", "pow2") and layout.columns for layout in (x, w))
    packed = 2 in (x.element.packed, w.element.packed)
    if device.target.mx == "native" and powers and (packed or device.tokens > 64 or device.target.vendor == "amd"):
        return True, 1, tiles
    depth = tiles.depth
    for layout in (x, w):
        while layout.columns and layout.columns % depth:
            depth //= 2
    if is_exact(device) and not x.columns and not w.columns:
        return False, 1, replace(tiles, depth=depth)  # the sums of a step are those of the tile
    rows = min(tiles.rows, 128)
    # Halves need their registers for sums: a scale for each row, or the expansion, leaves them too few.
    halves = tiles.rows // rows if not packed and (w.rows % rows == 0 or not w.columns) else 1
    return False, halves, replace(tiles, depth=depth, rows=rows)


def is_exact(device: Device) -> bool:
    """Whether the matrix unit sums FP8 products with the precision of fp32; Hopper's keeps about 14 bits."""
    return device.target.arch != "sm_90"


def _product(
    device: Device, codes: Tensor, scales: Tensor, weight: Tensor, weight_scales: Tensor, layout: str,
    weight_layout: str, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """x [M, G, K] times the weight's G blocks of rows [G N, K] -> [M, G N]."""
    x, w = Layout.parse(layout), Layout.parse(weight_layout)
    m, groups, k = codes.shape[0], codes.shape[1], codes.shape[2] * x.element.packed
    n = weight.shape[0] // groups
    check_layouts(device, x, w, k)
    native, halves, tiles = configure(device, x, w, n, k, groups)
    packed, fnuz = [y.element.packed == 2 for y in (x, w)], device.target.fp8 == "fnuz"
    factor = 1.0 if native else 2.0 ** ((7 if fnuz else 6) * sum(packed))
    constants = {
        "N": n, "K": k, "GROUPS": groups, "X_BLOCK": x.columns, "W_BLOCK": w.columns, "W_ROWS": w.rows,
        "X_PACKED": packed[0], "W_PACKED": packed[1], "MX": native, "FNUZ": fnuz, "FACTOR": factor,
        "EXACT": is_exact(device), "HALVES": halves,
    }  # fmt: skip
    args = {"x": codes, "x_scale": scales, "w": weight, "w_scale": weight_scales}
    shape = (m, groups * n, groups * cdiv(n, halves * tiles.rows))
    return launch_with_splits(device, scaled_gemm, args, constants, tiles, shape, dtype)


def scaled_linear(
    device: Device, codes: Tensor, scales: Tensor, weight: Tensor, weight_scales: Tensor, layout: str,
    weight_layout: str, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """See `atomc.ops.scaled.scaled_linear`."""
    flat = codes.view(-1, 1, codes.shape[-1])
    out = _product(device, flat, scales, weight, weight_scales, layout, weight_layout, dtype)
    return out.view(*codes.shape[:-1], weight.shape[0])


def scaled_grouped_output(
    device: Device, codes: Tensor, scales: Tensor, weight: Tensor, weight_scales: Tensor, layout: str,
    weight_layout: str, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """See `atomc.ops.scaled.scaled_grouped_output`."""
    return _product(device, codes, scales, weight, weight_scales, layout, weight_layout, dtype)
