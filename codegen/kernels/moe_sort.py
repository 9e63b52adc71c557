"""What the experts' products read: (token, choice) pairs in order of their experts, and activations laid out for FP4.

Terms:
    pair    token x k + choice. order: pairs sorted by expert, equal experts in the order of pairs: one result only.
            An expert of -1 is another rank's: its pairs are last in `order`, and no tile has them.
    plan    int32: the number of tiles, then expert, first place in `order` and number of rows of each tile.
    wide    activations as e4m3 [rows, columns up to a multiple of 128], and float32 scales [blocks, rows] of blocks of
            128 columns (of 32, if the layout's groups are that fine). For products in bf16 the values are in bf16, and
            the scales are of use only where a whole row has one.
    ORDER   of each 32 columns of `wide`, as FP4 weights leave their bytes. pairs: the even columns, then the odd ones.
            words: of the codes 0 .. 7 of four words, 0 and 4 of each, then 1 and 5, 2 and 6, 3 and 7.
            folded: of each 128 columns, 4 of every 4 of a group of 32, in turn of the groups (see `moe_folded`).

Up to SMALL pairs one kernel does all; more are counted by blocks, summed over blocks, and placed. Integers only, and
each place is computed, never taken: no order of arrival shows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from atomc.codegen.device import Device, cdiv, power_of_two
from atomc.codegen.kernels.common import e2m1_value, e8m0_value
from atomc.formats import Layout

ORDERS = {"fours": "pairs", "sixteens": "words", "folded": "folded"}  # by kind of product (see `moe_product`)
AS_STORED = ("mx", "plain")  # kinds that read the operator's activations
SMALL = 1024
BLOCK = 256  # pairs that a program counts, or places
ROWS, COLUMNS = 8, 512  # of a tile of activations that a program lays out


@triton.jit
def write_plan(plan, counts, EXPERTS: tl.constexpr, BM: tl.constexpr):
    """Tiles of at most BM rows of each expert, by its number of pairs [EXPERTS]."""
    expert = tl.arange(0, EXPERTS)
    tiles = (counts + BM - 1) // BM
    first = tl.cumsum(counts, 0) - counts
    at = plan + 1 + 3 * (tl.cumsum(tiles, 0) - tiles)
    tl.store(plan, tl.sum(tiles, 0))
    for j in range(tl.max(tiles, 0)):
        live = j < tiles
        tl.store(at + 3 * j, expert, mask=live)
        tl.store(at + 3 * j + 1, first + j * BM, mask=live)
        tl.store(at + 3 * j + 2, tl.minimum(counts - j * BM, BM), mask=live)


@triton.jit
def count_experts(expert, there, EXPERTS: tl.constexpr):
    """Pairs of each expert [EXPERTS] among those that are there."""
    own = there & (expert >= 0)
    return tl.histogram(tl.where(own, expert, 0), EXPERTS, mask=own)


@triton.jit
def last_if_none(expert, EXPERTS: tl.constexpr):
    """Experts, those of another rank (-1) after all others."""
    return tl.where(expert < 0, EXPERTS, expert)


@triton.jit
def rank_among(indices, first, PAIRS, EXPERTS: tl.constexpr, ALL: tl.constexpr, CHUNK: tl.constexpr):
    """How many pairs come before each of the pairs first .. first + CHUNK, by (expert, pair); and those pairs."""
    pair = first + tl.arange(0, CHUNK)
    key = last_if_none(tl.load(indices + pair, mask=pair < PAIRS, other=0).to(tl.int32), EXPERTS) * ALL + pair
    rank = tl.zeros((CHUNK,), tl.int32)
    for start in range(0, ALL, CHUNK):
        other = start + tl.arange(0, CHUNK)
        its = last_if_none(tl.load(indices + other, mask=other < PAIRS, other=0).to(tl.int32), EXPERTS) * ALL + other
        rank += tl.sum(((its[None, :] < key[:, None]) & (other < PAIRS)[None, :]).to(tl.int32), 1)
    return rank, pair


@triton.jit
def ordered(x, R: tl.constexpr, C: tl.constexpr, ORDER: tl.constexpr):
    """The columns of x [R, C] in another order (see the module)."""
    if ORDER == "pairs":
        x = tl.reshape(tl.permute(tl.reshape(x, (R, C // 32, 16, 2)), (0, 1, 3, 2)), (R, C))
    if ORDER == "words":
        x = tl.reshape(tl.permute(tl.reshape(x, (R, C // 32, 4, 2, 4)), (0, 1, 4, 2, 3)), (R, C))
    if ORDER == "folded":
        x = tl.reshape(tl.permute(tl.reshape(x, (R, C // 128, 4, 8, 4)), (0, 1, 3, 2, 4)), (R, C))
    return x


@triton.jit
def widen_tile(
    codes, scales, wide, wide_scales, tile, T, K: tl.constexpr, KP: tl.constexpr, GROUP: tl.constexpr,
    FOUR: tl.constexpr, ORDER: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """A tile of activations [T, K], codes as bytes, in the layout `wide` (see the module)."""
    row = (tile // tl.cdiv(KP, C)) * R + tl.arange(0, R)[:, None]
    first = (tile % tl.cdiv(KP, C)) * C
    column = first + tl.arange(0, C)[None, :]
    kind: tl.constexpr = wide.dtype.element_ty
    if FOUR:
        byte = first // 2 + tl.arange(0, C // 2)[None, :]
        pairs = tl.load(codes + row * (K // 2) + byte, mask=(row < T) & (byte < K // 2), other=0).to(tl.int32)
        x = tl.reshape(tl.join(e2m1_value(pairs & 15), e2m1_value((pairs >> 4) & 15)), (R, C))
    else:
        x = tl.load(codes + row * K + column, mask=(row < T) & (column < K), other=0.0)
    groups: tl.constexpr = (K + GROUP - 1) // GROUP
    WIDTH: tl.constexpr = 32 if GROUP == 32 else 128
    block = first // WIDTH + tl.arange(0, C // WIDTH)[None, :]
    group = block * WIDTH // GROUP
    s = tl.load(scales + row * groups + group, mask=(row < T) & (group < groups), other=0)
    if s.dtype == tl.uint8:
        s = e8m0_value(s)
    tl.store(wide_scales + block * T + row, s, mask=(row < T) & (block * WIDTH < KP))
    if kind == tl.bfloat16 and GROUP < KP:
        each = tl.reshape(tl.broadcast_to(s[:, :, None], (R, C // WIDTH, WIDTH)), (R, C))
        x = x.to(tl.float32) * each
    # + 0.0: the FNUZ dialect has no -0.
    x = (x.to(tl.float32) + 0.0).to(kind)
    tl.store(wide + row * KP + column, ordered(x, R, C, ORDER), mask=(row < T) & (column < KP))


@triton.jit
def sort_few(
    indices, order, plan, codes, scales, wide, wide_scales, PAIRS, T, EXPERTS: tl.constexpr, BM: tl.constexpr,
    ALL: tl.constexpr, CHUNK: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, GROUP: tl.constexpr,
    FOUR: tl.constexpr, ORDER: tl.constexpr, R: tl.constexpr, C: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Program 0 writes the plan, the next ALL / CHUNK the order of at most ALL pairs, the rest lay out activations."""
    pid = tl.program_id(0)
    if pid == 0:
        pair = tl.arange(0, ALL)
        expert = tl.load(indices + pair, mask=pair < PAIRS, other=0).to(tl.int32)
        write_plan(plan, count_experts(expert, pair < PAIRS, EXPERTS), EXPERTS, BM)
    elif pid <= ALL // CHUNK:
        rank, chunk = rank_among(indices, (pid - 1) * CHUNK, PAIRS, EXPERTS, ALL, CHUNK)
        tl.store(order + rank, chunk, mask=chunk < PAIRS)
    elif WIDE:
        widen_tile(codes, scales, wide, wide_scales, pid - 1 - ALL // CHUNK, T, K, KP, GROUP, FOUR, ORDER, R, C)


@triton.jit
def count_pairs(
    indices, counts, codes, scales, wide, wide_scales, PAIRS, T, EXPERTS: tl.constexpr, BLOCK: tl.constexpr,
    K: tl.constexpr, KP: tl.constexpr, GROUP: tl.constexpr, FOUR: tl.constexpr, ORDER: tl.constexpr,
    R: tl.constexpr, C: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The first programs count the experts of a block of pairs -> counts [blocks, EXPERTS]; the rest as `sort_few`."""
    pid = tl.program_id(0)
    blocks = tl.cdiv(PAIRS, BLOCK)
    if pid < blocks:
        pair = pid * BLOCK + tl.arange(0, BLOCK)
        expert = tl.load(indices + pair, mask=pair < PAIRS, other=0).to(tl.int32)
        count = count_experts(expert, pair < PAIRS, EXPERTS)
        tl.store(counts + pid * EXPERTS + tl.arange(0, EXPERTS), count)
    elif WIDE:
        widen_tile(codes, scales, wide, wide_scales, pid - blocks, T, K, KP, GROUP, FOUR, ORDER, R, C)


@triton.jit
def sum_counts(counts, totals, BLOCKS, EXPERTS: tl.constexpr, BE: tl.constexpr, BB: tl.constexpr):
    """Counts [BLOCKS, EXPERTS] of BE experts become those of the blocks before; their sums -> totals [EXPERTS]."""
    expert = tl.program_id(0) * BE + tl.arange(0, BE)
    total = tl.zeros((BE,), tl.int32)
    for first in range(0, BLOCKS, BB):
        block = first + tl.arange(0, BB)
        at = counts + block[:, None] * EXPERTS + expert[None, :]
        count = tl.load(at, mask=(block < BLOCKS)[:, None], other=0)
        tl.store(at, tl.cumsum(count, 0) - count + total[None, :], mask=(block < BLOCKS)[:, None])
        total += tl.sum(count, 0)
    tl.store(totals + expert, total)


@triton.jit
def place_pairs(
    indices, counts, totals, order, plan, PAIRS, EXPERTS: tl.constexpr, BM: tl.constexpr, BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """Program 0 writes the plan; each other one puts a block of pairs into `order`."""
    total = tl.load(totals + tl.arange(0, EXPERTS))
    if tl.program_id(0) == 0:
        write_plan(plan, total, EXPERTS, BM)
    else:
        block = tl.program_id(0) - 1
        held = tl.load(counts + block * EXPERTS + tl.arange(0, EXPERTS))  # pairs of each expert in earlier blocks
        behind = tl.sum(total, 0) + block * BLOCK - tl.sum(held, 0)  # all pairs of experts, earlier ones of none
        for first in range(0, BLOCK, CHUNK):
            pair = block * BLOCK + first + tl.arange(0, CHUNK)
            expert = tl.load(indices + pair, mask=pair < PAIRS, other=0).to(tl.int32)
            known = tl.where(expert < 0, 0, expert)
            place = tl.load(counts + block * EXPERTS + known) + tl.gather(tl.cumsum(total, 0) - total, known, 0)
            place = tl.where(expert < 0, behind, place)
            for start in range(0, first + CHUNK, CHUNK):
                other = block * BLOCK + start + tl.arange(0, CHUNK)
                its = tl.load(indices + other, mask=other < PAIRS, other=0).to(tl.int32)
                before = (its[None, :] == expert[:, None]) & (other[None, :] < pair[:, None])
                place += tl.sum(before.to(tl.int32), 1)
            tl.store(order + place, pair, mask=pair < PAIRS)


@dataclass
class Sorted:
    """Where the products of the experts find their rows.

    Attributes:
        order, plan, x, scales: see the module; x and scales are the operator's where nothing was laid out.
        tiles: no step has more.
    """

    order: Tensor
    plan: Tensor
    x: Tensor
    scales: Tensor | None
    tiles: int


def most_tiles(device: Device, pairs: int, choices: int, experts: int, bm: int) -> int:
    """No fewer than the tiles of bm rows of `pairs` pairs, `choices` a token: one for each pair, or for each expert
    and for each bm pairs, whichever is less for the bucket."""
    return pairs if device.tokens * choices <= experts else experts + pairs // bm


def padded(k: int) -> int:
    """Columns of a `wide` row."""
    return cdiv(k, 128) * 128


def check_offsets(device: Device, choices: int, k: int, i: int) -> None:
    """Refuse a bucket in which a row of activations begins beyond what a kernel's 32-bit offsets reach.

    Raises:
        ValueError: says how many tokens there may be.
    """
    most = (2**31 - 1) // max(padded(k), choices * padded(i))
    if device.tokens > most:
        raise ValueError(f"experts of {device.tokens} tokens at once; --max-batch-tokens may be {most} for this model")


def empty_wide(device: Device, rows: int, k: int, layout: Layout, kind: str) -> tuple[Tensor, Tensor]:
    """Memory for `wide` rows of k columns that come from that layout, for a kind of product (see `moe_product`)."""
    eight = torch.float8_e4m3fnuz if device.target.fp8 == "fnuz" else torch.float8_e4m3fn
    blocks = padded(k) // (32 if layout.columns == 32 else 128)
    return device.empty((rows, padded(k)), torch.bfloat16 if kind == "sixteens" else eight), device.empty(
        (blocks, rows), torch.float32
    )


def sort(
    device: Device, codes: Tensor, scales: Tensor | None, layout: Layout | None, indices: Tensor, experts: int, bm: int,
    kind: str,
) -> Sorted:  # fmt: skip
    """Pairs by expert, and x [T, K] as a product of that kind reads it; x in full precision has no layout."""
    t, choices = indices.shape
    pack = 1 if layout is None else layout.element.packed
    k = codes.shape[-1] * pack
    pairs, kp, most = t * choices, padded(k), most_tiles(device, t * choices, choices, experts, bm)
    order, plan = device.empty((pairs,), torch.int32), device.empty((1 + 3 * most,), torch.int32)
    x, s = codes, scales
    programs = 0
    if layout is not None and kind not in AS_STORED:
        x, s = empty_wide(device, t, k, layout, kind)
        programs = cdiv(t, ROWS) * cdiv(kp, COLUMNS)
    bins = power_of_two(experts)
    packed = codes.view(torch.uint8) if pack == 2 else codes
    args: dict[str, Any] = {
        "codes": packed, "scales": scales, "wide": x, "wide_scales": s, "PAIRS": pairs, "T": t,
    }  # fmt: skip
    constants: dict[str, Any] = {
        "EXPERTS": bins, "K": k, "KP": kp, "GROUP": (layout and layout.columns) or kp,
        "FOUR": pack == 2, "ORDER": ORDERS.get(kind, ""), "R": ROWS, "C": COLUMNS, "WIDE": kind not in AS_STORED,
    }  # fmt: skip
    if device.tokens * choices <= SMALL:
        most_pairs = max(power_of_two(device.tokens * choices), 16)
        chunk = min(most_pairs, 64)
        constants |= {"BM": bm, "ALL": most_pairs, "CHUNK": chunk}
        args = {"indices": indices, "order": order, "plan": plan, **args}
        device.launch(sort_few, (1 + most_pairs // chunk + programs,), args, constants)
        return Sorted(order, plan, x, s, most)
    blocks = cdiv(pairs, BLOCK)
    counts, totals = device.empty((blocks, bins), torch.int32), device.empty((bins,), torch.int32)
    args = {"indices": indices, "counts": counts, **args}
    device.launch(count_pairs, (blocks + programs,), args, {**constants, "BLOCK": BLOCK})
    at_once = min(bins, 16)
    args = {"counts": counts, "totals": totals, "BLOCKS": blocks}
    device.launch(sum_counts, (bins // at_once,), args, {"EXPERTS": bins, "BE": at_once, "BB": 64})
    args = {"indices": indices, "counts": counts, "totals": totals, "order": order, "plan": plan, "PAIRS": pairs}
    constants = {"EXPERTS": bins, "BM": bm, "BLOCK": BLOCK, "CHUNK": 64}
    device.launch(place_pairs, (1 + blocks,), args, constants)
    return Sorted(order, plan, x, s, most)
