"""The prologue: embeddings as residual streams, and the step's rotation angles (spec 2.0, 2.1, 2.2)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from atomc.codegen.device import Device, cdiv
from atomc.codegen.kernels.quantize import power_of_two

# -- embedding ---------------------------------------------------------------------------------------------------------


@triton.jit
def embed_rows(
    weight, ids, x, h, post, comb,
    D: tl.constexpr, BLOCK: tl.constexpr, N: tl.constexpr, LOOKUP: tl.constexpr, X: tl.constexpr,
):  # fmt: skip
    """BLOCK channels of row ids[t] of weight [V, D] (LOOKUP; else of row t): to x (X), and to N streams.

    N > 0: every stream h [T, N, D] is the row, post [T, N] is 0 and comb [T, N, N] the identity.
    """
    t, channel = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(ids + t).to(tl.int64) if LOOKUP else t
    values = tl.load(weight + row * D + channel, mask=channel < D)
    if X:
        tl.store(x + t * D + channel, values, mask=channel < D)
    if N > 0:
        for k in tl.static_range(N):
            tl.store(h + (t * N + k) * D + channel, values, mask=channel < D)
        if tl.program_id(1) == 0:
            i = tl.arange(0, N)
            tl.store(post + t * N + i, tl.zeros((N,), tl.float32))
            same = (i[:, None] == i[None, :]).to(tl.float32)
            tl.store(comb + t * N * N + i[:, None] * N + i[None, :], same)


def _embed(device: Device, weight: Tensor, ids: Tensor | None, n: int, x: Tensor | None) -> tuple[Tensor, ...]:
    d = weight.shape[-1]
    t = weight.numel() // d if ids is None else ids.shape[0]
    if n & (n - 1):
        raise ValueError(f"{n} residual streams: a kernel has a power of two of them")
    h = device.empty((t, n, d), weight.dtype) if n else None
    post = device.empty((t, n), torch.float32) if n else None
    comb = device.empty((t, n, n), torch.float32) if n else None
    block = min(power_of_two(d), 1024)
    args = {"weight": weight, "ids": ids, "x": x, "h": h, "post": post, "comb": comb}
    constants = {"D": d, "BLOCK": block, "N": n, "LOOKUP": ids is not None, "X": x is not None}
    device.launch(embed_rows, (t, cdiv(d, block)), args, constants, warps=max(block // 256, 1))
    return tuple(part for part in (h, x, post, comb) if part is not None)


def embed(device: Device, weight: Tensor, ids: Tensor) -> Tensor:
    """`aten.embedding`: weight [V, D], ids [T] int32 or int64 -> [T, D]."""
    return _embed(device, weight, ids, 0, device.empty((ids.shape[0], weight.shape[1]), weight.dtype))[0]


def enter(device: Device, x: Tensor, n: int) -> tuple[Tensor, ...]:
    """`atomc.models.deepseek_v4.hyper_connection.enter`, of x [T, D]: -> h [T, n, D], post [T, n], comb [T, n, n]."""
    return _embed(device, x, None, n, None)


def embed_enter(device: Device, weight: Tensor, ids: Tensor, n: int) -> tuple[Tensor, ...]:
    """Both in one kernel: -> h [T, n, D], y = the embedding [T, D], post [T, n], comb [T, n, n]."""
    return _embed(device, weight, ids, n, device.empty((ids.shape[0], weight.shape[1]), weight.dtype))


# -- angles ------------------------------------------------------------------------------------------------------------


@triton.jit
def _turn(theta):
    """cos and sin of fp32 angles below 2^22, off by less than 2e-7.

    The compiler's own are as accurate, but keep a table in memory for arguments that do not occur here. Quarter turns
    are taken off in fp64, for a few numbers a token.
    """
    wide = theta.to(tl.float64)
    k = tl.floor(wide * 0.6366197723675814 + 0.5)
    r = (wide - k * 1.5707963267948966).to(tl.float32)
    z = r * r
    s = r + r * z * (-1.6666654611e-1 + z * (8.3321608736e-3 + z * -1.9515295891e-4))
    c = 1.0 - 0.5 * z + z * z * (4.166664568298827e-2 + z * (-1.388731625493765e-3 + z * 2.443315711809948e-5))
    quarter = k.to(tl.int32)
    odd = (quarter & 1) == 1
    cos, sin = tl.where(odd, s, c), tl.where(odd, c, s)
    return tl.where(((quarter + 1) & 2) == 2, -cos, cos), tl.where((quarter & 2) == 2, -sin, sin)


@triton.jit
def angle_rows(
    positions, ends, inv_freq, cos, sin, M,
    PAIRS: tl.constexpr, PAIR_BLOCK: tl.constexpr, BM: tl.constexpr, RATIO: tl.constexpr,
):  # fmt: skip
    """cos, sin [M, PAIRS] at positions [M]; with RATIO > 0 at the first positions of the windows that end at `ends`."""
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    pair = tl.arange(0, PAIR_BLOCK)[None, :]
    token = m
    if RATIO > 0:
        token = tl.maximum(tl.load(ends + m, mask=m < M, other=0), 0)  # -1 pads: the angles of some token, unused
    position = tl.load(positions + token, mask=m < M, other=0)
    if RATIO > 0:
        position -= RATIO - 1
    theta = position.to(tl.float32)[:, None] * tl.load(inv_freq + pair, mask=pair < PAIRS, other=0.0)
    c, s = _turn(theta)
    at, keep = m.to(tl.int64)[:, None] * PAIRS + pair, (m < M)[:, None] & (pair < PAIRS)
    tl.store(cos + at, c, mask=keep)
    tl.store(sin + at, s, mask=keep)


def _angles(
    device: Device, positions: Tensor, ends: Tensor | None, ratio: int, inv_freq: Tensor
) -> tuple[Tensor, Tensor]:
    rows, pairs = (positions if ends is None else ends).shape[0], inv_freq.shape[0]
    cos, sin = device.empty((rows, pairs), torch.float32), device.empty((rows, pairs), torch.float32)
    bm = 4 if device.tokens <= 64 else 16
    args = {"positions": positions, "ends": ends, "inv_freq": inv_freq, "cos": cos, "sin": sin, "M": rows}
    constants = {"PAIRS": pairs, "PAIR_BLOCK": power_of_two(pairs), "BM": bm, "RATIO": ratio}
    device.launch(angle_rows, (cdiv(rows, bm),), args, constants, warps=2)
    return cos, sin


def angles(device: Device, positions: Tensor, inv_freq: Tensor) -> tuple[Tensor, Tensor]:
    """`cos, sin` of `positions [T].float() * inv_freq [rd/2]`, [T, rd/2] fp32 each."""
    return _angles(device, positions, None, 0, inv_freq)


def row_angles(device: Device, positions: Tensor, ends: Tensor, ratio: int, inv_freq: Tensor) -> tuple[Tensor, Tensor]:
    """`angles` at `positions[ends.clamp(min=0)] - (ratio - 1)`: of the rows whose windows end at tokens `ends` [N]."""
    return _angles(device, positions, ends, ratio, inv_freq)
