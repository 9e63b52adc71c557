"""Exact conversions between layouts: FP4 into FP8, one FP8 dialect into the other; and the Hadamard rotation.

What is called exact here is exact for every number, and refused where one is not.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from atomc.formats.element import E4M3, E4M3_FNUZ, decode_e2m1, unpack_e2m1
from atomc.formats.layout import MXFP4
from atomc.formats.scale import E8M0_BIAS, E8M0_NAN, check_scales

# A tile's FP8 scale stands 2^6 below its largest FP4 scale: e2m1's 6 is then 384 (of 448). With a scale 2^14 below that
# one e2m1's 0.5 is e4m3's smallest number, 2^-9; with one 2^18 below it every number but 0 is less.
EXPANSION_TOP: Final = 6
EXPANSION_SPAN: Final = 14
_SHIFTS: Final = range(-12, EXPANSION_TOP + 1)  # of a group's scale against its tile's: 2^shift
_BAND: Final = 1 << 20  # codes expanded at a time


def expand_mxfp4(codes: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """MXFP4 [rows, columns/2], scales [rows, columns/32] as FP8 tiles of 128 x 128: the same numbers.

    A tile's scale stands 2^6 below the largest scale of its groups, those of zeros aside. An e2m1 number times a power
    of two has two significant bits, so it is an e4m3 number wherever it lies within 2^-9 .. 448 of the scale: where the
    groups of a tile are at most 2^14 apart, and beyond where only numbers that are left out would be inexact.

    Raises:
        ValueError: some number of a tile is not exact (says which tile and how far apart its groups are), a scale is
            NaN, or codes and scales do not belong together.
    """
    rows, columns = codes.shape[0], 2 * codes.shape[1]
    check_mxfp4(codes, scales)
    if bool((scales.view(torch.uint8) == E8M0_NAN).any()):
        raise ValueError("FP4 is not exact in FP8: a scale is NaN")
    groups = codes.contiguous().view(torch.uint8).view(rows, -1, MXFP4.columns // 2)
    exponent = scales.view(torch.uint8).int()
    numbers = (groups & 0x77).amax(-1) > 0  # 0x77: without the signs, so that -0 is as little as 0
    tiles = _tiles(torch.where(numbers, exponent, -1))
    top, least = tiles.amax((1, 3)), torch.where(tiles < 0, E8M0_NAN, tiles).amin((1, 3))
    byte = torch.where(top < 0, E8M0_BIAS, (top - EXPANSION_TOP).clamp(min=0))
    shift = exponent - byte.repeat_interleave(128, 0)[:rows].repeat_interleave(4, 1)[:, : groups.shape[1]]
    start = (shift.clamp(_SHIFTS[0], _SHIFTS[-1]) - _SHIFTS[0]).mul_(256).unsqueeze(-1)
    table, out = _expansion(codes.device), torch.empty_like(groups, dtype=torch.int16)
    step = max(1, _BAND // max(1, columns))
    for i in range(0, rows, step):
        index = (groups[i : i + step] + start[i : i + step]).flatten()
        torch.index_select(table, 0, index, out=out[i : i + step].view(-1))
    values = out.view(rows, -1).view(E4M3.storage)
    if bool((top - least > EXPANSION_SPAN).any()):
        _refuse_inexact(values, top - least)
    return values, byte.to(torch.uint8).view(torch.float8_e8m0fnu)


def check_mxfp4(codes: Tensor, scales: Tensor) -> None:
    """Raise `ValueError` if shapes and dtypes are not those of MXFP4 [rows, columns]; meta tensors will do."""
    if codes.dim() != 2:
        raise ValueError(f"codes {tuple(codes.shape)} are not those of a matrix")
    shape = MXFP4.scale_shape((codes.shape[0], 2 * codes.shape[1]))
    if codes.dtype not in (torch.int8, torch.uint8) or scales.dtype != torch.float8_e8m0fnu:
        raise ValueError(f"{MXFP4} has int8 codes and float8_e8m0fnu scales, found {codes.dtype} and {scales.dtype}")
    if 2 * codes.shape[1] % MXFP4.columns or tuple(scales.shape) != shape:
        raise ValueError(
            f"codes {tuple(codes.shape)} of {MXFP4} need whole groups and scales {shape}, found {tuple(scales.shape)}"
        )


def _tiles(groups: Tensor) -> Tensor:
    """[tiles, 128, tiles, 4] of [rows, groups]; -1 fills the ragged ones."""
    padded = torch.nn.functional.pad(groups, (0, -groups.shape[1] % 4, 0, -groups.shape[0] % 128), value=-1)
    tiles: Tensor = padded.unflatten(0, (-1, 128)).unflatten(2, (-1, 4))
    return tiles


def _expansion(device: torch.device) -> Tensor:
    """int16 [shifts * 256]: the two e4m3 codes of each packed byte times 2^shift, NaN where a number is not exact."""
    pairs = decode_e2m1(unpack_e2m1(torch.arange(256, dtype=torch.uint8, device=device).unsqueeze(-1)))
    values = torch.stack([pairs * 2.0**shift for shift in _SHIFTS])
    found = E4M3.encode(values)
    return torch.where(found.float() == values, found.float(), torch.nan).to(E4M3.storage).view(torch.int16).flatten()


def _refuse_inexact(values: Tensor, apart: Tensor) -> None:
    """Raise for the first number that the expansion could not hold, if there is one."""
    inexact = (values.view(torch.uint8) & 0x7F == 0x7F).nonzero()
    if len(inexact):
        tile = (inexact[0] // 128).tolist()
        raise ValueError(
            f"FP4 is not exact in FP8: tile {tile} has groups 2^{int(apart[tile[0], tile[1]])} apart, at most "
            f"2^{EXPANSION_SPAN} fit"
        )


def to_fnuz(codes: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """OCP e4m3 codes with any scales in the FNUZ dialect: the same numbers.

    A FNUZ byte is worth half of the same OCP byte, so the bytes stay and the scales double. -0, which FNUZ has not,
    becomes 0; NaN becomes FNUZ's.

    Raises:
        ValueError: the codes are not OCP e4m3, or a scale is 2^127 or more and cannot double.
    """
    check_ocp(codes, scales)
    byte = codes.view(torch.uint8)
    moved = torch.where(byte & 0x7F == 0x7F, 0x80, torch.where(byte == 0x80, 0, byte)).to(torch.uint8)
    if scales.dtype == torch.float8_e8m0fnu:
        old = scales.view(torch.uint8)
        if bool((old == E8M0_NAN - 1).any()):
            raise ValueError("a scale of 2^127 cannot double")
        doubled = torch.where(old == E8M0_NAN, E8M0_NAN, old.int() + 1).to(torch.uint8).view(torch.float8_e8m0fnu)
    else:
        doubled = scales * 2
        if bool((doubled.isinf() & scales.isfinite()).any()):
            raise ValueError(f"a scale of {scales.max():g} cannot double")
    return moved.view(E4M3_FNUZ.storage), doubled


def check_ocp(codes: Tensor, scales: Tensor) -> None:
    """Raise `ValueError` if dtypes are not those of OCP e4m3 with scales; meta tensors will do."""
    if codes.dtype != E4M3.storage:
        raise ValueError(f"codes of {E4M3.name} are float8_e4m3fn, not {str(codes.dtype).removeprefix('torch.')}")
    check_scales(scales)


def hadamard_matrix(n: int) -> Tensor:
    """[n, n] float32 orthonormal Hadamard matrix of Sylvester's order, entries ±n^-0.5; symmetric, its own inverse.

    Raises:
        ValueError: n is no power of two.
    """
    if n < 1 or n & (n - 1):
        raise ValueError(f"a Hadamard matrix of Sylvester's order has a power of two of rows, not {n}")
    matrix = torch.ones(1, 1)
    while matrix.shape[0] < n:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    norm: float = n**-0.5
    return matrix * norm
