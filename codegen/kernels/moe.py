"""Routed experts (spec 2.8, 3.4, 6.1 K21-K22) with weights that are packed, or in full precision as they are.

Pseudo-code:
    pairs sorted by expert, activations laid out          (`moe_sort`)
    h = x w13ᵀ of each expert's rows; a = swiglu(h) times the routing weight, quantised   (`experts_in`)
    y = a w2ᵀ of each expert's rows, one row for each pair                                (`experts_out`)
                             many tokens on sm_90: both in FP8, by kernels of their own    (`moe_hopper`)
    out = sum of the k rows of a token                                                    (`sum_choices`)

Illegal, refused with the reason: weights that are neither e2m1 1x32 with E8M0 scales nor e4m3 in tiles of 128 columns
or whole rows; activations in groups of other than 32 or 128 columns or whole rows: a product sums a group of scales.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from atomc.codegen.device import Device, cdiv, power_of_two
from atomc.codegen.kernels.common import ASM, TL, e2m1_value, e8m0_byte
from atomc.codegen.kernels.moe_config import Config, Part, choose, measured, problem_of
from atomc.codegen.kernels.moe_product import (
    eights_product,
    fours_product,
    mx_product,
    plain_product,
    sixteens_product,
)  # fmt: skip
from atomc.codegen.kernels.moe_sort import ORDERS, Sorted, check_offsets, empty_wide, ordered, padded, sort
from atomc.codegen.kernels.quantize import (
    block_scale,
    e2m1_code,
    empty_pair,
    largest_magnitude,
    layout_constants,
    unscaled,
)  # fmt: skip
from atomc.codegen.kernels.swiglu import swiglu_of, threads
from atomc.formats import MXFP4, Layout

# Assembly has no interpreter.

# -- inside the kernels ------------------------------------------------------------------------------------------------


@triton.jit
def store_codes(
    a, codes, scales, at, keep, first, PAIRS, INNER: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
    WIDE: tl.constexpr, EIGHT: tl.constexpr, ORDER: tl.constexpr, GROUP: tl.constexpr, ELEMENT: tl.constexpr,
    FLOOR: tl.constexpr, TOP: tl.constexpr, SCALE: tl.constexpr,
):  # fmt: skip
    """Quantise a [R, C] fp32, columns first .. of rows `at` of what w2 multiplies: `wide`, or as it is stored."""
    blocks = tl.reshape(a, (R, C // GROUP, GROUP))
    scale = block_scale(largest_magnitude(blocks, 2), FLOOR, TOP, SCALE)
    scaled = tl.reshape(unscaled(blocks, scale[:, :, None], SCALE), (R, C))
    column = first + tl.arange(0, C)[None, :]
    kind: tl.constexpr = codes.dtype.element_ty
    if WIDE:
        KP: tl.constexpr = (INNER + 127) // 128 * 128
        if ELEMENT == "e2m1":
            scaled = e2m1_value(e2m1_code(scaled))
        else:
            scaled = (tl.minimum(tl.maximum(scaled, -TOP), TOP) + 0.0).to(EIGHT)  # + 0.0: the FNUZ dialect has no -0
        if kind == tl.bfloat16 and GROUP < KP:
            scaled = tl.reshape(tl.reshape(scaled.to(tl.float32), (R, C // GROUP, GROUP)) * scale[:, :, None], (R, C))
        code = scaled.to(kind)
        code = ordered(code, R, C, ORDER)
        tl.store(codes + at[:, None] * KP + column, code, mask=keep[:, None] & (column < KP))
        WIDTH: tl.constexpr = 32 if GROUP == 32 else 128
        each = tl.where(scale < float("inf"), scale, float("nan"))
        each = tl.reshape(tl.broadcast_to(each[:, :, None], (R, C // GROUP, GROUP // WIDTH)), (R, C // WIDTH))
        block = first // WIDTH + tl.arange(0, C // WIDTH)[None, :]
        tl.store(scales + block * PAIRS + at[:, None], each, mask=keep[:, None] & (block * WIDTH < KP))
    else:
        if ELEMENT == "e2m1":
            low, high = tl.split(tl.reshape(e2m1_code(scaled), (R, C // 2, 2)))
            byte = first // 2 + tl.arange(0, C // 2)[None, :]
            where = keep[:, None] & (byte < INNER // 2)
            tl.store(codes + at[:, None] * (INNER // 2) + byte, (low | (high << 4)).to(kind), mask=where)
        else:
            code = tl.minimum(tl.maximum(scaled, -TOP), TOP).to(kind)
            tl.store(codes + at[:, None] * INNER + column, code, mask=keep[:, None] & (column < INNER))
        G: tl.constexpr = (INNER + GROUP - 1) // GROUP
        group = first // GROUP + tl.arange(0, C // GROUP)[None, :]
        tl.store(scales + at[:, None] * G + group, e8m0_byte(scale), mask=keep[:, None] & (group < G))


@triton.jit
def store_inner(
    a, codes, scales, at, keep, first, PAIRS, INNER: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
    WIDE: tl.constexpr, EIGHT: tl.constexpr, ORDER: tl.constexpr, GROUP: tl.constexpr, ELEMENT: tl.constexpr,
    FLOOR: tl.constexpr, TOP: tl.constexpr, SCALE: tl.constexpr,
):  # fmt: skip
    """Columns first .. of rows `at` of what w2 multiplies, from a [R, C] fp32: codes, or with no ELEMENT values."""
    if ELEMENT == "":
        column = first + tl.arange(0, C)[None, :]
        value = a.to(codes.dtype.element_ty)
        tl.store(codes + at.to(tl.int64)[:, None] * INNER + column, value, mask=keep[:, None] & (column < INNER))
    else:
        store_codes(
            a, codes, scales, at, keep, first, PAIRS, INNER, R, C, WIDE, EIGHT, ORDER, GROUP, ELEMENT, FLOOR, TOP, SCALE
        )


@triton.jit
def expert_product(
    x, x_scale, row, keep, M, w, w_scale, expert, n, up, ROWS: tl.constexpr, K: tl.constexpr, split,
    SPLIT: tl.constexpr, KIND: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, PAIR: tl.constexpr,
    GROUP: tl.constexpr, FORM: tl.constexpr, LEFT: tl.constexpr, TILE: tl.constexpr, WIDTH: tl.constexpr,
    CHUNK: tl.constexpr, WORDS: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """[BN, BM] of rows n (and `up`) of an expert's matrix [ROWS, K], over part `split` of SPLIT of the columns.

    `row` [BM] are rows of x, of which there are M. FORM: of a plain product its precision.
    """
    KP: tl.constexpr = K if KIND == "plain" else (K + 127) // 128 * 128
    STEPS: tl.constexpr = (KP + BK - 1) // BK
    if STEPS % SPLIT == 0:
        first = STEPS // SPLIT * split
        stop = first + STEPS // SPLIT
    else:
        first, stop = STEPS * split // SPLIT, STEPS * (split + 1) // SPLIT
    last: tl.constexpr = ROWS - 1
    FINE: tl.constexpr = GROUP == 32
    whole = expert.to(tl.int64) * ROWS
    if KIND == "mx":
        w += whole * (K // (2 if LEFT == "e2m1" else 1))
        w_scale += expert.to(tl.int64) * (((ROWS + TILE - 1) // TILE) * ((K + WIDTH - 1) // WIDTH))
        acc, other = mx_product(
            x, x_scale, row, keep, w, w_scale, n, up, last, first, stop, K, GROUP, BN, BM, BK, PAIR, FORM, LEFT, TILE,
            WIDTH,
        )  # fmt: skip
    elif KIND == "fours":
        w += whole * (K // 2)
        w_scale += expert.to(tl.int64) * (ROWS * ((K + 31) // 32) // (4 if WORDS else 1))
        acc, other = fours_product(
            x, x_scale, row, keep, M, w, w_scale, n, up, last, first, stop, K, KP, BN, BM, BK, PAIR, FINE, CHUNK,
            WORDS, ASM,
        )  # fmt: skip
    elif KIND == "sixteens":
        w += whole * (K // 8)
        w_scale += expert.to(tl.int64) * (ROWS * ((K + 31) // 32) // (4 if WORDS else 1))
        acc, other = sixteens_product(
            x, x_scale, row, keep, w, w_scale, n, up, last, first, stop, K, KP, BN, BM, PAIR, GROUP >= KP, CHUNK, WORDS,
            ASM,
        )  # fmt: skip
    elif KIND == "plain":
        acc, other = plain_product(x, row, keep, w + whole * K, n, up, last, first, stop, K, BN, BM, BK, PAIR, FORM)
    else:
        w += whole * K
        w_scale += expert * (((ROWS + TILE - 1) // TILE) * ((K + 127) // 128 if WIDTH else 1))
        ONE: tl.constexpr = TILE % BN == 0 and (not PAIR or (ROWS // 2) % BN == 0)
        acc, other = eights_product(
            x, x_scale, row, keep, M, w, w_scale, n, up, last, first, stop, K, KP, BN, BM, PAIR, FINE, TILE, WIDTH, ONE
        )
    return acc, other


# -- kernels -----------------------------------------------------------------------------------------------------------


@triton.jit
def experts_in(
    x, x_scale, w, w_scale, order, plan, weights, codes, scales, partial, PAIRS,
    CHOICES: tl.constexpr, LIMIT: tl.constexpr, DTYPE: tl.constexpr, K: tl.constexpr, INNER: tl.constexpr,
    SPLIT: tl.constexpr, FUSED: tl.constexpr,
    KIND: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    FORM: tl.constexpr, LEFT: tl.constexpr, TILE: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr,
    WORDS: tl.constexpr, ASM: tl.constexpr,
    WIDE: tl.constexpr, EIGHT: tl.constexpr, ORDER: tl.constexpr, IGROUP: tl.constexpr, ELEMENT: tl.constexpr,
    FLOOR: tl.constexpr, TOP: tl.constexpr, SCALE: tl.constexpr,
):  # fmt: skip
    """Rows of w13 [E, 2 I, K] times a tile of an expert's tokens: BN gate rows and the BN up rows that meet them.

    FUSED: the weighted SwiGLU, quantised, in sorted order -> codes, scales [PAIRS, I]. Else the sums of part `split` of
    the columns -> partial [SPLIT, PAIRS, 2 I] fp32, for `inner_rows` (spec 2.8).
    """
    tiles_n: tl.constexpr = (INNER + BN - 1) // BN
    tile = tl.program_id(0) // (tiles_n * SPLIT)
    if tile >= tl.load(plan):
        return
    expert, begin = tl.load(plan + 1 + 3 * tile), tl.load(plan + 2 + 3 * tile)
    keep = tl.arange(0, BM) < tl.load(plan + 3 + 3 * tile)
    place = begin + tl.arange(0, BM)
    pair = tl.load(order + place, mask=keep, other=0)
    split = tl.program_id(0) % SPLIT
    n = (tl.program_id(0) // SPLIT % tiles_n) * BN
    gate, up = expert_product(
        x, x_scale, pair // CHOICES, keep, PAIRS // CHOICES, w, w_scale, expert, n, INNER + n, 2 * INNER, K, split,
        SPLIT, KIND, BN, BM, BK, True, GROUP, FORM, LEFT, TILE, WIDTH, CHUNK, WORDS, ASM,
    )  # fmt: skip
    column = n + tl.arange(0, BN)
    if FUSED:
        # Loaded again: over the loop it would take a register for each token of a thread.
        pair = tl.load(order + place, mask=keep, other=0, volatile=True)
        weight = tl.load(weights + pair, mask=keep, other=0.0)
        # The reference rounds each product to the compute dtype, and what is quantised too.
        a = swiglu_of(gate.to(DTYPE).to(tl.float32), up.to(DTYPE).to(tl.float32), LIMIT) * weight[None, :]
        a = tl.where(column[:, None] < INNER, a.to(DTYPE).to(tl.float32), 0.0)
        store_inner(
            tl.trans(a), codes, scales, place, keep, n, PAIRS, INNER, BM, BN, WIDE, EIGHT, ORDER, IGROUP, ELEMENT,
            FLOOR, TOP, SCALE,
        )  # fmt: skip
    else:
        at = partial + (split.to(tl.int64) * PAIRS + place)[None, :] * (2 * INNER) + column[:, None]
        where = keep[None, :] & (column < INNER)[:, None]
        tl.store(at, gate, mask=where)
        tl.store(at + INNER, up, mask=where)


@triton.jit
def inner_rows(
    partial, order, weights, codes, scales, PAIRS, LIMIT: tl.constexpr, DTYPE: tl.constexpr, INNER: tl.constexpr,
    SPLIT: tl.constexpr, C: tl.constexpr, WIDE: tl.constexpr, EIGHT: tl.constexpr, ORDER: tl.constexpr,
    IGROUP: tl.constexpr, ELEMENT: tl.constexpr, FLOOR: tl.constexpr, TOP: tl.constexpr, SCALE: tl.constexpr,
):  # fmt: skip
    """C columns of a row of partial [SPLIT, PAIRS, 2 I], summed; weighted SwiGLU, quantised -> codes and scales."""
    place = tl.program_id(0)
    first = tl.program_id(1) * C
    column = first + tl.arange(0, C)
    gate = tl.zeros((C,), tl.float32)
    up = gate
    for split in tl.static_range(SPLIT):
        at = partial + (PAIRS * split + place).to(tl.int64) * (2 * INNER) + column
        gate += tl.load(at, mask=column < INNER, other=0.0)
        up += tl.load(at + INNER, mask=column < INNER, other=0.0)
    weight = tl.load(weights + tl.load(order + place))
    a = swiglu_of(gate.to(DTYPE).to(tl.float32), up.to(DTYPE).to(tl.float32), LIMIT) * weight
    rows = place + tl.arange(0, 1)
    store_inner(
        a.to(DTYPE).to(tl.float32)[None, :], codes, scales, rows, rows < PAIRS, first, PAIRS, INNER, 1, C, WIDE, EIGHT,
        ORDER, IGROUP, ELEMENT, FLOOR, TOP, SCALE,
    )  # fmt: skip


@triton.jit
def experts_out(
    x, x_scale, w, w_scale, order, plan, out, PAIRS,
    K: tl.constexpr, N: tl.constexpr,
    KIND: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    FORM: tl.constexpr, LEFT: tl.constexpr, TILE: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr,
    WORDS: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Rows of w2 [E, N, K] times a tile of an expert's rows of x [pairs, K] -> out [pairs, N] in order of pairs."""
    tiles_n: tl.constexpr = (N + BN - 1) // BN
    tile = tl.program_id(0) // tiles_n
    if tile >= tl.load(plan):
        return
    expert, begin = tl.load(plan + 1 + 3 * tile), tl.load(plan + 2 + 3 * tile)
    keep = tl.arange(0, BM) < tl.load(plan + 3 + 3 * tile)
    place = tl.where(keep, begin + tl.arange(0, BM), 0)
    n = (tl.program_id(0) % tiles_n) * BN
    y, _ = expert_product(
        x, x_scale, place, keep, PAIRS, w, w_scale, expert, n, n, N, K, 0, 1,
        KIND, BN, BM, BK, False, GROUP, FORM, LEFT, TILE, WIDTH, CHUNK, WORDS, ASM,
    )  # fmt: skip
    pair = tl.load(order + place, mask=keep, other=0)
    column = n + tl.arange(0, BN)
    at = out + pair.to(tl.int64)[None, :] * N + column[:, None]
    tl.store(at, y.to(out.dtype.element_ty), mask=keep[None, :] & (column < N)[:, None])


@triton.jit
def sum_choices(y, indices, out, N: tl.constexpr, CHOICES: tl.constexpr, BLOCK: tl.constexpr):
    """Rows of y [T, CHOICES, N] summed in order, in fp32 -> out [T, N]; those of no expert (-1) were never written."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for choice in tl.static_range(CHOICES):
        own = tl.load(indices + token * CHOICES + choice) >= 0
        at = y + (token * CHOICES + choice) * N + column
        total += tl.load(at, mask=(column < N) & own, other=0.0).to(tl.float32)
    tl.store(out + token * N + column, total, mask=column < N)


# -- host --------------------------------------------------------------------------------------------------------------


def kind_of(device: Device, weight: Layout, act: Layout, k: int, bm: int) -> str:
    """Which product of `moe_product` multiplies a matrix with k columns and tiles of bm tokens."""
    if multiplies_mx(device, weight, act):
        return "mx"
    if weight.element.bits != 4:
        return "eights"
    folds = act.scale != "float32" or act.columns == 0  # scales that bf16 activations can have inside, or outside
    return "sixteens" if bm >= 32 and folds and k % 8 == 0 else "fours"


def weight_constants(device: Device, layout: Layout, act: Layout, k: int, bm: int, part: Part) -> dict[str, Any]:
    """What `expert_product` must know of a matrix with k columns.

    Raises:
        ValueError: no kernel has its layout, or that of the activations; see the module.
    """
    four = layout.element.name == "e2m1"
    known = (layout.rows, layout.columns, layout.scale) == (1, 32, "e8m0") if four else layout.columns in (0, 128)
    if not known or layout.element.name not in ("e2m1", "e4m3", "e4m3fnuz"):
        raise ValueError(
            f"{layout}: a kernel multiplies experts in e2m1:1x32:e8m0, or e4m3 in tiles of 128 columns or rows"
        )
    if act.element.name not in ("e2m1", "e4m3", "e4m3fnuz") or act.columns not in (0, 32, 128) or act.rows != 1:
        raise ValueError(f"{act}: activations of experts have one scale for 32 or 128 columns, or for a row")
    kind = kind_of(device, layout, act, k, bm)
    lanes = part.warps * device.target.wavefront
    # Of packed codes 128 columns are half a cache line of AMD's.
    long = kind == "mx" and four and bm == 16 and device.target.vendor == "amd"
    blocks = 2 if k % 256 == 0 and (long or (kind == "fours" and part.blocks == 2)) else 1
    return {
        "KIND": kind, "BK": 128 * blocks, "GROUP": act.columns or padded(k),
        "FORM": act.element.name.removesuffix("fnuz"), "LEFT": layout.element.name.removesuffix("fnuz"),
        "TILE": layout.rows, "WIDTH": layout.columns, "CHUNK": min(part.rows, lanes // 2),
        "WORDS": kind in ("fours", "sixteens") and k % 128 == 0,
        "ASM": ASM and device.target.vendor == "nvidia",
    }  # fmt: skip


def multiplies_mx(device: Device, weight: Layout, act: Layout) -> bool:
    """Whether the target's scaled matrix instructions take the pair as it is stored."""
    scaled = act.scale == weight.scale == "e8m0" and act.columns in (32, 128) and weight.columns in (32, 128)
    return device.target.mx == "native" and scaled


def inner_constants(device: Device, layout: Layout, weight: Layout, i: int, block: int, bm: int) -> dict[str, Any]:
    """What `store_inner` must know of what w2 multiplies."""
    known = layout_constants(str(layout), block)
    kind = kind_of(device, weight, layout, i, bm)
    return {
        "INNER": i, "WIDE": kind != "mx", "EIGHT": tl.float8e4b8 if device.target.fp8 == "fnuz" else tl.float8e4nv,
        "ORDER": ORDERS.get(kind, ""), "IGROUP": known["GROUP"],
        "ELEMENT": known["ELEMENT"], "FLOOR": known["FLOOR"], "TOP": known["TOP"], "SCALE": known["SCALE"],
    }  # fmt: skip


def weight_args(w: Tensor, scales: Tensor, constants: dict[str, Any]) -> dict[str, Tensor]:
    """A matrix as its product reads it: packed codes as bytes or words, scales as words where rows have whole ones."""
    if constants["KIND"] == "sixteens":
        w = w.view(torch.int32)
    return {"w": unsigned(w), "w_scale": scales.view(torch.int32) if constants["WORDS"] else scales}


def unsigned(codes: Tensor) -> Tensor:
    """Packed codes as unsigned bytes."""
    return codes.view(torch.uint8) if codes.dtype == torch.int8 else codes


def scaled_moe_experts(
    device: Device, codes: Tensor, scales: Tensor, w13: Tensor, w13_scales: Tensor, w2: Tensor, w2_scales: Tensor,
    indices: Tensor, weights: Tensor, limit: float, layout: str, inner_layout: str, w13_layout: str, w2_layout: str,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """See `atomc.ops.scaled.scaled_moe_experts`."""
    outer, inner, l13, l2 = (Layout.parse(text) for text in (layout, inner_layout, w13_layout, w2_layout))
    experts, d = w2.shape[0], w2.shape[1]
    i, k = w2.shape[2] * l2.element.packed, w13.shape[2] * l13.element.packed
    t, choices = indices.shape
    check_offsets(device, choices, k, i)
    eights = l13.element.bits == 8 and not multiplies_mx(device, l13, outer)
    if folds(device, outer, inner, (l13, l2), (k, i, d), choices, experts):
        from atomc.codegen.kernels import moe_hopper  # the layer of Triton that it needs is not every backend's

        matrices = (w13, w13_scales, w2, w2_scales)
        y = moe_hopper.products(device, codes, scales, *matrices, indices, weights, limit, outer, inner, dtype)
        return _sum(device, y, indices)
    problem = problem_of(experts, choices, d, i, (layout, inner_layout, w13_layout, w2_layout))
    static = choose(device, choices, experts, fused=inner.columns in (32, 128), eights=eights)
    config = measured(device, problem) or static
    kind = kind_of(device, l13, outer, k, config.bm)
    rows = sort(device, codes, scales, outer, indices, experts, config.bm, kind)
    whole = power_of_two(padded(i)) if inner.columns == 0 else 128
    end = inner_constants(device, inner, l2, i, whole, config.bm)
    if end["WIDE"]:
        a = empty_wide(device, t * choices, i, inner, kind_of(device, l2, inner, i, config.bm))
    else:
        a = empty_pair(device, (t * choices, i), str(inner))
    first = matrix_of(device, (w13, w13_scales), l13, outer, k, config.bm, config.first)
    launch_in(device, rows, first, weights, config, a, end, whole, limit, dtype)
    second = matrix_of(device, (w2, w2_scales), l2, inner, i, config.bm, config.second)
    return launch_out(device, rows, second, a, config, indices, d, dtype)


@dataclass(frozen=True)
class Matrix:
    """Weights as a product reads them.

    Attributes:
        w_scale: None where nothing is scaled. constants: what `expert_product` must know. k: columns.
    """

    w: Tensor
    w_scale: Tensor | None
    constants: dict[str, Any]
    k: int


def matrix_of(
    device: Device, codes: tuple[Tensor, Tensor], layout: Layout, act: Layout, k: int, bm: int, part: Part
) -> Matrix:
    """A matrix with k columns, as the product of activations in a layout and tiles of bm tokens reads it."""
    constants = weight_constants(device, layout, act, k, bm, part)
    return Matrix(**weight_args(*codes, constants), constants=constants, k=k)


Rows = tuple[Tensor, Tensor | None]  # what w2 multiplies, in sorted order: `wide`, or codes and scales, or values


def launch_in(
    device: Device, rows: Sorted, w13: Matrix, weights: Tensor, config: Config, a: Rows, end: dict[str, Any],
    whole: int, limit: float, dtype: torch.dtype,
) -> None:  # fmt: skip
    """What w2 multiplies -> a. end: what `store_inner` must know; whole: columns that `inner_rows` takes at once."""
    i, (pairs, choices) = end["INNER"], (weights.numel(), weights.shape[1])
    part = config.first
    partial = None if config.fused else device.empty((part.splits, pairs, 2 * i), torch.float32)
    given = {"LIMIT": limit, "DTYPE": TL[dtype]}
    made = {"codes": unsigned(a[0]), "scales": a[1]}
    args: dict[str, Any] = {
        "x": unsigned(rows.x), "x_scale": rows.scales, "w": w13.w, "w_scale": w13.w_scale, "order": rows.order,
        "plan": rows.plan, "weights": weights, **made, "partial": partial, "PAIRS": pairs,
    }  # fmt: skip
    constants = {
        "CHOICES": choices, **given, "K": w13.k, "SPLIT": part.splits, "FUSED": config.fused, "BN": part.rows,
        "BM": config.bm, **w13.constants, **end,
    }  # fmt: skip
    grid = (rows.tiles * cdiv(i, part.rows) * part.splits,)
    device.launch(experts_in, grid, args, constants, part.warps, part.stages, config.origin)
    if partial is not None:
        args = {"partial": partial, "order": rows.order, "weights": weights, **made, "PAIRS": pairs}
        constants = {**given, "SPLIT": part.splits, "C": whole, **end}
        warps = max(min(whole // 128, 8), 1)
        device.launch(inner_rows, (pairs, cdiv(padded(i), whole)), args, constants, warps, origin=config.origin)


def launch_out(
    device: Device, rows: Sorted, w2: Matrix, a: Rows, config: Config, indices: Tensor, d: int, dtype: torch.dtype
) -> Tensor:
    """The products with w2 [pairs, d], and their sums [t, d] in fp32 over a token's choices of experts."""
    (t, choices), part = indices.shape, config.second
    y = device.empty((t, choices, d), dtype)
    args = {
        "x": unsigned(a[0]), "x_scale": a[1], "w": w2.w, "w_scale": w2.w_scale, "order": rows.order, "plan": rows.plan,
        "out": y, "PAIRS": t * choices,
    }  # fmt: skip
    constants = {"K": w2.k, "N": d, "BN": part.rows, "BM": config.bm, **w2.constants}
    grid = (rows.tiles * cdiv(d, part.rows),)
    device.launch(experts_out, grid, args, constants, part.warps, part.stages, config.origin)
    return _sum(device, y, indices)


def folds(
    device: Device, act: Layout, inner: Layout, weights: tuple[Layout, Layout], sizes: tuple[int, int, int],
    choices: int, experts: int,
) -> bool:  # fmt: skip
    """Whether `moe_hopper` has the product: its layouts and sizes (K, I, D), and rows enough of each expert.

    With 24 rows, if all experts are alike, it was faster; with fewer it was not measured.
    """
    k, i, d = sizes
    pairs = device.tokens * choices
    fits = k % 512 == 0 and i % 512 == 0 and d % 256 == 0 and pairs * max(k, i) < 2**31  # offsets are int32
    acts = all((a.element.name, a.rows, a.columns) == ("e4m3", 1, 128) for a in (act, inner)) and inner.scale == "e8m0"
    known = acts and all(str(weight) == str(MXFP4) for weight in weights)
    return ASM and device.target.arch == "sm_90" and known and fits and pairs >= 24 * experts


def _sum(device: Device, y: Tensor, indices: Tensor) -> Tensor:
    """y [T, choices, D] summed over the choices that have an expert here, by indices [T, choices]."""
    t, choices, d = y.shape
    out = device.empty((t, d), torch.float32)
    block = min(power_of_two(d), 1024)
    constants = {"N": d, "CHOICES": choices, "BLOCK": block}
    args = {"y": y, "indices": indices, "out": out}
    device.launch(sum_choices, (t, cdiv(d, block)), args, constants, warps=threads(device, block))
    return out
