"""What packed numbers stand for, in float64: written from their definitions (spec 3.2, 3.4, 4.2), not with
`atomc.formats`, so that a mistake there, or in what calls it, shows as a difference.

Contract:
    `unpacked` and `unpacked_rows` give the exact values of stored codes and scales; `rounded` the values that the
    format's rule rounds to. Both refuse codes or scales of a dtype or shape that the layout's text does not name.

Terms:
    text      a layout as a plan spells it: ELEMENT:ROWSxCOLUMNS:SCALE[:FLOOR][:maxTOP]; of a cache row
              CHANNELS:LAYOUT+BF16_CHANNELS
    spacing   the distance between neighbours of an element's grid at a value; a value is rounded by half of it at most
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import torch
from torch import Tensor

from atomc.verify.errors import VerifyError


@dataclass(frozen=True)
class Code:
    """A floating-point code: its fields, the largest finite value, and the dtypes that may hold it.

    Attributes:
        mantissa: bits; negative where codes are plain integers. nan: byte patterns that are no number.
    """

    exponent: int
    mantissa: int
    bias: int
    top: float
    stored: tuple[torch.dtype, ...]
    nan: frozenset[int] = frozenset()

    @property
    def bits(self) -> int:
        return 1 + self.exponent + self.mantissa

    @property
    def smallest(self) -> float:
        """The least positive number, which is the spacing near zero."""
        return 2.0 ** (1 - self.bias - self.mantissa)


CODES: Final = {
    "e4m3": Code(4, 3, 7, 448.0, (torch.float8_e4m3fn,), frozenset({0x7F, 0xFF})),
    "e4m3fnuz": Code(4, 3, 8, 240.0, (torch.float8_e4m3fnuz,), frozenset({0x80})),
    "e5m2": Code(5, 2, 15, 57344.0, (torch.float8_e5m2,), frozenset(range(0x7C, 0x80)) | frozenset(range(0xFC, 0x100))),
    "e5m2fnuz": Code(5, 2, 16, 57344.0, (torch.float8_e5m2fnuz,), frozenset({0x80})),
    "e2m1": Code(2, 1, 1, 6.0, (torch.int8, torch.uint8)),
}
FLOATS: Final = {  # mantissa bits and least positive number of the dtypes that results have
    torch.float32: (23, 2.0**-149), torch.bfloat16: (7, 2.0**-133), torch.float16: (10, 2.0**-24),
    torch.float64: (52, 2.0**-1074),
}  # fmt: skip
INT8: Final = Code(0, 7, 1, 127.0, (torch.int8,))  # the grid near zero of an element that is all mantissa


@dataclass(frozen=True)
class Grid:
    """A layout's text, read."""

    text: str
    element: str
    code: Code
    rows: int
    columns: int  # 0: the whole row
    scale: str
    floor: float
    top: float

    @property
    def packed(self) -> int:
        """Codes in a stored byte."""
        return 2 if self.element == "e2m1" else 1


@lru_cache(maxsize=256)
def grid_of(text: str) -> Grid:
    """The grid of a layout's text. Raises `VerifyError` if it is none."""
    try:
        element, block, scale, *rest = text.split(":")
        rows, columns = block.split("x")
        code = INT8 if element == "int8" else CODES[element]
        tops = [float(part[3:]) for part in rest if part.startswith("max")]
        floors = [float(part) for part in rest if not part.startswith("max")]
        wide = 0 if columns == "*" else int(columns)
        return Grid(text, element, code, int(rows), wide, scale, sum(floors), tops[0] if tops else code.top)
    except (ValueError, KeyError) as error:
        raise VerifyError(f"{text!r} is no layout: {error}.") from error


@lru_cache
def _values(element: str, device: torch.device) -> Tensor:
    """[256] (e2m1: [16]) float64: the number behind each code, from its sign, exponent and mantissa."""
    if element == "int8":
        return torch.arange(256, dtype=torch.uint8, device=device).view(torch.int8).double()
    code = CODES[element]
    byte = torch.arange(1 << code.bits, device=device)
    sign, exponent = byte >> (code.bits - 1), (byte >> code.mantissa) & ((1 << code.exponent) - 1)
    fraction = (byte & ((1 << code.mantissa) - 1)).double() / 2**code.mantissa
    power = torch.exp2((exponent.clamp(min=1) - code.bias).double())
    value = torch.where(exponent == 0, fraction, 1 + fraction) * power * torch.where(sign == 1, -1.0, 1.0)
    value[list(code.nan)] = torch.nan
    return value


def decoded(codes: Tensor, grid: Grid) -> Tensor:
    """float64 numbers [..., n] of stored codes [..., n / packed]. Raises `VerifyError` for codes of another dtype."""
    if codes.dtype not in grid.code.stored:
        raise VerifyError(f"codes are {_short(codes.dtype)}; {grid.text} has {_short(grid.code.stored[0])}")
    byte = codes.contiguous().view(torch.uint8).long()
    if grid.packed == 2:  # column 2j in the low nibble, 2j + 1 in the high (spec 3.2)
        byte = torch.stack((byte & 15, byte >> 4), dim=-1).flatten(-2)
    return _values(grid.element, byte.device)[byte]


def factors(scales: Tensor, grid: Grid) -> Tensor:
    """float64 of stored scales. Raises `VerifyError` for scales of another dtype."""
    if grid.scale == "e8m0" and scales.dtype == torch.float8_e8m0fnu:
        byte = scales.contiguous().view(torch.uint8).long()
        return torch.where(byte == 255, torch.nan, torch.exp2((byte - 127).double()))
    if grid.scale != "e8m0" and scales.dtype in (torch.float32, torch.bfloat16, torch.float64):
        return scales.double()
    raise VerifyError(f"scales are {_short(scales.dtype)}; {grid.text} has {grid.scale}")


def spread(scales: Tensor, grid: Grid, shape: tuple[int, ...]) -> Tensor:
    """Each block's number in the place of its elements. Raises `VerifyError` if the shape is another layout's."""
    width = grid.columns or shape[-1]
    lead = shape[:-1] if grid.rows == 1 else (*shape[:-2], -(-shape[-2] // grid.rows))
    expected = (*lead, -(-shape[-1] // width))
    if tuple(scales.shape) != expected:
        raise VerifyError(f"scales have shape {list(scales.shape)}; {grid.text} of {list(shape)} has {list(expected)}")
    wide = scales.repeat_interleave(width, -1)[..., : shape[-1]]
    return wide if grid.rows == 1 else wide.repeat_interleave(grid.rows, -2)[..., : shape[-2], :]


def unpacked(codes: Tensor, scales: Tensor, text: str) -> tuple[Tensor, Tensor]:
    """float64 values of a pair, and the scale of each."""
    grid = grid_of(text)
    numbers = decoded(codes, grid)
    scale = spread(factors(scales, grid), grid, tuple(numbers.shape))
    return numbers * scale, scale


# -- the rounding rule -------------------------------------------------------------------------------------------------


def block_amax(x: Tensor, grid: Grid) -> Tensor:
    """Largest magnitude of each block of x [..., rows, columns]: the shape of its scales."""
    width = grid.columns or x.shape[-1]
    blocks: Tensor = torch.nn.functional.pad(x.abs(), (0, -x.shape[-1] % width)).unflatten(-1, (-1, width)).amax(-1)
    if grid.rows == 1:
        return blocks
    padded = torch.nn.functional.pad(blocks, (0, 0, 0, -x.shape[-2] % grid.rows))
    tall: Tensor = padded.unflatten(-2, (-1, grid.rows)).amax(-2)
    return tall


def scale_of(amax: Tensor, grid: Grid) -> Tensor:
    """float64 scale of blocks by spec 3.4: amax / top, for `e8m0` and `pow2` rounded up to a power of two."""
    amax = torch.clamp(amax, min=float(torch.tensor(grid.floor, dtype=torch.float32)))
    if grid.scale == "float32":
        top = torch.tensor(grid.top, dtype=torch.float32, device=amax.device)  # by a number a GPU does not divide
        scale = (amax.float() / top).double()
    else:
        mantissa, exponent = torch.frexp(amax)
        top_mantissa, top_exponent = torch.frexp(torch.tensor(grid.top, dtype=torch.float64))
        scale = torch.exp2((exponent - top_exponent + (mantissa > top_mantissa)).double())
    return torch.where(amax == 0, 1.0, scale.clamp(min=2.0**-126))


def spacing(value: Tensor, mantissa: int, smallest: float) -> Tensor:
    """float64 distance to the next number of a grid at `value` (in units of the scale)."""
    _, exponent = torch.frexp(value)
    return torch.exp2((exponent - 1 - mantissa).double()).clamp(min=smallest)


def grid_spacing(x: Tensor, scale: Tensor, grid: Grid) -> Tensor:
    """Spacing of the grid at x for the scale of its block, in the units of x."""
    if grid.element == "int8":
        return scale.expand_as(x)
    return spacing(x / scale, grid.code.mantissa, grid.code.smallest) * scale


def rounded(x: Tensor, text: str, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """float64 x as the layout rounds it (nearest, ties to even, saturating), and the scales [blocks].

    x is rounded to float32 first: that is what a `quantize` is given. `scale`: of each block, else by the rule.
    """
    grid = grid_of(text)
    x = x.float().double()
    blocks = scale_of(block_amax(x, grid), grid) if scale is None else scale
    wide = spread(blocks, grid, tuple(x.shape))
    number = (x.float() / wide.float()).double()
    step = grid_spacing(number, torch.ones(()).double(), grid)
    return (torch.round(number / step) * step).clamp(-grid.code.top, grid.code.top) * wide, blocks


# -- cache rows --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RowGrid:
    """A row layout's text, read: `narrow` channels in `grid`, then `wide` in bfloat16."""

    text: str
    narrow: int
    grid: Grid | None
    wide: int

    @property
    def code_bytes(self) -> int:
        return self.narrow // self.grid.packed if self.grid else 0

    @property
    def body_bytes(self) -> int:
        return self.code_bytes + 2 * self.wide

    @property
    def scales(self) -> int:
        return -(-self.narrow // (self.grid.columns or self.narrow)) if self.grid else 0

    @property
    def scale_bytes(self) -> int:
        size = self.scales * (1 if self.grid and self.grid.scale == "e8m0" else 4)
        return -(-size // 8) * 8 if self.wide else size


@lru_cache(maxsize=256)
def row_grid_of(text: str) -> RowGrid:
    """The grid of a row layout's text. Raises `VerifyError` if it is none."""
    left, _, wide = text.rpartition("+")
    narrow, _, layout = left.partition(":")
    try:
        return RowGrid(text, int(narrow), grid_of(layout) if layout else None, int(wide))
    except ValueError as error:
        raise VerifyError(f"{text!r} is no row layout: {error}.") from error


def unpacked_records(body: Tensor, scales: Tensor, text: str) -> Tensor:
    """float64 rows [..., channels] of uint8 records [..., body bytes] and [..., scale bytes]."""
    rows, parts = row_grid_of(text), []
    if rows.grid is not None:
        codes = body[..., : rows.code_bytes].contiguous().view(rows.grid.code.stored[0])
        used = rows.scales * (1 if rows.grid.scale == "e8m0" else 4)
        kind = torch.float8_e8m0fnu if rows.grid.scale == "e8m0" else torch.float32
        parts.append(unpacked(codes, scales[..., :used].contiguous().view(kind), rows.grid.text)[0])
    if rows.wide:
        parts.append(body[..., rows.code_bytes : rows.body_bytes].contiguous().view(torch.bfloat16).double())
    return torch.cat(parts, dim=-1)


def records_of(pages: Tensor, text: str) -> tuple[Tensor, Tensor]:
    """The records of uint8 pages [P, page bytes]: [P, rows, body bytes] and [P, rows, scale bytes], views."""
    rows = row_grid_of(text)
    count = pages.shape[1] // (rows.body_bytes + rows.scale_bytes)
    split = count * rows.body_bytes
    body: Tensor = pages[:, :split].unflatten(1, (count, rows.body_bytes))
    scales: Tensor = pages[:, split : split + count * rows.scale_bytes].unflatten(1, (count, rows.scale_bytes))
    return body, scales


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
