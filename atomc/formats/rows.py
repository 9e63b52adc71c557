"""Row layouts: how a cache row is stored, bf16 or quantised, as one value with one spelling (spec 4.2).

    448:e4m3:1x64:e8m0:0.0001+64    584 bytes: 448 channels in e4m3 with 7 scales, then 64 RoPE channels in bf16
    128:e4m3:1x128:pow2:0.0001+0    132 bytes: an index row in FP8 with one float32 scale
    128:e2m1:1x32:e8m0:…+0          68 bytes: an index row in MXFP4 (with the floor of `FP4_ACTIVATION`)
    0+512                           1,024 bytes: bf16

A page of n rows is a row of bytes: n records of codes and bf16 channels, then n records of scales, each padded to 8
bytes where there are RoPE channels (FlashMLA's order; its padding of the whole page is left out: pages hold 2 rows here
too).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from atomc.formats.layout import Layout, dequantize, quantize

WIDE = torch.bfloat16  # of the channels that are not quantised


class Records(NamedTuple):
    """Packed rows: uint8 [..., body bytes] and uint8 [..., scale bytes]."""

    body: Tensor
    scales: Tensor


@dataclass(frozen=True)
class RowLayout:
    """The storage of a row of `narrow + wide` channels.

    Attributes:
        narrow: leading channels in `layout`. wide: trailing channels in bfloat16.
    """

    narrow: int
    layout: Layout | None
    wide: int

    def __str__(self) -> str:
        return f"{self.narrow}:{self.layout}+{self.wide}" if self.layout else f"0+{self.wide}"

    @staticmethod
    def parse(text: str) -> RowLayout:
        """The row layout that `str` spells so. Raises `ValueError`."""
        return _parse(text)

    @cached_property
    def code_bytes(self) -> int:
        """Of the narrow channels of a row."""
        return self.narrow // self.layout.element.packed if self.layout else 0

    @cached_property
    def body_bytes(self) -> int:
        """Of a row's record, scales not included."""
        return self.code_bytes + self.wide * WIDE.itemsize

    @cached_property
    def scales(self) -> int:
        """Scales of a row."""
        return self.layout.scale_shape((self.narrow,))[0] if self.layout else 0

    @cached_property
    def scale_bytes(self) -> int:
        """Of a row's scale record."""
        size = self.scales * self.layout.scale_dtype.itemsize if self.layout else 0
        return -(-size // 8) * 8 if self.wide else size

    @property
    def row_bytes(self) -> int:
        """Bytes of a row, its scales included."""
        return self.body_bytes + self.scale_bytes

    def page_bytes(self, rows: int) -> int:
        """Bytes of a page of that many rows."""
        return rows * self.row_bytes

    def rows_of(self, page_bytes: int) -> int:
        """Rows of a page of that many bytes."""
        return page_bytes // self.row_bytes

    def pack(self, x: Tensor) -> Records:
        """Rows x [..., narrow + wide] (float) as records."""
        body = x.new_empty((*x.shape[:-1], self.body_bytes), dtype=torch.uint8)
        scales = x.new_zeros((*x.shape[:-1], self.scale_bytes), dtype=torch.uint8)
        if self.layout is not None:
            codes, scale = quantize(x[..., : self.narrow], self.layout)
            body[..., : self.code_bytes].view(codes.dtype).copy_(codes)
            scales.view(scale.dtype)[..., : self.scales] = scale
        if self.wide:
            body[..., self.code_bytes :].view(WIDE).copy_(x[..., self.narrow :])
        return Records(body, scales)

    def unpack(self, records: Records) -> Tensor:
        """float32 rows [..., narrow + wide] of records."""
        parts: list[Tensor] = []
        if self.layout is not None:
            codes = records.body[..., : self.code_bytes].contiguous().view(self.layout.element.storage)
            size = self.scales * self.layout.scale_dtype.itemsize
            scale = records.scales[..., :size].contiguous().view(self.layout.scale_dtype)
            parts.append(dequantize(codes, scale, self.layout))
        if self.wide:
            parts.append(records.body[..., self.code_bytes :].contiguous().view(WIDE).float())
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def store(self, pages: Tensor, rows: Tensor, records: Records) -> None:
        """Write records [N, ...] into uint8 pages [P, page bytes] at flat row numbers `rows` [N]: page x rows + row."""
        body, scales = self._views(pages)
        page, row = rows // body.shape[1], rows % body.shape[1]
        body[page, row] = records.body
        scales[page, row] = records.scales

    def load(self, pages: Tensor, rows: Tensor) -> Tensor:
        """float32 rows [..., narrow + wide] at flat row numbers `rows` [...]."""
        body, scales = self._views(pages)
        page, row = rows // body.shape[1], rows % body.shape[1]
        return self.unpack(Records(body[page, row], scales[page, row]))

    def _views(self, pages: Tensor) -> tuple[Tensor, Tensor]:
        """The records in pages: uint8 [P, rows, body bytes], [P, rows, scale bytes]."""
        count = self.rows_of(pages.shape[1])
        split = count * self.body_bytes
        return (
            pages[:, :split].unflatten(1, (count, self.body_bytes)),
            pages[:, split : count * self.row_bytes].unflatten(1, (count, self.scale_bytes)),
        )


@lru_cache(maxsize=256)
def _parse(text: str) -> RowLayout:
    narrow, _, wide = text.rpartition("+")
    count, _, layout = narrow.partition(":")
    if not (count.isdecimal() and wide.isdecimal()) or (int(count) > 0) != bool(layout):
        raise ValueError(f"{text!r} is no row layout: CHANNELS:LAYOUT+BF16_CHANNELS, such as 448:e4m3:1x64:e8m0+64")
    parsed = Layout.parse(layout) if layout else None
    if parsed is not None and parsed.rows != 1:
        raise ValueError(f"{text!r} is no row layout: a row has blocks of one row")
    if int(count) + int(wide) == 0 or (parsed is not None and int(count) % parsed.element.packed):
        raise ValueError(f"{text!r} is no row layout: it has no channels, or an odd number of packed ones")
    rows = RowLayout(int(count), parsed, int(wide))
    if rows.wide and rows.code_bytes % WIDE.itemsize:
        raise ValueError(f"{text!r} is no row layout: its bf16 channels would begin at an odd byte, {rows.code_bytes}")
    if str(rows) != text:
        raise ValueError(f"{text!r} is no row layout: {str(rows)!r} is how it is spelled")
    return rows
