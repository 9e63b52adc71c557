"""The formats as `atomc verify` has them, against torch's own dtypes and against `atomc.formats`."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from atomc.formats import NAMES, Layout, RowLayout, quantize
from atomc.verify import grid
from atomc.verify.errors import VerifyError

FLOATS = {
    "e4m3": torch.float8_e4m3fn, "e4m3fnuz": torch.float8_e4m3fnuz, "e5m2": torch.float8_e5m2,
    "e5m2fnuz": torch.float8_e5m2fnuz,
}  # fmt: skip
TEXTS = [*map(str, NAMES.values()), "e4m3fnuz:1x128:e8m0:0.0001:max224", "e5m2:1x64:e8m0", "int8:1x*:float32"]


@pytest.mark.parametrize("name", FLOATS)
def test_every_byte_is_what_torch_says(name: str) -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(FLOATS[name])
    found, expected = grid.decoded(codes, grid.grid_of(f"{name}:1x*:float32")), codes.double()
    expected = torch.where(expected.isinf(), torch.nan, expected)  # no number to a verifier
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def test_the_low_nibble_is_the_even_column() -> None:
    codes = torch.tensor([[0x72, 0x9F]], dtype=torch.uint8).view(torch.int8)
    assert grid.decoded(codes, grid.grid_of("e2m1:1x32:e8m0")).tolist() == [[1.0, 6.0, -6.0, -0.5]]


def test_a_scale_byte_is_a_power_of_two() -> None:
    scales = torch.tensor([0, 126, 127, 254, 255], dtype=torch.uint8).view(torch.float8_e8m0fnu)
    found = grid.factors(scales, grid.grid_of("e4m3:1x128:e8m0"))
    assert found[:4].tolist() == [2.0**-127, 0.5, 1.0, 2.0**127]
    assert found[4].isnan()


def hostile(rows: int, columns: int) -> Tensor:
    """Values of many magnitudes, ties, zeros and a block of zeros."""
    x = torch.randn(rows, columns) * torch.exp2(torch.randint(-30, 30, (rows, 1)).float())
    x[0] = torch.arange(columns) / 8
    x[1], x[2, ::2], x[3] = 0, 0, torch.randint(-500, 500, (columns,)) / 2
    return x


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("columns", [128, 256, 160])
def test_both_round_to_the_same_numbers(text: str, columns: int) -> None:
    x = hostile(200, columns)
    codes, scales = quantize(x, Layout.parse(text))
    found, _ = grid.unpacked(codes, scales, text)
    expected, blocks = grid.rounded(x.double(), text)
    assert torch.equal(found, expected)
    assert torch.equal(grid.factors(scales, grid.grid_of(text)), blocks)


@pytest.mark.parametrize(
    "text", ["64:e4m3:1x64:e8m0:0.0001+64", "128:e4m3:1x128:pow2:0.0001+0", "128:e2m1:1x32:e8m0+0", "0+48"]
)
def test_rows_are_unpacked_as_they_were_packed(text: str) -> None:
    layout = RowLayout.parse(text)
    x = torch.randn(12, layout.narrow + layout.wide)
    pages = torch.zeros((5, layout.page_bytes(4)), dtype=torch.uint8)
    places = torch.randperm(20)[:12]
    layout.store(pages, places, layout.pack(x))
    body, scales = grid.records_of(pages, text)
    found = grid.unpacked_records(body, scales, text).flatten(0, 1)[places]
    assert torch.equal(found, layout.load(pages, places).double())
    assert float((found - x).abs().max()) < 0.5


@pytest.mark.parametrize(
    ("codes", "scales", "said"),
    [
        (torch.zeros(4, 128).to(torch.float8_e4m3fnuz), torch.ones(4, 1).to(torch.float8_e8m0fnu), "float8_e4m3fnuz"),
        (torch.zeros(4, 128).to(torch.float8_e4m3fn), torch.ones(4, 1), "scales are float32"),
        (torch.zeros(4, 128).to(torch.float8_e4m3fn), torch.ones(4, 4).to(torch.float8_e8m0fnu), "[4, 4]"),
    ],
    ids=["dialect", "scale dtype", "group 32 read as 128"],
)
def test_what_a_layout_does_not_name_is_refused(codes: Tensor, scales: Tensor, said: str) -> None:
    with pytest.raises(VerifyError) as raised:
        grid.unpacked(codes, scales, "e4m3:1x128:e8m0")
    assert said in raised.value.message


@pytest.mark.parametrize("text", ["e9m9:1x32:e8m0", "e4m3:32:e8m0", "e4m3", "e4m3:1x1:e8m0:x"])
def test_what_is_no_layout_is_refused(text: str) -> None:
    with pytest.raises(VerifyError, match="no layout"):
        grid.grid_of(text)
