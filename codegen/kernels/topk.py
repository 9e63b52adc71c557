"""The rows with the best scores: exact and deterministic, of equal scores the lowest rows (spec 2.7, 6.1 K14).

The K-th largest score is found two bits at a time: scores as integers in the order of floats, and how many are at least
each of three bounds. A program holds up to SEGMENT scores in registers. Where a token may see more rows, a first kernel
keeps the K best of each segment and a second one the K best of those: both orders are by row, so ties end the same.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from atomc.codegen.device import Device, cdiv, power_of_two

SEGMENT = 16384  # scores of a program: 32 a lane of 16 warps


@triton.jit
def _ordered(x):
    """Unsigned integers in the order of the floats, NaN above all; adding 0 makes -0 and 0 one."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.uint32, bitcast=True) ^ 0x80000000


@triton.jit
def _kth(key, K: tl.constexpr):
    """The K-th largest of key [BLOCK], BLOCK <= 16384: the largest bound that at least K keys reach."""
    found = tl.full((), 0, tl.uint32)
    bit = tl.full((), 1 << 30, tl.uint32)
    for _ in range(16):
        one, two = found | bit, found | (bit + bit)
        three = one | two
        # Two counts in one sum: each is at most 16384.
        both = tl.sum((key >= one).to(tl.int32) + ((key >= two).to(tl.int32) << 16), 0)
        top = tl.sum((key >= three).to(tl.int32), 0)
        found = tl.where((both & 0xFFFF) >= K, one, found)
        found = tl.where((both >> 16) >= K, two, found)
        found = tl.where(top >= K, three, found)
        bit = bit >> 2
    return found


@triton.jit
def _keys(scores, at, n):
    """Keys of scores `at`; 0, below the key of any score, from n on. Up to a multiple of 16 there is memory to read."""
    return tl.where(at < n, _ordered(tl.load(scores + at, mask=at < (n + 15) // 16 * 16, other=0.0)), 0)


@triton.jit
def _bound(scores, n, K: tl.constexpr, BLOCK: tl.constexpr):
    """The key of the K-th best of n > K scores, and how many scores with that key are among the K."""
    key = _keys(scores, tl.arange(0, BLOCK), n)
    least = _kth(key, K)
    return least, K - tl.sum((key > least).to(tl.int32), 0)


@triton.jit
def _emit(
    scores, rows, out, kept, start, n, least, need, CHUNK: tl.constexpr, LEVEL: tl.constexpr,
):  # fmt: skip
    """In order of row, the rows with keys above `least` and the first `need` with that key; level 1: their scores."""
    before, ties = 0, 0
    for at in range(0, n, CHUNK):
        i = at + tl.arange(0, CHUNK)
        key = _keys(scores, i, n)
        more, same = key > least, key == least
        # Two running counts in one scan: each is at most CHUNK.
        upto = tl.cumsum(more.to(tl.int32) + (same.to(tl.int32) << 16), 0)
        rank = ties + (upto >> 16)
        chosen = more | (same & (rank <= need))
        place = before + (upto & 0xFFFF) + tl.minimum(rank, need) - 1
        row = tl.load(rows + i, mask=chosen, other=0) if LEVEL == 2 else start + i
        tl.store(out + place, row, mask=chosen)
        if LEVEL == 1:
            tl.store(kept + place, tl.load(scores + i, mask=chosen, other=0.0), mask=chosen)
        before += tl.sum(more.to(tl.int32), 0)
        ties += tl.sum(same.to(tl.int32), 0)


@triton.jit
def select_rows(
    scores, rows, positions, out, kept, first, T, WIDTH, KEPT, LIMIT,
    RATIO: tl.constexpr, K: tl.constexpr, K_BLOCK: tl.constexpr, SEGMENT: tl.constexpr, SMALL: tl.constexpr,
    BLOCK: tl.constexpr, LEVEL: tl.constexpr,
):  # fmt: skip
    """A segment of a token's scores: level 0 all of it, 1 of many segments, 2 the rows that these kept.

    scores: rows of 16 WIDTH (so that they are known to be aligned), token t is `first` + its place here; from T on
    there is none. out: [T, K], -1 padded; at level 1 rows of 16 KEPT, K for each segment, and `kept` their scores.
    """
    t, segment = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if first + t >= T:
        return
    visible = tl.minimum((tl.load(positions + first + t) + 1) // RATIO, LIMIT)
    if LEVEL == 2:
        n = visible // SEGMENT * K + tl.minimum(visible % SEGMENT, K)
        rows += t * WIDTH * 16
    else:
        n = tl.minimum(visible - segment * SEGMENT, SEGMENT)
    start = segment * SEGMENT
    scores += t * WIDTH * 16 + start
    if LEVEL == 1:
        out += t * KEPT * 16 + segment * K
        kept += t * KEPT * 16 + segment * K
    else:
        out += (first + t) * K
    if n <= K:
        i = tl.arange(0, K_BLOCK)
        row = tl.load(rows + i, mask=i < n, other=-1) if LEVEL == 2 else tl.where(i < n, start + i, -1)
        tl.store(out + i, row, mask=i < K)
        if LEVEL == 1:
            tl.store(kept + i, tl.load(scores + i, mask=i < n, other=0.0), mask=i < K)
    else:
        if n <= SMALL:
            least, need = _bound(scores, n, K, SMALL)
        else:
            least, need = _bound(scores, n, K, BLOCK)
        _emit(scores, rows, out, kept, start, n, least, need, SMALL, LEVEL)


def top_rows(
    device: Device, scores: Tensor, positions: Tensor, first: int, limit: int, ratio: int, topk: int, out: Tensor
) -> None:
    """The `topk` best visible rows of tokens first .. first + len(scores), below T, into out [T, topk] int32.

    scores: [tokens, `padded(limit)`] fp32; only those of visible rows are read, row < min((position + 1) // ratio,
    limit), and none of a token that sees no more than topk.
    """
    t, segments = scores.shape[0], cdiv(limit, SEGMENT)
    known = {"RATIO": ratio, "K": topk, "K_BLOCK": power_of_two(topk), "SEGMENT": SEGMENT}
    args = {
        "scores": scores, "rows": None, "positions": positions, "out": out, "kept": None, "first": first,
        "T": positions.shape[0], "WIDTH": scores.shape[1] // 16, "KEPT": 0, "LIMIT": limit,
    }  # fmt: skip
    if segments == 1:
        _launch(device, (t, 1), args, known, min(power_of_two(limit), SEGMENT), 0)
        return
    if segments * topk > SEGMENT:
        raise ValueError(f"the best {topk} of {limit} rows: {segments} segments keep more than {SEGMENT} of them")
    width = padded(segments * topk)
    rows, kept = device.empty((t, width), torch.int32), device.empty((t, width), torch.float32)
    _launch(device, (t, segments), args | {"out": rows, "kept": kept, "KEPT": width // 16}, known, SEGMENT, 1)
    args |= {"scores": kept, "rows": rows, "WIDTH": width // 16}
    _launch(device, (t, 1), args, known, power_of_two(segments * topk), 2)


def padded(n: int) -> int:
    """n rounded up to whole 64 bytes of scores: rows are aligned, and their kernels know it."""
    return cdiv(n, 16) * 16


def _launch(
    device: Device, grid: tuple[int, int], args: dict[str, object], known: dict[str, int], block: int, level: int
) -> None:
    small = 2048 if block > 4096 else block
    constants = known | {"BLOCK": block, "SMALL": small, "LEVEL": level}
    device.launch(select_rows, grid, args, constants, warps=min(max(block // 512, 4), 16))
