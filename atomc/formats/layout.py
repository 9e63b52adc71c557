"""Layouts: how a tensor is quantised, as one value with one spelling: element, block, scale, floor.

    e4m3:128x128:e8m0          FP8 weights of a release: one E8M0 scale for each 128 x 128 tile (spec 3.2)
    e4m3:1x128:e8m0:0.0001     activations: a scale for 128 consecutive channels of a token, amax at least 1e-4 (3.4)
    e2m1:1x32:e8m0             MXFP4: two codes to a byte, a scale for 32 consecutive columns of a row
    e4m3:1x*:float32           one scale for each row (output channel of a weight, token of an activation)

Terms:
    block   the elements that share a scale: rows x columns of the last two dims; the last block may be ragged.
    pair    what quantising gives: stored codes, and stored scales [..., ceil(rows / r), ceil(columns / c)]; with blocks
            of one row, scales [..., ceil(columns / c)] beside codes [..., columns / packed].
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Final, cast, get_args

import torch
from torch import Tensor

from atomc.formats.element import E4M3_FNUZ, E5M2_FNUZ, ELEMENTS, Element
from atomc.formats.scale import Scale, block_scale, check_scales, load_scale, store_scale

_BLOCK: Final = re.compile(r"([1-9][0-9]*)x(\*|[1-9][0-9]*)")
_BAND: Final = 1 << 20  # elements converted at a time: quantising needs the input, the output and little else


@dataclass(frozen=True)
class Layout:
    """A quantised layout of the last two dims of a tensor.

    Attributes:
        element: what a code stands for, its dialect included.
        rows, columns: of a block; columns 0: the whole row.
        scale: how scales are rounded and stored. floor: least amax that a scale is made from.
        largest: magnitude that amax is brought to; the element's own unless set lower (2 at the least, so that the
            scale of the largest float32 is a number).
    """

    element: Element
    rows: int
    columns: int
    scale: Scale
    floor: float = 0.0
    largest: float = 0.0

    @cached_property
    def top(self) -> float:
        """The magnitude that a block's amax is brought to."""
        return self.largest or self.element.largest

    def __str__(self) -> str:
        parts = [self.element.name, f"{self.rows}x{self.columns or '*'}", self.scale]
        parts += [f"{self.floor!r}"] if self.floor else []
        parts += [f"max{self.largest!r}".removesuffix(".0")] if self.largest else []
        return ":".join(parts)

    @staticmethod
    def parse(text: str) -> Layout:
        """The layout that `str` spells so.

        Raises:
            ValueError: says what is wrong with the text.
        """
        return _parse(text)

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the scales of values [..., rows, columns] (or [..., columns] with blocks of one row)."""
        columns = 1 if self.columns == 0 else -(-shape[-1] // self.columns)
        if self.rows == 1:
            return (*shape[:-1], columns)
        return (*shape[:-2], -(-shape[-2] // self.rows), columns)

    def code_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the stored codes of values of that shape. Raises `ValueError` where pairs would be cut."""
        if shape[-1] % self.element.packed:
            raise ValueError(f"{shape[-1]} columns cannot be packed in pairs")
        return (*shape[:-1], shape[-1] // self.element.packed)

    @property
    def scale_dtype(self) -> torch.dtype:
        """Of stored scales."""
        return torch.float8_e8m0fnu if self.scale == "e8m0" else torch.float32

    def bytes(self, shape: tuple[int, ...]) -> int:
        """Stored bytes of values of that shape, scales included."""
        return math.prod(self.code_shape(shape)) * self.element.storage.itemsize + (
            math.prod(self.scale_shape(shape)) * self.scale_dtype.itemsize
        )

    @property
    def bits_per_value(self) -> float:
        """Bits of a value, its share of a full block's scale included; a whole row's scale counts as none."""
        share = 8 * self.scale_dtype.itemsize / (self.rows * self.columns) if self.columns else 0.0
        return self.element.bits + share

    def fnuz(self) -> Layout:
        """The layout of the FNUZ dialect that holds the very same numbers (see `atomc.formats.convert.to_fnuz`).

        Its grid is that of OCP at half the value (e4m3: up to 224): amax is brought there, with twice the scale, and
        every rounding is the same. Only a block whose OCP scale is the least there is, 2^-126, may keep that scale here
        and have the finer grid. An element without dialects stays as it is.
        """
        element = {"e4m3": E4M3_FNUZ, "e5m2": E5M2_FNUZ}.get(self.element.name)
        return replace(self, element=element, largest=self.top / 2) if element else self


@lru_cache(maxsize=256)
def _parse(text: str) -> Layout:
    parts = text.split(":")
    if len(parts) < 3 or parts[0] not in ELEMENTS or parts[2] not in get_args(Scale):
        known = f"ELEMENT:ROWSxCOLUMNS:SCALE, elements {', '.join(ELEMENTS)}, scales {', '.join(get_args(Scale))}"
        raise ValueError(f"{text!r} is no layout ({known})")
    block = _BLOCK.fullmatch(parts[1])
    if block is None:
        raise ValueError(f"{text!r} is no layout: block {parts[1]!r} is not ROWSxCOLUMNS, such as 128x128, 1x32 or 1x*")
    floor, largest = 0.0, 0.0
    for part in parts[3:]:
        try:
            if part.startswith("max"):
                largest = float(part.removeprefix("max"))
            else:
                floor = float(part)
        except ValueError:
            raise ValueError(f"{text!r} is no layout: {part!r} is neither a floor nor maxVALUE") from None
    element = ELEMENTS[parts[0]]
    if not (0 <= floor < math.inf and (largest == 0 or 2 <= largest < element.largest)):
        raise ValueError(
            f"{text!r} is no layout: the floor is not negative, and max is 2 or more, below {element.largest:g}"
        )
    wide = 0 if block[2] == "*" else int(block[2])
    if wide % element.packed:
        raise ValueError(f"{text!r} is no layout: a block of {element.name} has an even number of columns")
    layout = Layout(element, int(block[1]), wide, cast(Scale, parts[2]), floor, largest)
    if str(layout) != text:
        raise ValueError(f"{text!r} is no layout: {str(layout)!r} is how it is spelled")
    return layout


# Of a release (spec 3.2, 3.4), and of the other schemes.
FP8_TILE: Final = Layout.parse("e4m3:128x128:e8m0")
FP8_TILE_F32: Final = Layout.parse("e4m3:128x128:pow2")  # Base releases: the scales are float32
MXFP4: Final = Layout.parse("e2m1:1x32:e8m0")
FP8_ACTIVATION: Final = Layout.parse("e4m3:1x128:e8m0:0.0001")
FP8_ROW_CHANNELS: Final = Layout.parse("e4m3:1x64:e8m0:0.0001")  # the NoPE channels of a cache row
FP4_ACTIVATION: Final = Layout.parse(f"e2m1:1x32:e8m0:{6 * 2.0**-126!r}")  # index queries and keys
FP8_INDEX: Final = Layout.parse("e4m3:1x128:pow2:0.0001")  # index rows of 132 bytes
FP8_CHANNEL: Final = Layout.parse("e4m3:1x*:float32")  # PTPC: a scale for each output channel, each token
NAMES: Final = {
    "fp8_tile": FP8_TILE, "fp8_tile_f32": FP8_TILE_F32, "mxfp4": MXFP4, "fp8_activation": FP8_ACTIVATION,
    "fp8_row": FP8_ROW_CHANNELS, "fp4_activation": FP4_ACTIVATION, "fp8_index": FP8_INDEX, "fp8_channel": FP8_CHANNEL,
}  # fmt: skip


# -- conversion --------------------------------------------------------------------------------------------------------


def quantize(x: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """The pair of x [..., rows, columns] (float): nearest even within each block's scale, which is rounded up.

    Raises:
        ValueError: the element packs two codes to a byte and the columns are odd; the blocks have rows and x has none.
    """
    if layout.rows > 1 or x.numel() > _BAND:
        return _quantize_bands(x.detach(), layout)
    blocks, scale = _scaled_blocks(x.detach(), layout)
    return _codes(blocks / scale, x.shape[-1], layout), store_scale(scale, layout.scale).squeeze(-1)


def _codes(scaled: Tensor, columns: int, layout: Layout) -> Tensor:
    """Codes of blocks [..., n, c] of values already divided by their scales, without what pads the last block."""
    flat = scaled.flatten(-2)
    return layout.element.encode(flat if flat.shape[-1] == columns else flat[..., :columns])


def _scaled_blocks(x: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """Blocks of one row [..., n, c] in float32 (zeros pad the last), and their scales [..., n, 1]."""
    columns, width = x.shape[-1], layout.columns or x.shape[-1]
    values = x.float()
    if columns % width:
        values = torch.nn.functional.pad(values, (0, -columns % width))
    blocks = values.unflatten(-1, (-1, width))
    return blocks, scales_of(blocks.abs().amax(-1, keepdim=True), layout)


def scales_of(amax: Tensor, layout: Layout) -> Tensor:
    """float32 scales of blocks with those largest magnitudes."""
    return block_scale(amax.clamp(min=layout.floor) if layout.floor else amax, layout.top, layout.scale)


def _quantize_bands(x: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """`quantize` a band of rows at a time."""
    shape = tuple(x.shape)
    flat = matrices(x, layout)
    codes = flat.new_empty(layout.code_shape(tuple(flat.shape)), dtype=layout.element.storage)
    scales = flat.new_empty(layout.scale_shape(tuple(flat.shape)), dtype=layout.scale_dtype)
    for m, rows, tiles in bands(flat, layout):
        part = flat[m, rows].float()
        scale = scales_of(block_amax(part, layout), layout)
        scales[m, tiles] = store_scale(scale, layout.scale)
        scaled = torch.empty_like(part)
        for (block, factor), (dest, _) in zip(
            _blocks(part, scale, layout), _blocks(scaled, scale, layout), strict=True
        ):
            torch.div(block, factor, out=dest)
        codes[m, rows] = layout.element.encode(scaled)
    return codes.view(layout.code_shape(shape)), scales.view(layout.scale_shape(shape))


def dequantize(codes: Tensor, scales: Tensor, layout: Layout, dtype: torch.dtype = torch.float32) -> Tensor:
    """Values [..., rows, columns] of a pair. With power-of-two scales exact in float32, and in bfloat16 from 2^-133 on.

    Raises:
        ValueError: codes of another dtype or dialect, or scales of another shape or dtype than the layout's.
    """
    flat, shape = matrices(codes, layout), check_pair(codes, scales, layout)
    factors = load_scale(scales)
    if layout.rows == 1 and codes.numel() <= _BAND:
        return (layout.element.decode(codes) * spread(factors, layout, 1, shape[-1])).to(dtype)
    factors = factors.reshape(layout.scale_shape((*flat.shape[:-1], shape[-1])))
    out = flat.new_empty((*flat.shape[:-1], shape[-1]), dtype=dtype)
    for m, rows, tiles in bands(flat, layout):
        values, scale = layout.element.decode(flat[m, rows]), factors[m, tiles]
        for (block, factor), (dest, _) in zip(
            _blocks(values, scale, layout), _blocks(out[m, rows], scale, layout), strict=True
        ):
            torch.mul(block, factor, out=dest)
    return out.view(shape)


def check_pair(codes: Tensor, scales: Tensor, layout: Layout) -> tuple[int, ...]:
    """Shape of the values of a pair; meta tensors will do.

    Raises:
        ValueError: codes of another dtype or dialect, or scales of another shape or dtype than the layout's.
    """
    layout.element.check_codes(codes)
    shape = (*codes.shape[:-1], codes.shape[-1] * layout.element.packed)
    expected = layout.scale_shape(shape)
    if tuple(scales.shape) != expected:
        raise ValueError(f"{layout} of {shape} needs scales {expected}, found {tuple(scales.shape)}")
    check_scales(scales)
    if (scales.dtype == torch.float8_e8m0fnu) != (layout.scale == "e8m0"):
        raise ValueError(f"{layout} has {layout.scale} scales, found {str(scales.dtype).removeprefix('torch.')}")
    return shape


def spread(scale: Tensor, layout: Layout, rows: int, columns: int) -> Tensor:
    """Each block's scale in the place of its elements: [..., rows, columns], or broadcastable to it."""
    if layout.columns:
        scale = scale.repeat_interleave(layout.columns, -1)[..., :columns]
    return scale if layout.rows == 1 else scale.repeat_interleave(layout.rows, -2)[..., :rows, :]


# -- bands and blocks --------------------------------------------------------------------------------------------------


def matrices(x: Tensor, layout: Layout) -> Tensor:
    """x [..., rows, columns] as [matrices, rows, columns]; with blocks of one row all rows are those of one matrix."""
    if layout.rows > 1 and x.dim() < 2:
        raise ValueError(f"{layout} has blocks of {layout.rows} rows; {tuple(x.shape)} has no rows")
    lead = x.shape[:-2] if layout.rows > 1 else ()
    return x.reshape(math.prod(lead), math.prod(x.shape[len(lead) : -1]), x.shape[-1])


def bands(flat: Tensor, layout: Layout) -> Iterator[tuple[int, slice, slice]]:
    """(matrix, rows, rows of scales) of bands of whole blocks of [matrices, rows, columns]."""
    count, rows, columns = flat.shape
    tiles = max(1, _BAND // max(1, layout.rows * columns))
    for m in range(count):
        for first in range(0, -(-rows // layout.rows), tiles):
            last = min(first + tiles, -(-rows // layout.rows))
            yield m, slice(first * layout.rows, last * layout.rows), slice(first, last)


def _blocks(band: Tensor, scale: Tensor, layout: Layout) -> Iterator[tuple[Tensor, Tensor]]:
    """Views [m, r, n, c] of a band [rows, columns] beside those [m, 1, n, 1] of its scales, m x n blocks of r x c.

    One for the full blocks, and up to three for those that are ragged below, at the right, and in the corner.
    """
    for rows, tile_rows, r in _pieces(band.shape[0], layout.rows):
        for columns, tile_columns, c in _pieces(band.shape[1], layout.columns or band.shape[1]):
            blocks = band[rows, columns].unflatten(0, (-1, r)).unflatten(2, (-1, c))
            yield blocks, scale[tile_rows, tile_columns][:, None, :, None]


def _pieces(size: int, block: int) -> Iterator[tuple[slice, slice, int]]:
    """(elements, blocks, their size) of the full blocks of a dim, then of the ragged last one."""
    full = size // block
    if full:
        yield slice(0, full * block), slice(0, full), block
    if size % block:
        yield slice(full * block, size), slice(full, full + 1), size % block


def block_amax(band: Tensor, layout: Layout) -> Tensor:
    """[ceil(rows / r), ceil(columns / c)] of the magnitudes of a band [rows, columns]."""
    rows, columns = layout.scale_shape(tuple(band.shape))
    amax = band.new_empty((rows, columns))
    for blocks, out in _blocks(band.abs(), amax, layout):
        out[:, 0, :, 0] = blocks.amax((1, 3))
    return amax
