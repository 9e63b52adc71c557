"""Conversions that claim to be exact: FP4 into FP8 and OCP into FNUZ, number by number in rational arithmetic."""

from __future__ import annotations

import itertools
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from atomc.formats import (
    E4M3,
    E4M3_FNUZ,
    FP8_TILE,
    MXFP4,
    convert,
    dequantize,
    expand_mxfp4,
    hadamard_matrix,
    quantize,
    to_fnuz,
)
from atomc.formats.element import pack_e2m1
from atomc.formats.scale import load_scale
from tests.support.minifloats import DEFINITIONS, decoded
from tests.support.tiny import same_bits

E8M0 = torch.float8_e8m0fnu
BYTES = torch.arange(256, dtype=torch.uint8)


def e8m0(exponents: Tensor | list[list[int]]) -> Tensor:
    """Scales 2^exponent."""
    return (torch.as_tensor(exponents) + 127).to(torch.uint8).view(E8M0)


def random_codes(rows: int, columns: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 16, (rows, columns), dtype=torch.uint8, generator=generator)


def exactly_same(packed: Tensor, groups: Tensor, fp8: Tensor, tiles: Tensor) -> bool:
    """Whether both pairs stand for the same numbers, as float64, which holds all of them: the sign of zero counts."""
    codes = torch.stack([packed.view(torch.uint8) & 15, packed.view(torch.uint8) >> 4], -1).flatten(-2)
    rows, columns = codes.shape
    fine = 2.0 ** (groups.view(torch.uint8).double() - 127)
    coarse = 2.0 ** (tiles.view(torch.uint8).double() - 127)
    wanted = decoded("e2m1", codes) * fine.repeat_interleave(32, 1)
    wide = coarse.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :columns]
    return same_bits(wanted, decoded("e4m3", fp8.view(torch.uint8)) * wide)


# -- FP4 into FP8 ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(128, 128), (1, 32), (130, 160), (256, 96), (300, 416), (127, 128)], ids=str)
def test_expansion_is_exact_where_groups_are_near(shape: tuple[int, int]) -> None:
    rows, columns = shape
    generator = torch.Generator().manual_seed(rows)
    for seed, base in enumerate((-127, -120, -20, 0, 60, 113)):
        packed = pack_e2m1(random_codes(rows, columns, seed))
        groups = e8m0(torch.randint(base, base + 15, (rows, columns // 32), generator=generator))
        fp8, tiles = expand_mxfp4(packed, groups)
        assert (fp8.dtype, tiles.dtype) == (E4M3.storage, E8M0)
        assert tuple(fp8.shape) == shape and tuple(tiles.shape) == FP8_TILE.scale_shape(shape)
        assert exactly_same(packed, groups, fp8, tiles)
        if base in (-20, 0):
            assert same_bits(dequantize(fp8, tiles, FP8_TILE), dequantize(packed, groups, MXFP4))


def test_bands_of_the_expansion_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = pack_e2m1(random_codes(300, 160))
    groups = e8m0(torch.randint(-7, 7, (300, 5)))
    whole = expand_mxfp4(packed, groups)
    for band in (1, 1000):
        monkeypatch.setattr(convert, "_BAND", band)
        assert all(same_bits(a, b) for a, b in zip(expand_mxfp4(packed, groups), whole, strict=True))
    assert all(same_bits(a, b) for a, b in zip(expand_mxfp4(packed.view(torch.uint8), groups), whole, strict=True))
    strided = packed.T.contiguous().T
    assert all(same_bits(a, b) for a, b in zip(expand_mxfp4(strided, groups), whole, strict=True))


@pytest.mark.parametrize("top", [-113, -20, 0, 100, 127])
@pytest.mark.parametrize("span", range(20))
def test_groups_may_be_as_far_apart_as_their_numbers_allow(span: int, top: int) -> None:
    """2^14 always; beyond, where the numbers that a group does hold are e4m3 numbers still."""
    e4m3 = set(DEFINITIONS["e4m3"].magnitudes)
    for low in range(8):
        if top - span < -127:
            continue
        codes = torch.zeros(2, 128, dtype=torch.uint8)
        codes[0, :2], codes[1, 100] = torch.tensor([7, 9]), low | 8
        groups = torch.full((2, 4), top)
        groups[1, 3] = top - span
        number = DEFINITIONS["e2m1"].magnitudes[low] * Fraction(2) ** (6 - span)
        if top < -121:  # the tile's scale is 2^-127 at the least
            number = DEFINITIONS["e2m1"].magnitudes[low] * Fraction(2) ** (top - span + 127)
        packed = pack_e2m1(codes)
        if number in e4m3:
            assert exactly_same(packed, e8m0(groups), *expand_mxfp4(packed, e8m0(groups)))
            continue
        assert span > 14
        with pytest.raises(ValueError, match=rf"not exact in FP8: tile \[0, 0\] has groups 2\^{span} apart, at most"):
            expand_mxfp4(packed, e8m0(groups))


def test_14_is_exact_and_15_is_refused_in_the_tile_that_is_named() -> None:
    codes = random_codes(260, 288) | 1  # no zeros, and 0.5 everywhere among them
    codes[:, ::32] = 1
    for row, column, tile in ((0, 0, r"\[0, 0\]"), (140, 5, r"\[1, 1\]"), (259, 8, r"\[2, 2\]")):
        groups = torch.zeros(260, 9)
        groups[row, column] = 14
        packed = pack_e2m1(codes)
        assert exactly_same(packed, e8m0(groups), *expand_mxfp4(packed, e8m0(groups)))
        groups[row, column] = 15
        with pytest.raises(ValueError, match=rf"tile {tile} has groups 2\^15 apart, at most 2\^14 fit"):
            expand_mxfp4(packed, e8m0(groups))


@pytest.mark.parametrize("extreme", [-127, 127])
def test_groups_of_zeros_do_not_count(extreme: int) -> None:
    codes = random_codes(130, 256)
    codes[3, 32:64], codes[129, 96:128] = 0, 8  # 0 and -0
    groups = torch.zeros(130, 8)
    groups[3, 1] = groups[129, 3] = extreme
    packed = pack_e2m1(codes)
    fp8, tiles = expand_mxfp4(packed, e8m0(groups))
    assert (tiles.view(torch.uint8) == 127 - 6).all()
    assert exactly_same(packed, e8m0(groups), fp8, tiles)


def test_tiles_of_zeros_have_scale_one() -> None:
    packed, groups = torch.zeros(129, 64, dtype=torch.int8), e8m0(torch.full((129, 4), 50))
    fp8, tiles = expand_mxfp4(packed, groups)
    assert not fp8.view(torch.uint8).any()
    assert (tiles.view(torch.uint8) == 127).all()


def test_the_largest_and_the_least_scales_expand() -> None:
    """6 x 2^127 is no float32, but it is an e4m3 number times a scale; 0.5 x 2^-127 lies below the normal numbers."""
    codes = torch.arange(16, dtype=torch.uint8).repeat(1, 2)
    for exponent, byte in ((127, 127 + 121), (-127, 0), (-123, 0), (-121, 0), (-120, 1)):
        packed, groups = pack_e2m1(codes), e8m0([[exponent]])
        fp8, tiles = expand_mxfp4(packed, groups)
        assert tiles.view(torch.uint8).tolist() == [[byte]]
        assert exactly_same(packed, groups, fp8, tiles)


@given(st.integers(1, 140), st.integers(1, 9), st.integers(-127, 113), st.integers(0, 10**6))
def test_any_near_groups_expand_exactly(rows: int, groups: int, base: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    packed = pack_e2m1(random_codes(rows, 32 * groups, seed))
    scales = e8m0(torch.randint(base, base + 15, (rows, groups), generator=generator))
    assert exactly_same(packed, scales, *expand_mxfp4(packed, scales))


def test_what_is_no_mxfp4_is_refused() -> None:
    packed, scales = torch.zeros(4, 32, dtype=torch.int8), torch.zeros(4, 2, dtype=torch.uint8).view(E8M0)
    with pytest.raises(ValueError, match=r"has int8 codes and float8_e8m0fnu scales, found torch\.float8_e4m3fn"):
        expand_mxfp4(packed.view(E4M3.storage), scales)
    with pytest.raises(ValueError, match=r"found torch\.int8 and torch\.float32"):
        expand_mxfp4(packed, scales.float())
    with pytest.raises(ValueError, match=r"need whole groups and scales \(4, 2\), found \(4, 1\)"):
        expand_mxfp4(packed, scales[:, :1])
    with pytest.raises(ValueError, match="need whole groups"):
        expand_mxfp4(packed[:, :24], scales)
    nan = torch.tensor([[127, 255]], dtype=torch.uint8).view(E8M0)
    for codes in (packed[:1], packed[:1] + 17):
        with pytest.raises(ValueError, match="a scale is NaN"):
            expand_mxfp4(codes, nan)


# -- one FP8 dialect into the other ------------------------------------------------------------------------------------


def test_every_byte_at_every_scale_is_the_same_number_in_fnuz() -> None:
    """In float64, which holds every product: 254 scales x 256 bytes."""
    scales = torch.arange(254, dtype=torch.uint8)
    codes = BYTES.repeat(254, 1).view(E4M3.storage)
    moved, doubled = to_fnuz(codes, scales[:, None].view(E8M0))
    assert moved.dtype == E4M3_FNUZ.storage and doubled.dtype == E8M0
    before = decoded("e4m3", BYTES) * 2.0 ** (scales[:, None].double() - 127)
    after = decoded("e4m3fnuz", moved.view(torch.uint8)) * 2.0 ** (doubled.view(torch.uint8).double() - 127)
    assert torch.equal(before.isnan(), after.isnan())
    assert same_bits(before.nan_to_num(7) + 0.0, after.nan_to_num(7))  # -0 becomes 0
    kept = (BYTES & 0x7F != 0x7F) & (BYTES != 0x80)
    assert torch.equal(moved.view(torch.uint8)[:, kept], codes.view(torch.uint8)[:, kept])
    assert moved.view(torch.uint8)[0][[0x80, 0x7F, 0xFF]].tolist() == [0, 0x80, 0x80]


def test_float_scales_double() -> None:
    codes = BYTES.view(E4M3.storage)
    for scale in (torch.tensor([0.3, 2.0**-149, 2.0**-127, 1e38]), torch.tensor([0.25, 3.0], dtype=torch.bfloat16)):
        doubled = to_fnuz(codes, scale)[1]
        assert doubled.dtype == scale.dtype
        assert torch.equal(doubled.double(), 2 * scale.double())
    odd = to_fnuz(codes, torch.tensor([torch.nan, torch.inf]))[1]
    assert odd[0].isnan() and odd[1] == torch.inf
    assert to_fnuz(codes, torch.tensor([255], dtype=torch.uint8).view(E8M0))[1].view(torch.uint8).item() == 255


def test_scales_that_cannot_double_and_other_codes_are_refused() -> None:
    codes = BYTES.view(E4M3.storage)
    with pytest.raises(ValueError, match=r"a scale of 2\^127 cannot double"):
        to_fnuz(codes, torch.tensor([1, 254], dtype=torch.uint8).view(E8M0))
    with pytest.raises(ValueError, match=r"a scale of 3e\+38 cannot double"):
        to_fnuz(codes, torch.tensor([1.0, 3e38]))
    for dtype in (E4M3_FNUZ.storage, torch.float8_e5m2, torch.uint8):
        name = str(dtype).removeprefix("torch.")
        with pytest.raises(ValueError, match=f"^codes of e4m3 are float8_e4m3fn, not {name}$"):
            to_fnuz(BYTES.view(dtype), torch.ones(1))


def test_a_converted_weight_is_read_in_the_fnuz_layout() -> None:
    weight = torch.randn(130, 200, generator=torch.Generator().manual_seed(0))
    codes, scales = quantize(weight, FP8_TILE)
    moved = to_fnuz(codes, scales)
    assert torch.equal(load_scale(moved[1]), 2 * load_scale(scales))
    assert torch.equal(dequantize(*moved, FP8_TILE.fnuz()), dequantize(codes, scales, FP8_TILE))


# -- the rotation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 4, 8, 64, 128, 512])
def test_the_hadamard_matrix(n: int) -> None:
    """Entry (i, j) is (-1)^popcount(i & j) / sqrt(n)."""
    matrix = hadamard_matrix(n)
    signs = [[(-1) ** (i & j).bit_count() for j in range(n)] for i in range(n)]
    assert torch.equal(matrix, torch.tensor(signs) * torch.tensor(n**-0.5))
    assert torch.equal(matrix, matrix.T)
    torch.testing.assert_close((matrix @ matrix).double(), torch.eye(n).double(), atol=1e-6, rtol=0)
    whole = matrix.sign().double()
    assert torch.equal(whole @ whole.T, n * torch.eye(n).double())


@pytest.mark.parametrize("n", [0, -2, 3, 12, 127])
def test_other_sizes_are_refused(n: int) -> None:
    with pytest.raises(ValueError, match=f"a power of two of rows, not {n}$"):
        hadamard_matrix(n)


def test_the_table_of_the_expansion_is_exact_or_nan() -> None:
    """All it is made of: two codes x every shift, against the definitions."""
    table = convert._expansion(torch.device("cpu")).view(torch.uint8).view(len(convert._SHIFTS), 256, 2)
    magnitudes = DEFINITIONS["e4m3"].magnitudes
    for (i, shift), byte in itertools.product(enumerate(convert._SHIFTS), range(256)):
        for code, found in zip((byte & 15, byte >> 4), table[i, byte].tolist(), strict=True):
            number = DEFINITIONS["e2m1"].magnitudes[code & 7] * Fraction(2) ** shift
            if number in magnitudes:
                assert found == magnitudes.index(number) | (code & 8) << 4
            else:
                assert found & 0x7F == 0x7F
                assert shift < 6 - convert.EXPANSION_SPAN
