"""Routed experts of many tokens on sm_90: launches of the product of `moe_folded`, and what it must be told before.

A program of the product has 256 rows of a weight: the largest scale of each, and how many levels they take, come from
here, and the scales of tokens in the order of their experts.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from atomc.codegen.device import Device, cdiv, power_of_two
from atomc.codegen.kernels.common import TL
from atomc.codegen.kernels.moe_folded import experts_folded, piece_row
from atomc.codegen.kernels.moe_sort import Sorted, empty_wide, sort
from atomc.formats import Layout

ROWS = 256  # of a weight, that a program multiplies at once
TOKENS = 128  # of a tile
STAGES = 5  # of the ring: more would overwrite scales, of which it has two blocks of 4 steps, before they are read
REGISTERS, FEW = 224, 56  # of a consumer's thread, and of a producer's


@triton.jit
def row_tops(
    w_scale, tops, levels, PAIR: tl.constexpr, GROUPS: tl.constexpr, ALL: tl.constexpr, N: tl.constexpr
):  # fmt: skip
    """The largest scale of the rows of each program of the product -> tops [.., 256]; and its levels [..].

    w_scale [E, N, GROUPS] bytes; ALL: a power of two that is not below GROUPS.
    """
    tile = tl.program_id(0) % (N // 256)
    row = tl.arange(0, 256)
    piece = row // 64
    if PAIR:
        at = piece_row(row % 64, tile, PAIR) + piece // 2 * 16 + piece % 2 * (N // 2)
    else:
        at = piece_row(row, tile, PAIR)
    at += (tl.program_id(0) // (N // 256)) * N
    group = tl.arange(0, ALL)
    byte = tl.load(
        w_scale + at.to(tl.int64)[:, None] * GROUPS + group[None, :], mask=(group < GROUPS)[None, :], other=0
    )
    top = tl.max(byte.to(tl.int32), 1)
    least = 255 - tl.max(tl.where(byte == 0, 0, 255 - byte).to(tl.int32), 1)
    spread = tl.where((top == 0) | (top == 255), 0, top - least)
    tl.store(tops + tl.program_id(0) * 256 + row, top)
    tl.store(levels + tl.program_id(0), 1 + tl.max(spread, 0) // 12)


@triton.jit
def gather_scales(scales, order, out, PAIRS, T, CHOICES: tl.constexpr, BLOCK: tl.constexpr):
    """Scales [blocks, T] of tokens -> out [blocks, PAIRS] in sorted order: a tile reads its own from a row."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    token = tl.load(order + place, mask=place < PAIRS, other=0) // CHOICES
    block = tl.program_id(1)
    tl.store(out + block * PAIRS + place, tl.load(scales + block * T + token, mask=place < PAIRS), mask=place < PAIRS)


def product(
    device: Device, rows: Sorted, x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor, weights: Tensor, out: Tensor,
    scales: Tensor, limit: float, floor: float, dtype: Any,
) -> None:  # fmt: skip
    """Launch the product: of w13, if `out` are codes, x being rows of tokens; else of w2 (see `experts_folded`)."""
    experts, n, k = w.shape[0], w.shape[1], w.shape[2] * 2
    pairs, pair = weights.numel(), out.dtype == torch.float8_e4m3fn
    choices = weights.shape[1] if pair else 1
    programs, groups = experts * (n // ROWS), k // 32
    tops, levels = device.empty((programs, ROWS), torch.int32), device.empty((programs,), torch.int32)
    known = {"PAIR": pair, "N": n}
    args: dict[str, Any] = {"w_scale": w_scale, "tops": tops, "levels": levels}
    constants: dict[str, Any] = {**known, "GROUPS": groups, "ALL": power_of_two(groups)}
    device.launch(row_tops, (programs,), args, constants, warps=8 if groups <= 128 else 16)
    if pair:
        given, x_scale = x_scale, device.empty((k // 128, pairs), torch.float32)
        args = {"scales": given, "order": rows.order, "out": x_scale, "PAIRS": pairs, "T": weights.shape[0]}
        constants = {"CHOICES": choices, "BLOCK": 1024}
        device.launch(gather_scales, (cdiv(pairs, 1024), k // 128), args, constants)
    args = {
        "x": x, "x_scale": x_scale, "w": w.view(torch.uint8), "w_scale": w_scale.view(torch.int32), "tops": tops,
        "levels": levels, "order": rows.order, "plan": rows.plan, "weights": weights, "out": out, "scales": scales,
        "PAIRS": pairs,
    }  # fmt: skip
    constants = {
        "CHOICES": choices, **known, "K": k, "LIMIT": limit, "DTYPE": dtype, "FLOOR": floor, "STAGES": STAGES,
        "REGISTERS": REGISTERS, "FEW": FEW,
    }  # fmt: skip
    device.launch(experts_folded, (device.target.compute_units,), args, constants, warps=4)


def products(
    device: Device, codes: Tensor, scales: Tensor, w13: Tensor, w13_scales: Tensor, w2: Tensor, w2_scales: Tensor,
    indices: Tensor, weights: Tensor, limit: float, outer: Layout, inner: Layout, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """What each pair's expert makes of its token [T, choices, D]; see `moe.scaled_moe_experts`, which sums it."""
    rows = sort(device, codes, scales, outer, indices, w13.shape[0], TOKENS, "folded")
    a, a_scales = empty_wide(device, weights.numel(), w13.shape[1] // 2, inner, "folded")
    y = device.empty((*weights.shape, w2.shape[1]), dtype)
    given = (limit, inner.floor, TL[dtype])
    product(device, rows, rows.x, rows.scales, w13, w13_scales, weights, a, a_scales, *given)
    product(device, rows, a, a_scales, w2, w2_scales, weights, y, a_scales, *given)
    return y
