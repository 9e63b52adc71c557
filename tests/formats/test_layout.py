"""Layouts: their text, their sizes, and conversion against a plain loop over blocks in exact arithmetic."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from atomc.formats import (
    E2M1,
    E4M3,
    ELEMENTS,
    FP8_ACTIVATION,
    FP8_CHANNEL,
    FP8_TILE,
    FP8_TILE_F32,
    MXFP4,
    NAMES,
    Layout,
    dequantize,
    layout,
    quantize,
    to_fnuz,
)
from atomc.formats.element import unpack_e2m1
from atomc.formats.scale import Scale, load_scale
from tests.support.minifloats import ceil_log2, encoded
from tests.support.tiny import same_bits

OTHERS = [
    "int8:1x*:float32", "int8:1x32:pow2", "e5m2:1x32:e8m0", "e4m3fnuz:1x128:e8m0:0.0001:max224",
    "e5m2fnuz:16x48:float32", "e2m1:1x16:float32:max4", "e4m3:3x10:e8m0", "e2m1:32x64:e8m0",
]  # fmt: skip
ALL = {**NAMES, **{text: Layout.parse(text) for text in OTHERS}}
POWERS = {name: known for name, known in ALL.items() if known.scale != "float32"}
SHAPES = [(1, 2), (130, 258), (256, 128), (3, 130, 34), (2, 1, 5, 64), (64,)]


def spread_out(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Random float32 over many binades, with zeros and a run of them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) * torch.exp(4 * torch.randn(shape, generator=generator))
    x[torch.rand(shape, generator=generator) < 0.05] = 0
    x.view(-1, shape[-1])[0, : shape[-1] // 2] = 0
    return x


def any_bits(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Finite float32 of any bits up to 2^127 (beyond, the nearest number of a grid may be no float32)."""
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(-(1 << 31), 1 << 31, shape, generator=generator).to(torch.int32)
    x = bits.view(torch.float32)
    return torch.where(x.abs() <= 2.0**127, x, 0.0)


def blocks_of(shape: tuple[int, ...], known: Layout) -> Iterator[tuple[tuple[int, ...], tuple[slice, ...]]]:
    """(index of its scale, place of its elements) of every block."""
    steps = [*[1] * len(shape), known.rows, known.columns or shape[-1]][-len(shape) :]
    cuts = [[slice(i, i + step) for i in range(0, size, step)] for size, step in zip(shape, steps, strict=True)]
    for index in itertools.product(*(range(len(cut)) for cut in cuts)):
        yield index, tuple(cut[i] for cut, i in zip(cuts, index, strict=True))


def slowly(x: Tensor, known: Layout) -> tuple[Tensor, Tensor]:
    """Codes (uint8, one each) and float32 scales, block by block."""
    codes = torch.zeros(x.shape, dtype=torch.uint8)
    scales = torch.zeros(known.scale_shape(tuple(x.shape)))
    largest = known.largest or known.element.largest
    for index, place in blocks_of(tuple(x.shape), known):
        block = x[place]
        amax = max(float(block.abs().max()), float(np.float32(known.floor)))
        if amax == 0:
            scale = 1.0
        elif known.scale == "float32":
            scale = max(float(np.float32(amax) / np.float32(largest)), 2.0**-126)
        else:
            scale = max(2.0 ** ceil_log2(Fraction(amax) / Fraction(largest)), 2.0**-126)
        scales[index] = scale
        codes[place] = encoded(known.element.name, torch.from_numpy(block.numpy() / np.float32(scale)))
    return codes, scales


def codes_of(stored: Tensor, known: Layout) -> Tensor:
    return unpack_e2m1(stored) if known.element.packed == 2 else stored.view(torch.uint8)


def spread(scales: Tensor, shape: tuple[int, ...], known: Layout) -> Tensor:
    """Each block's scale (float64) in the place of its elements."""
    wide = torch.zeros(shape, dtype=torch.float64)
    for index, place in blocks_of(shape, known):
        wide[place] = load_scale(scales)[index].double()
    return wide


def same_pair(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> bool:
    return same_bits(a[0], b[0]) and same_bits(a[1], b[1])


# -- text --------------------------------------------------------------------------------------------------------------

layouts = st.builds(
    Layout,
    element=st.sampled_from([e for e in ELEMENTS.values() if e.packed == 1]),
    rows=st.integers(1, 10**6),
    columns=st.integers(0, 10**6),
    scale=st.sampled_from(get_args(Scale)),
    floor=st.floats(0, 1e300),
    largest=st.one_of(st.just(0.0), st.floats(2, 126.9)),
)


@given(st.one_of(layouts, st.builds(Layout, st.just(E2M1), st.integers(1, 99), st.just(32), st.just("e8m0"))))
def test_a_layout_is_read_as_it_is_spelled(known: Layout) -> None:
    assert Layout.parse(str(known)) == known
    assert hash(Layout.parse(str(known))) == hash(known)


def test_the_spellings() -> None:
    assert {name: str(known) for name, known in NAMES.items()} == {
        "fp8_tile": "e4m3:128x128:e8m0",
        "fp8_tile_f32": "e4m3:128x128:pow2",
        "mxfp4": "e2m1:1x32:e8m0",
        "fp8_activation": "e4m3:1x128:e8m0:0.0001",
        "fp8_row": "e4m3:1x64:e8m0:0.0001",
        "fp4_activation": f"e2m1:1x32:e8m0:{6 * 2.0**-126!r}",
        "fp8_index": "e4m3:1x128:pow2:0.0001",
        "fp8_channel": "e4m3:1x*:float32",
    }
    assert str(FP8_TILE.fnuz()) == "e4m3fnuz:128x128:e8m0:max224"
    assert str(FP8_ACTIVATION.fnuz()) == "e4m3fnuz:1x128:e8m0:0.0001:max224"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "ELEMENT:ROWSxCOLUMNS:SCALE"),
        ("e4m3", "ELEMENT:ROWSxCOLUMNS:SCALE"),
        ("e4m3:1x32", "ELEMENT:ROWSxCOLUMNS:SCALE"),
        ("fp8:1x32:e8m0", "elements e4m3, e4m3fnuz, e5m2, e5m2fnuz, e2m1, int8"),
        ("e4m3:1x32:ue8m0", "scales e8m0, float32, pow2"),
        ("e4m3:1:e8m0", "'1' is not ROWSxCOLUMNS"),
        ("e4m3:x32:e8m0", "'x32' is not ROWSxCOLUMNS"),
        ("e4m3:0x32:e8m0", "'0x32' is not ROWSxCOLUMNS"),
        ("e4m3:1x0:e8m0", "'1x0' is not ROWSxCOLUMNS"),
        ("e4m3:1x:e8m0", "'1x' is not ROWSxCOLUMNS"),
        ("e4m3:*x32:e8m0", r"'\*x32' is not ROWSxCOLUMNS"),
        ("e4m3:1x32x2:e8m0", "'1x32x2' is not ROWSxCOLUMNS"),
        ("e4m3:-1x32:e8m0", "'-1x32' is not ROWSxCOLUMNS"),
        ("e4m3:01x32:e8m0", "'01x32' is not ROWSxCOLUMNS"),
        ("e4m3:1x²:e8m0", "'1x²' is not ROWSxCOLUMNS"),
        ("e4m3:1x32:e8m0:low", "'low' is neither a floor nor maxVALUE"),
        ("e4m3:1x32:e8m0:", "'' is neither a floor nor maxVALUE"),
        ("e4m3:1x32:e8m0:maxi", "'maxi' is neither a floor nor maxVALUE"),
        ("e4m3:1x32:e8m0:-1.0", "the floor is not negative"),
        ("e4m3:1x32:e8m0:inf", "the floor is not negative"),
        ("e4m3:1x32:e8m0:nan", "the floor is not negative"),
        ("e4m3:1x32:e8m0:max448", "max is 2 or more, below 448"),
        ("e4m3:1x32:e8m0:max1.5", "max is 2 or more, below 448"),
        ("e2m1:1x32:e8m0:max6.5", "max is 2 or more, below 6"),
        ("e4m3:1x32:e8m0:maxnan", "max is 2 or more"),
        ("e4m3:1x32:e8m0:max-2", "max is 2 or more"),
        ("e2m1:1x33:e8m0", "a block of e2m1 has an even number of columns"),
        ("e4m3:1x32:e8m0:1e-4", "'e4m3:1x32:e8m0:0.0001' is how it is spelled"),
        ("e4m3:1x32:e8m0:0.0", "'e4m3:1x32:e8m0' is how it is spelled"),
        ("e4m3:1x32:e8m0:max224.0", "'e4m3:1x32:e8m0:max224' is how it is spelled"),
        ("e4m3:1x32:e8m0:max224:0.5", "'e4m3:1x32:e8m0:0.5:max224' is how it is spelled"),
        ("e4m3:1x32:e8m0:0.5:0.25", "'e4m3:1x32:e8m0:0.25' is how it is spelled"),
        (" e4m3:1x32:e8m0", "ELEMENT:ROWSxCOLUMNS:SCALE"),
    ],
)
def test_other_texts_are_refused(text: str, why: str) -> None:
    with pytest.raises(ValueError, match=why) as refused:
        Layout.parse(text)
    assert str(refused.value).startswith(f"{text!r} is no layout")


# -- sizes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "shape", "codes", "scales", "size", "bits"),
    [
        ("e4m3:128x128:e8m0", (130, 300), (130, 300), (2, 3), 39_006, 8 + 8 / 128**2),
        ("e4m3:128x128:pow2", (7, 128, 128), (7, 128, 128), (7, 1, 1), 7 * (16_384 + 4), 8 + 32 / 128**2),
        ("e2m1:1x32:e8m0", (4, 64), (4, 32), (4, 2), 136, 4.25),
        ("e2m1:1x32:e8m0", (34,), (17,), (2,), 19, 4.25),
        ("e4m3:1x*:float32", (2, 3, 50), (2, 3, 50), (2, 3, 1), 324, 8.0),
        ("int8:1x64:float32", (3, 65), (3, 65), (3, 2), 219, 8.5),
    ],
)
def test_shapes_and_bytes(
    text: str, shape: tuple[int, ...], codes: tuple[int, ...], scales: tuple[int, ...], size: int, bits: float
) -> None:
    known = Layout.parse(text)
    assert (known.code_shape(shape), known.scale_shape(shape)) == (codes, scales)
    assert (known.bytes(shape), known.bits_per_value) == (size, bits)
    pair = quantize(torch.ones(shape), known)
    assert (tuple(pair[0].shape), tuple(pair[1].shape)) == (codes, scales)
    assert (pair[0].dtype, pair[1].dtype) == (known.element.storage, known.scale_dtype)
    assert pair[0].nbytes + pair[1].nbytes == size


# -- conversion --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_conversion_is_that_of_a_loop_over_blocks(name: str, shape: tuple[int, ...]) -> None:
    known = ALL[name]
    if known.rows > 1 and len(shape) < 2:
        with pytest.raises(ValueError, match=rf"blocks of {known.rows} rows; \(64,\) has no rows"):
            quantize(torch.ones(shape), known)
        return
    x = spread_out(shape)
    codes, scales = quantize(x, known)
    wanted_codes, wanted_scales = slowly(x, known)
    assert torch.equal(codes_of(codes, known), wanted_codes)
    assert torch.equal(load_scale(scales), wanted_scales)
    wide = spread(scales, shape, known)
    values = known.element.decode(codes)
    for dtype in (torch.float32, torch.bfloat16):
        found = dequantize(codes, scales, known, dtype)
        assert same_bits(found, (values * wide.float()).to(dtype))


@pytest.mark.parametrize("name", ALL)
def test_bands_change_no_bit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    known = ALL[name]
    for shape in ((2, 290, 130), (3, 1, 64)):
        x = any_bits(shape)
        x[0, 0, 1], x[-1, -1, 2] = math.inf, math.nan
        found = []
        for band in (1, 1000, 70_000, 1 << 30):
            monkeypatch.setattr(layout, "_BAND", band)
            pair = quantize(x, known)
            found.append((*pair, dequantize(*pair, known), dequantize(*pair, known, torch.bfloat16)))
        for other in found[1:]:
            assert all(same_bits(a, b) for a, b in zip(found[0], other, strict=True))


def test_a_matrix_of_more_than_one_band() -> None:
    x = torch.randn(700, 3000, generator=torch.Generator().manual_seed(0))
    for known in (FP8_TILE, MXFP4, FP8_CHANNEL):
        if known is MXFP4:
            x = x[:, :2976]
        codes, scales = quantize(x, known)
        whole = dequantize(codes, scales, known)
        for rows in (slice(0, 128), slice(256, 384), slice(640, 700)):
            tiles = slice(rows.start // known.rows, -(-rows.stop // known.rows))
            assert same_pair(quantize(x[rows], known), (codes[rows], scales[tiles]))
            assert same_bits(dequantize(codes[rows], scales[tiles], known), whole[rows])


@pytest.mark.parametrize("name", ALL)
def test_the_input_may_have_any_strides_float_dtype_and_gradient(name: str) -> None:
    known, x = ALL[name], spread_out((96, 130)).bfloat16()
    pair = quantize(x.float(), known)
    kept = x.clone()
    assert same_pair(quantize(x, known), pair)
    assert same_pair(quantize(x.T.contiguous().T, known), pair)
    tracked = x.float().requires_grad_()
    found = quantize(tracked, known)
    assert same_pair(found, pair) and not found[0].requires_grad and not found[1].requires_grad
    assert torch.equal(x, kept) and torch.equal(tracked.detach(), kept.float())


@pytest.mark.parametrize("name", ALL)
def test_no_rows_are_a_pair_without_rows(name: str) -> None:
    known = ALL[name]
    for shape in ((0, 128), (2, 0, 128), (0, 5, 128)):
        codes, scales = quantize(torch.zeros(shape), known)
        assert tuple(codes.shape) == known.code_shape(shape)
        assert tuple(scales.shape) == known.scale_shape(shape)
        assert tuple(dequantize(codes, scales, known).shape) == shape


def error_bound(x: Tensor, scales: Tensor, known: Layout) -> Tensor:
    """Half a step of the grid: 2^-precision of a number, half the smallest number of those below the normal ones."""
    least = known.element.smallest / 2 * spread(scales, tuple(x.shape), known)
    # A float32 scale is no power of two: the quotient and the product are rounded too.
    slack = 1 + 2.0**-20 if known.scale == "float32" else 1.0
    if known.element.name == "int8":
        return least * slack
    return torch.maximum(x.double().abs() * 2.0**-known.element.precision, least) * slack


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("data", [spread_out, any_bits])
def test_no_element_is_off_by_more_than_half_a_step(name: str, data: Callable[..., Tensor]) -> None:
    known = ALL[name]
    for shape in ((130, 290), (64, 32)):
        for narrow in (False, True):
            x = data(shape, seed=7)
            x = torch.where(x.abs() > x.abs().median(), x, 0) if narrow else x
            codes, scales = quantize(x, known)
            found = dequantize(codes, scales, known).double()
            off = (found - x.double()).abs()
            assert (off <= error_bound(x, scales, known)).all()


@given(st.sampled_from(list(ALL)), st.lists(st.floats(-(2.0**127), 2.0**127, width=32), min_size=2, max_size=66))
def test_any_row_is_within_half_a_step(name: str, row: list[float]) -> None:
    known, x = ALL[name], torch.tensor([row[: len(row) // 2 * 2]])
    codes, scales = quantize(x, known)
    off = (dequantize(codes, scales, known).double() - x.double()).abs()
    assert (off <= error_bound(x, scales, known)).all()


# -- what a pass that cancels pairs needs ------------------------------------------------------------------------------


def is_fixed(codes: Tensor, scales: Tensor, known: Layout) -> bool:
    once = dequantize(codes, scales, known)
    return same_bits(dequantize(*quantize(once, known), known), once)


@pytest.mark.parametrize("name", POWERS)
def test_quantising_again_changes_no_bit(name: str) -> None:
    known = POWERS[name]
    for seed, data in enumerate((spread_out, any_bits, spread_out, any_bits)):
        for shape in ((130, 290), (2, 64, 96)):
            assert is_fixed(*quantize(data(shape, seed), known), known)


@given(st.sampled_from(list(POWERS)), st.lists(st.floats(-(2.0**127), 2.0**127, width=32), min_size=2, max_size=66))
def test_quantising_any_row_again_changes_no_bit(name: str, row: list[float]) -> None:
    known = POWERS[name]
    assert is_fixed(*quantize(torch.tensor([row[: len(row) // 2 * 2]]), known), known)


@pytest.mark.parametrize("exponent", [-126, -125, -120, -20, 0, 5, 118])
def test_every_code_of_e4m3_may_be_the_largest_of_its_block(exponent: int) -> None:
    """The lemma, code by code: with any code as the largest of a block, all lower ones beside it and any scale, values
    that came out of a layout go back into it and out again unchanged, to the sign of zero."""
    largest = torch.arange(127, dtype=torch.uint8)
    lower = torch.minimum(torch.arange(128, dtype=torch.uint8), largest[:, None])
    block = torch.cat([lower, lower | 0x80], 1).view(E4M3.storage)  # [127, 256]: rows of two blocks of 128
    scale = torch.full((127, 2), exponent + 127, dtype=torch.uint8).view(torch.float8_e8m0fnu)
    for text in ("e4m3:1x128:e8m0", "e4m3:1x128:e8m0:0.0001"):
        if "0.0001" in text and exponent < -22:  # no scale of that layout
            continue
        assert is_fixed(block, scale, Layout.parse(text))
    tiles = block.view(127, 1, 256).expand(127, 128, 256)[::9].contiguous()
    assert is_fixed(tiles, scale[::9, None].contiguous(), FP8_TILE)


@pytest.mark.parametrize("exponent", [-126, -125, -120, -20, 0, 5, 124])
def test_every_code_of_e2m1_may_be_the_largest_of_its_block(exponent: int) -> None:
    largest = torch.arange(8, dtype=torch.uint8)
    lower = torch.minimum(torch.arange(16, dtype=torch.uint8) % 8, largest[:, None])
    block = torch.cat([lower, lower | 8], 1)
    codes = (block[:, ::2] | (block[:, 1::2] << 4)).view(torch.int8)
    scale = torch.full((8, 1), exponent + 127, dtype=torch.uint8).view(torch.float8_e8m0fnu)
    assert is_fixed(codes, scale, MXFP4)
    assert is_fixed(codes, scale, NAMES["fp4_activation"])


# -- no numbers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_a_block_with_inf_or_nan_is_nan_and_the_others_are_untouched(name: str, bad: float) -> None:
    known, shape = ALL[name], (130, 290)
    x = spread_out(shape)
    x[0, 0] = 1.0
    sound, spoilt = dequantize(*quantize(x, known), known), x.clone()
    for at in ((0, 0), (129, 289), (70, 150)):
        spoilt[at] = bad
    found = dequantize(*quantize(spoilt, known), known)
    touched = torch.zeros(shape, dtype=torch.bool)
    for _, place in blocks_of(shape, known):
        touched[place] = not bool(spoilt[place].isfinite().all())
    assert found[touched].isnan().all()
    assert same_bits(found[~touched], sound[~touched])
    assert found.isnan().sum() == touched.sum()


# -- FNUZ --------------------------------------------------------------------------------------------------------------

DIALECTS = [
    FP8_TILE, FP8_TILE_F32, FP8_ACTIVATION, FP8_CHANNEL, NAMES["fp8_row"], NAMES["fp8_index"],
    Layout.parse("e5m2:1x32:e8m0"), Layout.parse("e4m3:1x32:e8m0:max128"),
]  # fmt: skip


@pytest.mark.parametrize("known", DIALECTS, ids=str)
@pytest.mark.parametrize("data", [spread_out, any_bits])
def test_the_fnuz_layout_holds_the_same_numbers(known: Layout, data: Callable[..., Tensor]) -> None:
    fnuz = known.fnuz()
    assert (fnuz.element.dialect, fnuz.top) == ("fnuz", known.top / 2)
    for seed in range(3):
        x = data((130, 290), seed=seed)
        ocp = quantize(x, known)
        wide = spread(ocp[1], tuple(x.shape), known)
        x = torch.where(wide > 2.0**-126, x, 0)  # the least scale there is cannot be told from a smaller one
        ocp, other = quantize(x, known), quantize(x, fnuz)
        assert same_bits(dequantize(*other, fnuz) + 0.0, dequantize(*ocp, known) + 0.0)  # FNUZ has no -0
        if known.element is E4M3:
            moved = to_fnuz(*ocp)
            numbers = load_scale(ocp[1]) != 1  # of blocks of zeros: 1 and 2 are as good
            assert same_bits(moved[0], other[0])
            assert torch.equal(load_scale(moved[1])[numbers], load_scale(other[1])[numbers])


def test_below_the_least_scale_fnuz_is_finer() -> None:
    x = torch.tensor([[224 * 2.0**-126, 2.0**-136, 3 * 2.0**-137]])
    known = Layout.parse("e4m3:1x*:e8m0")
    ocp, fnuz = (dequantize(*quantize(x, each), each) for each in (known, known.fnuz()))
    assert ocp.tolist() == [[224 * 2.0**-126, 0.0, 2.0**-135]]
    assert fnuz.tolist() == [[224 * 2.0**-126, 2.0**-136, 2.0**-135]]


@pytest.mark.parametrize("text", ["e2m1:1x32:e8m0", "int8:1x*:float32", "e4m3fnuz:1x32:e8m0", "e5m2fnuz:1x32:e8m0"])
def test_what_has_no_other_dialect_stays(text: str) -> None:
    assert Layout.parse(text).fnuz() == Layout.parse(text)


# -- refused -----------------------------------------------------------------------------------------------------------


def test_pairs_that_are_not_of_a_layout_are_refused() -> None:
    codes, scales = quantize(torch.ones(130, 64), FP8_TILE)
    with pytest.raises(ValueError, match=r"^e4m3:128x128:e8m0 of \(130, 64\) needs scales \(2, 1\), found \(1, 1\)$"):
        dequantize(codes, scales[:1], FP8_TILE)
    with pytest.raises(ValueError, match=r"needs scales \(130, 1\), found \(2, 1\)"):
        dequantize(codes, scales, FP8_ACTIVATION)
    with pytest.raises(ValueError, match=r"^e4m3:128x128:e8m0 has e8m0 scales, found float32$"):
        dequantize(codes, load_scale(scales), FP8_TILE)
    with pytest.raises(ValueError, match=r"^e4m3:128x128:pow2 has pow2 scales, found float8_e8m0fnu$"):
        dequantize(codes, scales, FP8_TILE_F32)
    with pytest.raises(ValueError, match="scales are float8_e8m0fnu, float32 or bfloat16, not int8"):
        dequantize(codes, torch.ones(2, 1, dtype=torch.int8), FP8_TILE_F32)
    with pytest.raises(ValueError, match="codes of e4m3 are float8_e4m3fn, not float8_e4m3fnuz"):
        dequantize(codes.view(torch.float8_e4m3fnuz), scales, FP8_TILE)
    with pytest.raises(ValueError, match="codes of e4m3fnuz are float8_e4m3fnuz, not float8_e4m3fn"):
        dequantize(codes, scales, FP8_TILE.fnuz())
    with pytest.raises(ValueError, match=r"blocks of 128 rows; \(64,\) has no rows"):
        dequantize(codes[0], scales[0], FP8_TILE)
    packed, groups = quantize(torch.ones(2, 64), MXFP4)
    with pytest.raises(ValueError, match="codes of e2m1 are int8, not float32"):
        dequantize(packed.float(), groups, MXFP4)
    with pytest.raises(ValueError, match=r"needs scales \(2, 2\), found \(2, 1\)"):
        dequantize(packed, groups[:, :1], MXFP4)
    assert same_bits(dequantize(packed.view(torch.uint8), groups, MXFP4), torch.ones(2, 64))


def test_an_odd_number_of_packed_columns_is_refused() -> None:
    for shape in ((2, 33), (1 << 16, 33)):
        with pytest.raises(ValueError, match="33 columns cannot be packed in pairs"):
            quantize(torch.zeros(shape), MXFP4)


def test_scales_of_base_releases_may_be_any_float() -> None:
    codes, scales = quantize(spread_out((130, 64)), FP8_TILE_F32)
    odd = (scales * 1.37).bfloat16()
    wide = odd.float().repeat_interleave(128, 0)[:130]
    assert same_bits(dequantize(codes, odd, FP8_TILE_F32), codes.float() * wide)
