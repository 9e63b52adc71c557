"""GEMM y = x wᵀ summed in fp32: router, compressors, indexer weights, lm head, wo_a (spec 2.4 - 2.8, 6.1 K7, K20).

Terms:
    groups         products of one batched product: each has rows of x and a weight of its own.
    weight first   the weight's rows are the matrix unit's 64 rows and the tokens its columns: for few tokens, so that
                   none of its rows is idle. Else tokens are its rows.
    splits         programs that share a tile, each with a part of K; their fp32 sums are added in order by a second
                   kernel, so that the result has the same bits in every run.
    parts          an fp32 value as a sum of three bf16 values, exactly (8 + 8 + 8 bits of significand).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from atomc.codegen.device import TYPES, Device, cdiv, power_of_two
from atomc.codegen.tuning import STATIC, tuned

BAND = tl.constexpr(8)  # token tiles that take turns at a tile of the weight, so that both stay in L2


@dataclass(frozen=True)
class Tiles:
    """A configuration.

    Attributes:
        first: weight first. tokens, rows, depth: of a tile: of x, of the weight, along K. splits: of K.
        origin: who chose it (`codegen.tuning`).
    """

    first: bool
    tokens: int
    rows: int
    depth: int
    splits: int
    warps: int
    stages: int
    origin: str = STATIC

    @property
    def constants(self) -> dict[str, int | bool]:
        """What a kernel is told."""
        return {"FIRST": self.first, "BM": self.tokens, "BN": self.rows, "BK": self.depth, "SPLITS": self.splits}


@triton.jit
def place(pid, M, BM: tl.constexpr, TILES: tl.constexpr):
    """(tile of tokens, tile of the weight): BAND tiles of tokens at a time, with them the weight's tiles in order."""
    tiles_m = tl.cdiv(M, BM)
    first = pid // (BAND * TILES) * BAND
    size = tl.minimum(tiles_m - first, BAND)
    within = pid % (BAND * TILES)
    return first + within % size, within // size


@triton.jit
def load_tokens(at, inside, k, step, K: tl.constexpr, BK: tl.constexpr):
    """[BM, BK] of x at a step of K; 0 past the last token, where `inside` is false, and past K."""
    mask = inside[:, None] if K % BK == 0 else inside[:, None] & (step * BK + k < K)[None, :]
    return tl.load(at + step * BK, mask=mask, other=0.0)


@triton.jit
def load_rows(at, k, step, K: tl.constexpr, BK: tl.constexpr):
    """[BN, BK] of the weight at a step of K; 0 past K."""
    if K % BK == 0:
        return tl.load(at + step * BK)
    else:
        return tl.load(at + step * BK, mask=(step * BK + k < K)[None, :], other=0.0)


@triton.jit
def rows_of(first, N: tl.constexpr, B: tl.constexpr):
    """The B rows of a weight's tile that begins at `first`; past the end the last one again."""
    rows = tl.arange(0, B)
    return rows if N % B == 0 else tl.minimum(rows, N - 1 - first)


@triton.jit
def keep(acc, out, m0, n0, M, N, ROW: tl.constexpr, FIRST: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """Store a tile: tokens m0.. of M, columns n0.. of N, into `out` with ROW columns, cast to its type."""
    m, n = tl.arange(0, BM), tl.arange(0, BN)
    at = out + m0.to(tl.int64) * ROW + n0
    if FIRST:
        where, mask = m[None, :] * ROW + n[:, None], (m0 + m[None, :] < M) & (n0 + n[:, None] < N)
    else:
        where, mask = m[:, None] * ROW + n[None, :], (m0 + m[:, None] < M) & (n0 + n[None, :] < N)
    tl.store(at + where, acc.to(out.dtype.element_ty), mask=mask)


@triton.jit
def sum_splits(partial, out, M, N: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """out [M, N] = the sum of partial [SPLITS, M, N] in order."""
    total = tl.cast(M, tl.int64) * N
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), tl.float32)
    for s in tl.static_range(SPLITS):
        acc += tl.load(partial + s * total + i, mask=i < total, other=0.0)
    tl.store(out + i, acc.to(out.dtype.element_ty), mask=i < total)


@triton.jit
def by_parts(acc, a, b, SPLIT_A: tl.constexpr):
    """acc + a b, one operand fp32 and taken as three bf16 parts, the least first."""
    wide = a if SPLIT_A else b
    high = wide.to(tl.bfloat16)
    rest = wide - high.to(tl.float32)
    middle = rest.to(tl.bfloat16)
    low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
    for part in tl.static_range(3):
        piece = low if part == 0 else (middle if part == 1 else high)
        acc = tl.dot(piece, b, acc) if SPLIT_A else tl.dot(a, piece, acc)
    return acc


@triton.jit
def gemm(
    x, w, out, M,
    N: tl.constexpr, K: tl.constexpr, GROUPS: tl.constexpr, WITHIN: tl.constexpr, PRECISION: tl.constexpr,
    FIRST: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """A tile [BM, BN] of x [GROUPS, M, K] w [GROUPS, N, K]ᵀ -> [GROUPS, M, N], or a split's share of it: out is then
    fp32 [SPLITS, GROUPS, M, N]. WITHIN: x is [M, GROUPS, K]."""
    tiles_n: tl.constexpr = (N + BN - 1) // BN
    tile_m, tile_n = place(tl.program_id(0), M, BM, GROUPS * tiles_n)
    group, m0, n0, split = tile_n // tiles_n, tile_m * BM, tile_n % tiles_n * BN, tl.program_id(1)
    steps: tl.constexpr = (K + BK - 1) // BK
    share: tl.constexpr = (steps + SPLITS - 1) // SPLITS
    k, m = tl.arange(0, BK), tl.arange(0, BM)
    inside = m0 + m < M
    row: tl.constexpr = GROUPS * K if WITHIN else K
    behind = group.to(tl.int64) * K * (1 if WITHIN else M)
    x_at = x + m0.to(tl.int64) * row + behind + (m[:, None] * row + k[None, :])
    w_at = w + (group * N + n0).to(tl.int64) * K + (rows_of(n0, N, BN)[:, None] * K + k[None, :])
    acc = tl.zeros((BN, BM) if FIRST else (BM, BN), tl.float32)
    for step in range(split * share, min(steps, (split + 1) * share)):
        a, b = load_tokens(x_at, inside, k, step, K, BK), load_rows(w_at, k, step, K, BK)
        if x.dtype.element_ty == tl.float32 and w.dtype.element_ty == tl.bfloat16:
            acc = by_parts(acc, b, a.T, False) if FIRST else by_parts(acc, a, b.T, True)
        else:
            a = a.to(w.dtype.element_ty)  # bf16 tokens and an fp32 weight: both fp32
            acc = (
                tl.dot(b, a.T, acc, input_precision=PRECISION)
                if FIRST
                else tl.dot(a, b.T, acc, input_precision=PRECISION)
            )
    keep(acc, out + (split * GROUPS + group).to(tl.int64) * M * N, m0, n0, M, N, N, FIRST, BM, BN)


# -- host --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Model:
    """What the static model knows of a target.

    Attributes:
        programs: for each compute unit, that a split of K aims at: up to 32 tokens, and from there to 64.
        stages: of the pipeline, up to 64 tokens and above. row: bytes of a row of bf16 at a step, up to 64 tokens.
    """

    programs: tuple[int, int]
    stages: tuple[int, int]
    row: int


# From bytes in flight and shared memory. Nothing of AMD's or of the B200's was measured.
MODEL: Final = {
    "h100": Model((2, 1), (4, 3), 128),
    "h200": Model((2, 1), (4, 3), 128),
    "b200": Model((2, 1), (4, 3), 128),
    "mi355x": Model((2, 1), (3, 2), 256),
    "mi300x": Model((2, 1), (2, 2), 256),
}
ANY: Final = {"nvidia": "h100", "amd": "mi300x"}


def splits_of(programs: int, steps: int, wanted: int, most: int) -> int:
    """How many parts of K: as many as give at most `wanted` programs, of two steps or more; none is empty."""
    parts = max(1, min(wanted // programs, most, steps // 2))
    return cdiv(steps, cdiv(steps, parts))


def choose(device: Device, kernel: str, n: int, k: int, itemsize: int, groups: int, x: str, w: str) -> Tiles:
    """The configuration for `groups` weights [n, k] with elements of `itemsize` bytes, and `device.tokens` tokens.

    `x`, `w`: dtypes or layouts of the operands; what was measured of others says nothing of them.
    """
    problem: dict[str, int | str] = {"n": n, "k": k, "groups": groups, "x": x, "w": w}
    if (found := tuned(device.target, kernel, device.tokens, problem)) is not None:
        return Tiles(**found[0], origin=found[1])  # type: ignore[arg-type]
    return static(device, n, k, itemsize, groups)


def static(device: Device, n: int, k: int, itemsize: int, groups: int) -> Tiles:
    """As `choose`, by the static model: bytes in flight, programs for each compute unit, shared memory."""
    units, few = device.target.compute_units, device.tokens <= 64
    known = MODEL.get(device.target.name) or MODEL[ANY[device.target.vendor]]
    depth = max(32, min(power_of_two(k), (known.row if few and itemsize == 2 else 128) // itemsize))
    steps = cdiv(k, depth)
    if few:
        tokens = max(16, power_of_two(device.tokens))
        rows = 128 if tokens == 64 and groups * n // 128 >= units else 64
        wanted = known.programs[tokens == 64] * units
        splits = splits_of(groups * cdiv(n, rows), steps, wanted, 32)
        first = tokens < 64 or itemsize == 4
        return Tiles(first, tokens, rows, depth, splits, 4 if rows == 64 else 8, known.stages[0])
    tiles = groups * cdiv(device.tokens, 128) * cdiv(n, 128)
    # FP8 on Hopper: two programs a multiprocessor, so that one scales its sums while the other multiplies.
    # On sm_100 a tile of 256 rows leaves no register to spare: fp32 results of short rows spill.
    arch = device.target.arch
    wide = (itemsize == 2 and not (arch == "sm_100" and n < 8192)) or (itemsize == 1 and arch != "sm_90")
    rows = 256 if wide and tiles >= 2 * units and n % 256 == 0 else 128 if n > 64 else 64
    tokens = 128 if 10 * tiles >= 9 * units and itemsize < 4 else 64
    splits = splits_of(groups * cdiv(device.tokens, tokens) * cdiv(n, rows), steps, units, 8)
    return Tiles(itemsize == 4, tokens, rows, depth, splits, 4 if rows == 64 else 8, known.stages[1])


def launch_with_splits(
    device: Device, kernel: Any, args: Mapping[str, Any], constants: Mapping[str, Any], tiles: Tiles,
    shape: tuple[int, int, int], out: Tensor,
) -> None:  # fmt: skip
    """Launch a GEMM of shape (tokens, columns, weight tiles) and, if K is split, the sum of its parts -> out [M, N]."""
    m, n, weight_tiles = shape
    partial = out if tiles.splits == 1 else device.empty((tiles.splits, m, n), torch.float32)
    grid = (cdiv(m, tiles.tokens) * weight_tiles, tiles.splits)
    given = {**args, "out": partial, "M": m}
    device.launch(kernel, grid, given, {**constants, **tiles.constants}, tiles.warps, tiles.stages, tiles.origin)
    if tiles.splits > 1:
        block = 16 * device.target.wavefront  # 16 bytes a lane
        summed = {"partial": partial, "out": out, "M": m}
        told = {"N": n, "SPLITS": tiles.splits, "BLOCK": block}
        device.launch(sum_splits, (cdiv(m * n, block),), summed, told, 4, 1, tiles.origin)


def precision_of(device: Device, dtype: torch.dtype) -> str:
    """How the matrix unit multiplies a weight of that dtype: fp32 as sums of narrower parts, as exact as fp32."""
    exact = "tf32x3" if device.target.vendor == "nvidia" else "bf16x6"
    return exact if dtype == torch.float32 else "ieee"


def _product(
    device: Device, x: Tensor, weight: Tensor, tokens: int, groups: int, within: bool, dtype: torch.dtype
) -> Tensor:
    """x [groups, tokens, K], or `within` [tokens, groups, K], times weight [groups n, K] -> [groups, tokens, n]."""
    n, k = weight.shape[0] // groups, weight.shape[1]
    itemsize = max(x.dtype.itemsize, weight.dtype.itemsize)
    tiles = choose(device, "gemm", n, k, itemsize, groups, TYPES[x.dtype], TYPES[weight.dtype])
    constants = {
        "N": n, "K": k, "GROUPS": groups, "WITHIN": within, "PRECISION": precision_of(device, weight.dtype)
    }  # fmt: skip
    shape = (tokens, groups * n, groups * cdiv(n, tiles.rows))
    out = device.empty((tokens, groups * n), dtype)
    launch_with_splits(device, gemm, {"x": x, "w": weight}, constants, tiles, shape, out)
    return out


def _linear(device: Device, x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    n, k = weight.shape
    flat = x.view(-1, k)
    return _product(device, flat, weight, flat.shape[0], 1, False, dtype).view(*x.shape[:-1], n)


def linear(device: Device, x: Tensor, weight: Tensor) -> Tensor:
    """`torch.nn.functional.linear` of x [..., K] and weight [N, K] -> [..., N] in x's dtype, bf16 or fp32."""
    return _linear(device, x, weight, x.dtype)


def linear_fp32(device: Device, x: Tensor, weight: Tensor) -> Tensor:
    """The product in fp32 of x [..., K] and weight [N, K], each bf16 or fp32: nothing is rounded before the sums."""
    return _linear(device, x, weight, torch.float32)


def bmm(device: Device, x: Tensor, weight: Tensor) -> Tensor:
    """`torch.bmm` of x [G, T, K] and weight [G, K, N] -> [G, T, N] in their dtype, bf16 or fp32.

    Raises:
        ValueError: x is neither contiguous nor [T, G, K] with its first dims exchanged, or the weight is not
            [G, N, K] with its last dims exchanged: K must be what memory counts first.
    """
    (groups, tokens, k), n = x.shape, weight.shape[2]
    within = groups > 1 and x.stride() == (k, groups * k, 1)
    if not (within or x.is_contiguous()):
        raise ValueError(f"x has strides {tuple(x.stride())}; it is contiguous, or [T, G, K] exchanged")
    if not weight.transpose(1, 2).is_contiguous():
        raise ValueError(f"the weight has strides {tuple(weight.stride())}; it is [G, N, K] exchanged")
    flat = weight.transpose(1, 2).view(groups * n, k)
    return _product(device, x, flat, tokens, groups, within, x.dtype).view(groups, tokens, n)
