"""Row layouts: their sizes, where every byte of a page lies, and reading back what was written."""

from __future__ import annotations

import math
import struct
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from atomc.formats import FP4_ACTIVATION, FP8_INDEX, FP8_ROW_CHANNELS, RowLayout, dequantize, quantize
from tests.support.minifloats import ceil_log2, encoded
from tests.support.tiny import same_bits

MAIN = RowLayout(448, FP8_ROW_CHANNELS, 64)
INDEX_FP8 = RowLayout(128, FP8_INDEX, 0)
INDEX_FP4 = RowLayout(128, FP4_ACTIVATION, 0)
PLAIN = RowLayout(0, None, 512)
ROWS = {"main": MAIN, "index_fp8": INDEX_FP8, "index_fp4": INDEX_FP4, "plain": PLAIN}
SMALL = RowLayout.parse("6:e4m3:1x4:e8m0+2")  # a ragged block, and padding


def rows_of(layout: RowLayout, *lead: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (*lead, layout.narrow + layout.wide)
    return torch.randn(shape, generator=generator) * torch.exp(2 * torch.randn(shape, generator=generator))


def round_trip(layout: RowLayout, x: Tensor) -> Tensor:
    """What a row is once stored: through its layout, and through bfloat16."""
    wide = x[..., layout.narrow :].bfloat16().float()
    if layout.layout is None:
        return wide
    return torch.cat([dequantize(*quantize(x[..., : layout.narrow], layout.layout), layout.layout), wide], -1)


# -- text and sizes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text", "row", "body"),
    [
        ("main", "448:e4m3:1x64:e8m0:0.0001+64", 584, 576),
        ("index_fp8", "128:e4m3:1x128:pow2:0.0001+0", 132, 128),
        ("index_fp4", f"128:e2m1:1x32:e8m0:{6 * 2.0**-126!r}+0", 68, 64),
        ("plain", "0+512", 1024, 1024),
    ],
)
def test_the_rows_of_the_specification(name: str, text: str, row: int, body: int) -> None:
    """Spec 4.2."""
    layout = ROWS[name]
    assert str(layout) == text and RowLayout.parse(text) == layout
    assert (layout.row_bytes, layout.body_bytes, layout.scale_bytes) == (row, body, row - body)
    for rows in (1, 2, 64):
        assert layout.page_bytes(rows) == rows * row
        assert layout.rows_of(layout.page_bytes(rows)) == rows
    body_record, scale_record = layout.pack(rows_of(layout, 3))
    assert (tuple(body_record.shape), tuple(scale_record.shape)) == ((3, body), (3, row - body))
    assert body_record.dtype == scale_record.dtype == torch.uint8


@given(st.integers(1, 600), st.integers(0, 300), st.integers(1, 200), st.sampled_from(["e8m0", "pow2", "float32"]))
def test_a_row_layout_is_read_as_it_is_spelled(narrow: int, wide: int, block: int, scale: str) -> None:
    text = f"{2 * narrow}:e4m3:1x{block}:{scale}:1e+20+{wide}"
    layout = RowLayout.parse(text)
    assert str(layout) == text
    assert (layout.narrow, layout.wide, layout.scales) == (2 * narrow, wide, -(-2 * narrow // block))
    assert layout.row_bytes >= 2 * narrow + 2 * wide + layout.scales
    assert layout.scale_bytes % (8 if wide else 1) == 0


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "CHANNELS:LAYOUT"),
        ("64", "CHANNELS:LAYOUT"),
        ("448:e4m3:1x64:e8m0", "CHANNELS:LAYOUT"),
        ("448+64", "CHANNELS:LAYOUT"),
        ("0:e4m3:1x64:e8m0+64", "CHANNELS:LAYOUT"),
        ("a:e4m3:1x64:e8m0+64", "CHANNELS:LAYOUT"),
        ("64:e4m3:1x64:e8m0+-4", "CHANNELS:LAYOUT"),
        ("64:e4m3:1x64:e8m0+²", "CHANNELS:LAYOUT"),
        ("0+0", "it has no channels"),
        ("33:e2m1:1x32:e8m0+0", "an odd number of packed ones"),
        ("64:e4m3:2x64:e8m0+0", "a row has blocks of one row"),
        ("3:e4m3:1x*:e8m0+1", "would begin at an odd byte, 3"),
        ("064:e4m3:1x64:e8m0+0", "'64:e4m3:1x64:e8m0\\+0' is how it is spelled"),
    ],
)
def test_other_texts_are_refused(text: str, why: str) -> None:
    with pytest.raises(ValueError, match=why) as refused:
        RowLayout.parse(text)
    assert str(refused.value).startswith(f"{text!r} is no row layout")


def test_a_wrong_layout_in_a_row_is_named() -> None:
    with pytest.raises(ValueError, match="'fp8:1x64:e8m0' is no layout"):
        RowLayout.parse("64:fp8:1x64:e8m0+0")


# -- bytes -------------------------------------------------------------------------------------------------------------


def fp8_bytes(x: Tensor, block: int, floor: float) -> tuple[bytes, list[int]]:
    """e4m3 codes of one row and the exponents of its scales."""
    codes, exponents = b"", []
    for group in x.split(block):
        exponents.append(ceil_log2(Fraction(max(float(group.abs().max()), floor)) / 448))
        codes += bytes(encoded("e4m3", group.double() / 2.0 ** exponents[-1]).tolist())
    return codes, exponents


def bf16_bytes(x: Tensor) -> bytes:
    """Of numbers that are bfloat16: the upper half of each float32, little-endian."""
    return b"".join(struct.pack("<f", value)[2:] for value in x.tolist())


def test_a_page_of_main_rows_byte_by_byte() -> None:
    """Two records of 448 codes and 128 bytes of bf16, then two of 7 scales and a byte of padding."""
    x = rows_of(MAIN, 2)
    x[:, 448:] = x[:, 448:].bfloat16().float()
    x[1, 64:128] = 0
    floor = float(torch.tensor(0.0001))
    page, scales = b"", b""
    for row in x:
        codes, exponents = fp8_bytes(row[:448], 64, floor)
        page += codes + bf16_bytes(row[448:])
        scales += bytes([*(e + 127 for e in exponents), 0])
    pages = torch.zeros(1, 2 * 584, dtype=torch.uint8)
    MAIN.store(pages, torch.tensor([0, 1]), MAIN.pack(x))
    assert bytes(pages[0].tolist()) == page + scales
    assert len(page) == 2 * 576 and len(scales) == 16


def test_a_page_of_fp8_index_rows_byte_by_byte() -> None:
    """Two records of 128 codes, then two float32 scales."""
    x = rows_of(INDEX_FP8, 2)
    (first, low), (second, high) = (fp8_bytes(row, 128, float(torch.tensor(0.0001))) for row in x)
    pages = torch.zeros(1, 2 * 132, dtype=torch.uint8)
    INDEX_FP8.store(pages, torch.tensor([0, 1]), INDEX_FP8.pack(x))
    assert bytes(pages[0].tolist()) == first + second + struct.pack("<ff", 2.0 ** low[0], 2.0 ** high[0])


def test_a_page_of_fp4_index_rows_byte_by_byte() -> None:
    """Two records of 64 bytes, even columns low, then two of four scales."""
    x = rows_of(INDEX_FP4, 2)
    x[0, 32:64] = 0
    page, scales = b"", b""
    for row in x:
        for group in row.split(32):
            amax = float(group.abs().max())
            exponent = ceil_log2(Fraction(amax) / 6) if amax else -126
            codes = encoded("e2m1", group.double() / 2.0**exponent).tolist()
            page += bytes(even | odd << 4 for even, odd in zip(codes[::2], codes[1::2], strict=True))
            scales += bytes([exponent + 127])
    pages = torch.zeros(1, 2 * 68, dtype=torch.uint8)
    INDEX_FP4.store(pages, torch.tensor([0, 1]), INDEX_FP4.pack(x))
    assert bytes(pages[0].tolist()) == page + scales
    assert scales[1] == 1  # zeros have the least scale, 2^-126


def test_a_page_of_plain_rows_byte_by_byte() -> None:
    x = rows_of(PLAIN, 2).bfloat16().float()
    pages = torch.zeros(1, 2048, dtype=torch.uint8)
    PLAIN.store(pages, torch.tensor([1, 0]), PLAIN.pack(x))
    assert bytes(pages[0].tolist()) == bf16_bytes(x[1]) + bf16_bytes(x[0])


@pytest.mark.parametrize("poison", [0, 0xFF, 0x7F])
@pytest.mark.parametrize("name", [*ROWS, "small"])
def test_storing_touches_the_bytes_of_its_rows_alone(name: str, poison: int) -> None:
    layout = {**ROWS, "small": SMALL}[name]
    page, extra = 4, 5  # bytes at the end of a page that belong to no row
    pages = torch.full((3, layout.page_bytes(page) + extra), poison, dtype=torch.uint8)
    x, rows = rows_of(layout, 4), torch.tensor([9, 0, 6, 3])
    packed = layout.pack(x)
    layout.store(pages, rows, packed)
    wanted = torch.full_like(pages, poison)
    for i, row in enumerate(rows.tolist()):
        body, scale = row % page * layout.body_bytes, page * layout.body_bytes + row % page * layout.scale_bytes
        wanted[row // page, body : body + layout.body_bytes] = packed.body[i]
        wanted[row // page, scale : scale + layout.scale_bytes] = packed.scales[i]
    assert torch.equal(pages, wanted)
    if layout.wide and layout.layout is not None:
        assert layout.scale_bytes > layout.scales
        assert not packed.scales[:, layout.scales :].any()


# -- there and back ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*ROWS, "small"])
def test_rows_come_back_as_their_layout_rounds_them(name: str) -> None:
    layout = {**ROWS, "small": SMALL}[name]
    pages = torch.full((5, layout.page_bytes(2)), 0xFF, dtype=torch.uint8)
    rows = torch.tensor([7, 2, 9, 0, 4])
    for x in (rows_of(layout, 5), rows_of(layout, 5).bfloat16(), 1e-6 * rows_of(layout, 5), 0 * rows_of(layout, 5)):
        layout.store(pages, rows, layout.pack(x))
        wanted = round_trip(layout, x.float())
        assert same_bits(layout.load(pages, rows), wanted)
        assert same_bits(layout.load(pages, rows.view(1, 5, 1)), wanted.view(1, 5, 1, -1))
        assert same_bits(layout.load(pages, rows[1:2]), wanted[1:2])
        assert same_bits(layout.unpack(layout.pack(x)), wanted)
        assert same_bits(layout.unpack(layout.pack(x[0])), wanted[0])
        assert same_bits(layout.unpack(layout.pack(x[:1])), wanted[:1])
        again = layout.pack(layout.unpack(layout.pack(x)))
        assert same_bits(layout.unpack(again), wanted)


@pytest.mark.parametrize("name", ROWS)
def test_no_rows_at_all(name: str) -> None:
    layout, none = ROWS[name], torch.zeros(0, dtype=torch.int64)
    pages = torch.full((2, layout.page_bytes(2)), 0xFF, dtype=torch.uint8)
    layout.store(pages, none, layout.pack(rows_of(layout, 0)))
    assert (pages == 0xFF).all()
    assert tuple(layout.load(pages, none).shape) == (0, layout.narrow + layout.wide)


@pytest.mark.parametrize("name", ["main", "index_fp8", "index_fp4"])
@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_what_is_no_number_is_read_as_none(name: str, bad: float) -> None:
    layout = ROWS[name]
    x = rows_of(layout, 2)
    x[0, 3] = bad
    found = layout.unpack(layout.pack(x))
    assert found[0, 3].isnan()
    assert same_bits(found[1], round_trip(layout, x)[1])
    assert found[1].isfinite().all()
