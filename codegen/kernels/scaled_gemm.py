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
from atomc.codegen.device import Device, cdiv, power_of_two
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
):  # fmt: skip
    """acc + (a bᵀ) xs ws of one step, with xs and ws constant along K."""
    b = load_rows(w_at, kw, step, KW, SW)
    b = expand(b, FNUZ) if SW < BK else b
    if EXACT and not X_SCALED and W_BLOCK == 0:
        acc = tl.dot(b, a.T, acc) if FIRST else tl.dot(a, b.T, acc)
    else:
        product = tl.dot(b, a.T) if FIRST else tl.dot(a, b.T)
        if W_BLOCK > 0:
            ws = load_scale(ws_at + step * BK // W_BLOCK)
            if X_SCALED and ONE_ROW:
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
    w, w_scale, group, n0, kw, N: tl.constexpr, BN: tl.constexpr, KW: tl.constexpr, W_ROWS: tl.constexpr,
    SCALES: tl.constexpr, ONE_ROW: tl.constexpr,
):  # fmt: skip
    """Pointers to the codes [BN, step] and the scales, [BN] or one, of rows n0 .. of a group's N rows."""
    n, first = rows_of(n0, N, BN), group * N + n0
    scale_row = first // W_ROWS if ONE_ROW else (first + n) // W_ROWS
    return w + first.to(tl.int64) * KW + (n[:, None] * KW + kw[None, :]), w_scale + scale_row * SCALES


@triton.jit
def scaled_gemm(
    x, x_scale, w, w_scale, out, M, N: tl.constexpr, K: tl.constexpr, GROUPS: tl.constexpr, X_BLOCK: tl.constexpr,
    W_BLOCK: tl.constexpr, W_ROWS: tl.constexpr, X_PACKED: tl.constexpr, W_PACKED: tl.constexpr, MX: tl.constexpr,
    FNUZ: tl.constexpr, FACTOR: tl.constexpr, EXACT: tl.constexpr,
    FIRST: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """A tile of x [M, GROUPS, K] w [GROUPS, N, K]ᵀ -> [M, GROUPS N], or a split's share: out is then fp32 [SPLITS, ..].

    X_BLOCK, W_BLOCK: columns of a scale block, 0: the whole row. W_ROWS: rows of it. FACTOR: what expansion left out.
    MX: scaled matrix instructions. EXACT: the matrix unit's own sums have fp32 precision.
    """
    tiles_n: tl.constexpr = (N + BN - 1) // BN
    tile_m, tile_n = place(tl.program_id(0), M, BM, GROUPS * tiles_n)
    group, split = tile_n // tiles_n, tl.program_id(1)
    m0, n0 = tile_m * BM, tile_n % tiles_n * BN
    steps: tl.constexpr = (K + BK - 1) // BK
    share: tl.constexpr = (steps + SPLITS - 1) // SPLITS
    # Stored bytes of a row, and of a step of it.
    KX: tl.constexpr = K // 2 if X_PACKED else K
    KW: tl.constexpr = K // 2 if W_PACKED else K
    SX: tl.constexpr = BK // 2 if X_PACKED else BK
    SW: tl.constexpr = BK // 2 if W_PACKED else BK
    x_scales: tl.constexpr = (K + X_BLOCK - 1) // X_BLOCK if X_BLOCK else 1
    w_scales: tl.constexpr = (K + W_BLOCK - 1) // W_BLOCK if W_BLOCK else 1
    one_row: tl.constexpr = W_ROWS % BN == 0 and N % BN == 0 and not MX  # a tile has one scale
    m, kx, kw = tl.arange(0, BM), tl.arange(0, SX), tl.arange(0, SW)
    inside, x_row = m0 + m < M, m0.to(tl.int64) * GROUPS + group
    x_at = x + x_row * KX + (m[:, None] * (GROUPS * KX) + kx[None, :])
    xs_at = x_scale + x_row * x_scales + m * (GROUPS * x_scales)
    w_at, ws_at = weight_at(w, w_scale, group, n0, kw, N, BN, KW, W_ROWS, w_scales, one_row)
    acc = tl.zeros((BN, BM) if FIRST else (BM, BN), tl.float32)
    for step in range(split * share, min(steps, (split + 1) * share)):
        a = load_tokens(x_at, inside, kx, step, KX, SX)
        if MX:
            acc = add_mx_step(acc, a, inside, xs_at, w_at, ws_at, kw, step, K, SX, SW, X_BLOCK, W_BLOCK, BK, FIRST)
        else:
            a = expand(a, FNUZ) if X_PACKED else a
            xs = load_scale(xs_at + step * BK // X_BLOCK, inside) if X_BLOCK > 0 else 1.0
            acc = add_step(acc, a, xs, w_at, ws_at, kw, step, KW, SW, W_BLOCK, BK, one_row, X_BLOCK > 0, FNUZ, FIRST,
                           EXACT)  # fmt: skip
    row: tl.constexpr = GROUPS * N
    at = out + split.to(tl.int64) * M * row + group * N
    acc = finish(acc, xs_at, inside, ws_at, X_BLOCK, W_BLOCK, FIRST, FACTOR)
    keep(acc, at, m0, n0, M, N, row, FIRST, BM, BN)


@triton.jit
def wide_scales(
    x_scale, w_scale, xs, ws, M, KB: tl.constexpr, NB: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """float32 scales of w [NB, KB] by the first programs, of x [M, KB] -> [KB, M] by the others, R rows each."""
    parts: tl.constexpr = (NB * KB + BLOCK - 1) // BLOCK
    pid = tl.program_id(0)
    if pid < parts:
        at = pid * BLOCK + tl.arange(0, BLOCK)
        tl.store(ws + at, load_scale(w_scale + at, at < NB * KB), mask=at < NB * KB)
    else:
        m, c = (pid - parts) * R + tl.arange(0, R)[:, None], tl.arange(0, C)[None, :]
        inside = (m < M) & (c < KB)
        tl.store(xs + c * M + m, load_scale(x_scale + m * KB + c, inside), mask=inside)


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


def configure(device: Device, x: Layout, w: Layout, n: int, k: int, groups: int) -> tuple[bool, Tiles]:
    """(whether by scaled matrix instructions, the configuration)."""
    tiles = choose(device, "scaled_gemm", n, k, 1, groups, str(x), str(w))
    powers = all(layout.scale in ("e8m0", "pow2") and layout.columns for layout in (x, w))
    packed = 2 in (x.element.packed, w.element.packed)
    if device.target.mx == "native" and powers and (packed or device.tokens > 64 or device.target.vendor == "amd"):
        return True, tiles
    depth = tiles.depth
    for layout in (x, w):
        while layout.columns and layout.columns % depth:
            depth //= 2
    if is_exact(device) and not x.columns and not w.columns:
        return False, replace(tiles, depth=depth)  # the sums of a step are those of the tile
    return False, replace(tiles, depth=depth, rows=min(tiles.rows, 128))  # the sums of a step need registers too


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
    native, tiles = configure(device, x, w, n, k, groups)
    packed, fnuz = [y.element.packed == 2 for y in (x, w)], device.target.fp8 == "fnuz"
    factor = 1.0 if native else 2.0 ** ((7 if fnuz else 6) * sum(packed))
    constants = {
        "N": n, "K": k, "GROUPS": groups, "X_BLOCK": x.columns, "W_BLOCK": w.columns, "W_ROWS": w.rows,
        "X_PACKED": packed[0], "W_PACKED": packed[1], "MX": native, "FNUZ": fnuz, "FACTOR": factor,
        "EXACT": is_exact(device),
    }  # fmt: skip
    args = {"x": codes, "x_scale": scales, "w": weight, "w_scale": weight_scales}
    shape = (m, groups * n, groups * cdiv(n, tiles.rows))
    out = device.empty((m, groups * n), dtype)
    given = (codes, scales, weight, weight_scales, out)
    fits = fits_library(device, x, w, groups, n, k, dtype)
    if not (fits and device.library("scaled_mm", lambda: library_arguments(device, *given))):
        launch_with_splits(device, scaled_gemm, args, constants, tiles, shape, out)
    return out


def fits_library(device: Device, x: Layout, w: Layout, groups: int, n: int, k: int, dtype: torch.dtype) -> bool:
    """Whether cuBLASLt is to multiply: of 8,192 tokens, it takes half the time of the kernel here on an H100."""
    known = (x.element.name, x.rows, x.columns, w.element.name, w.rows, w.columns) == ("e4m3", 1, 128, "e4m3", 128, 128)
    whole = n % 128 == 0 and k % 512 == 0  # it wants rows of the weight's scales that are multiples of 16 bytes
    many = device.target.arch == "sm_90" and device.tokens > 64
    return many and known and whole and groups == 1 and dtype == torch.bfloat16


def library_arguments(
    device: Device, codes: Tensor, scales: Tensor, weight: Tensor, weight_scales: Tensor, out: Tensor
) -> tuple[Tensor, ...]:
    """What `atomc.ops.library.scaled_mm` takes: scales in float32, those of the tokens transposed."""
    m, (n, k) = codes.shape[0], weight.shape
    xs = device.empty((k // 128, m), torch.float32)
    ws = device.empty((n // 128, k // 128), torch.float32)
    args = {"x_scale": scales, "w_scale": weight_scales, "xs": xs, "ws": ws, "M": m}
    rows, block = 64, 1024
    constants = {"KB": k // 128, "NB": n // 128, "R": rows, "C": power_of_two(k // 128), "BLOCK": block}
    grid = (cdiv(n // 128 * (k // 128), block) + cdiv(m, rows),)
    device.launch(wide_scales, grid, args, constants)
    return codes, xs, weight, ws, out


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
