"""Number formats: every byte, every rounding boundary, ragged tiles; scales against exact rational arithmetic."""

import itertools
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from atomc.ops.formats import (
    decode_e2m1,
    decode_e8m0,
    dequantize_fp4,
    dequantize_fp8_block,
    dequantize_fp8_group,
    encode_e2m1,
    encode_e8m0,
    pack_fp4,
    quantize_fp4,
    quantize_fp8_block,
    quantize_fp8_group,
    scale_exponent,
    unpack_fp4,
)

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
BYTES = torch.arange(256, dtype=torch.uint8)


def e4m3_value(byte: int) -> float:
    """E4M3 (fn) by its definition: 1 sign, 4 exponent (bias 7), 3 mantissa bits; S.1111.111 is NaN, there is no inf."""
    sign, exponent, mantissa = -1.0 if byte & 0x80 else 1.0, byte >> 3 & 15, byte & 7
    if exponent == 15 and mantissa == 7:
        return math.nan
    return sign * (mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))


def test_every_e8m0_byte() -> None:
    values = decode_e8m0(BYTES)
    assert values[:255].tolist() == [2.0 ** (byte - 127) for byte in range(255)]
    assert values[255].isnan()
    again = decode_e8m0(BYTES.view(torch.float8_e8m0fnu))
    assert torch.equal(again.view(torch.int32), values.view(torch.int32))
    assert torch.equal(again[:255], BYTES.view(torch.float8_e8m0fnu).float()[:255])


def test_e8m0_encodes_every_exponent() -> None:
    exponents = torch.arange(-127, 129, dtype=torch.int32)
    assert torch.equal(encode_e8m0(exponents).view(torch.uint8), BYTES)


def test_every_e4m3_byte_dequantises_exactly_in_both_dtypes() -> None:
    weight = BYTES.view(torch.float8_e4m3fn).reshape(1, 256)
    for exponent in (-100, -7, 0, 9, 100):
        scale = encode_e8m0(torch.tensor([[exponent, exponent + 1]]))
        expected = torch.tensor([e4m3_value(b) * 2.0 ** (exponent + b // 128) for b in range(256)]).reshape(1, 256)
        for dtype in (torch.float32, torch.bfloat16):
            found = dequantize_fp8_block(weight, scale, dtype)
            assert found.dtype == dtype
            assert torch.equal(found.float().nan_to_num(7), expected.nan_to_num(7))


def test_every_packed_fp4_byte() -> None:
    """Low nibble = even column, bit 3 = sign (spec 3.2)."""
    table = [*E2M1, *(-v for v in E2M1)]
    packed = BYTES.view(torch.int8).reshape(8, 32)
    expected = torch.tensor([[table[b & 15], table[b >> 4]] for b in range(256)]).reshape(8, 64)
    scale = encode_e8m0(torch.arange(16, dtype=torch.int32).reshape(8, 2) - 8)
    spread = decode_e8m0(scale).repeat_interleave(32, 1)
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(dequantize_fp4(packed, scale, dtype).float(), expected * spread)
    assert torch.equal(pack_fp4(unpack_fp4(packed)), packed)
    assert torch.equal(decode_e2m1(unpack_fp4(packed)), expected)


def test_e2m1_codes_are_their_own_nearest() -> None:
    codes = torch.arange(16, dtype=torch.uint8)
    assert torch.equal(encode_e2m1(decode_e2m1(codes)), codes)  # -0 keeps its sign


def nearest_e2m1(x: float) -> int:
    """Code of the nearest magnitude; of two equally near, the even code."""
    distances = [abs(Fraction(abs(x)) - Fraction(v)) for v in E2M1]
    return min((code for code in range(8) if distances[code] == min(distances)), key=lambda code: code % 2)


@given(st.floats(-8, 8, width=32))
def test_e2m1_rounds_to_nearest_even(x: float) -> None:
    code = int(encode_e2m1(torch.tensor([x]))[0])
    assert code & 7 == nearest_e2m1(x)
    assert bool(code >> 3) == (math.copysign(1, x) < 0)


def test_e2m1_at_every_boundary_and_its_neighbours() -> None:
    middles = torch.tensor([(a + b) / 2 for a, b in itertools.pairwise(E2M1)] + [1e9, math.inf])
    around = torch.cat([middles, middles.nextafter(torch.tensor(0.0)), middles.nextafter(torch.tensor(math.inf))])
    expected = [nearest_e2m1(min(x, 100.0)) for x in around.tolist()]
    assert encode_e2m1(around).tolist() == expected
    assert encode_e2m1(-around).tolist() == [code + 8 for code in expected]


def exact_exponent(amax: float, largest: int) -> int:
    """ceil(log2(amax / largest)) in rational arithmetic."""
    ratio = Fraction(amax) / largest
    exponent = 0
    while ratio > Fraction(2) ** exponent:
        exponent += 1
    while ratio <= Fraction(2) ** (exponent - 1):
        exponent -= 1
    return exponent


@given(st.floats(2.0**-117, 2.0**127, width=32), st.sampled_from([448, 6]))
def test_scale_exponent_is_the_exact_ceiling(amax: float, largest: int) -> None:
    assert int(scale_exponent(torch.tensor(amax), largest)) == exact_exponent(amax, largest)


@pytest.mark.parametrize("largest", [448, 6])
def test_scale_exponent_at_powers_of_two_and_their_neighbours(largest: int) -> None:
    exact = torch.tensor([largest * 2.0**e for e in range(-115, 118)])
    above, below = exact.nextafter(torch.tensor(math.inf)), exact.nextafter(torch.tensor(0.0))
    wanted = torch.arange(-115, 118, dtype=torch.int32)
    assert torch.equal(scale_exponent(exact, largest), wanted)
    assert torch.equal(scale_exponent(below, largest), wanted)
    assert torch.equal(scale_exponent(above, largest), wanted + 1)


def test_scale_exponent_of_special_values() -> None:
    found = scale_exponent(torch.tensor([0.0, 1e-45, math.inf, math.nan, torch.finfo(torch.float32).max]), 448)
    assert found.tolist() == [0, -126, 128, 128, exact_exponent(torch.finfo(torch.float32).max, 448)]


def naive_fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Tile by tile, in Python."""
    rows, columns = weight.shape
    values = torch.empty(rows, columns)
    scale = torch.empty(-(-rows // 128), -(-columns // 128))
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            tile = weight[i * 128 : (i + 1) * 128, j * 128 : (j + 1) * 128]
            amax = float(tile.abs().max())
            scale[i, j] = 2.0 ** exact_exponent(amax, 448) if amax else 1.0
            rounded = (tile / scale[i, j]).to(torch.float8_e4m3fn).float()
            values[i * 128 : (i + 1) * 128, j * 128 : (j + 1) * 128] = rounded
    return values, scale


@pytest.mark.parametrize("shape", [(128, 128), (1, 1), (130, 300), (256, 127), (5, 129), (300, 40)])
def test_fp8_tiles_with_ragged_edges(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(shape[0])
    weight = torch.randn(shape, generator=generator) * torch.exp(3 * torch.randn(shape, generator=generator))
    weight[0, :3] = 0
    values, scale = quantize_fp8_block(weight)
    wanted_values, wanted_scale = naive_fp8(weight)
    assert (values.dtype, scale.dtype) == (torch.float8_e4m3fn, torch.float8_e8m0fnu)
    assert torch.equal(values.float(), wanted_values)
    assert torch.equal(decode_e8m0(scale), wanted_scale)
    spread = wanted_scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[: shape[0], : shape[1]]
    assert torch.equal(dequantize_fp8_block(values, scale), wanted_values * spread)
    assert torch.equal(dequantize_fp8_block(values, wanted_scale), wanted_values * spread)  # Base: float32 scales


def test_fp8_bands_of_a_matrix_larger_than_one_band() -> None:
    weight = torch.randn(700, 9000, generator=torch.Generator().manual_seed(0))
    values, scale = quantize_fp8_block(weight)
    whole = dequantize_fp8_block(values, scale)
    for rows in (slice(0, 128), slice(128, 256), slice(640, 700)):
        part = dequantize_fp8_block(values[rows], scale[rows.start // 128 : -(-rows.stop // 128)])
        assert torch.equal(whole[rows], part)
    assert (whole - weight).abs().max() <= weight.abs().max() / 16


@given(st.integers(1, 200), st.integers(1, 200), st.integers(0, 1000))
def test_fp8_values_are_fixed_points(rows: int, columns: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    once = dequantize_fp8_block(*quantize_fp8_block(torch.randn(rows, columns, generator=generator)))
    assert torch.equal(dequantize_fp8_block(*quantize_fp8_block(once)), once)


def test_stacked_matrices_are_quantised_one_by_one() -> None:
    weight = torch.randn(3, 130, 64, generator=torch.Generator().manual_seed(1))
    values, scale = quantize_fp8_block(weight)
    assert tuple(scale.shape) == (3, 2, 1)
    for i in range(3):
        one_values, one_scale = quantize_fp8_block(weight[i])
        assert torch.equal(values[i].float(), one_values.float())
        assert torch.equal(scale[i].view(torch.uint8), one_scale.view(torch.uint8))
    packed, groups = quantize_fp4(weight)
    assert torch.equal(dequantize_fp4(packed, groups)[1], dequantize_fp4(packed[1], groups[1]))
    assert torch.equal(dequantize_fp8_block(values, scale)[2], dequantize_fp8_block(values[2], scale[2]))


def test_fp4_groups_against_a_naive_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(7, 96, generator=generator) * torch.exp(4 * torch.randn(7, 96, generator=generator))
    weight[3, 32:64] = 0
    packed, scale = quantize_fp4(weight)
    assert (packed.dtype, tuple(packed.shape), tuple(scale.shape)) == (torch.int8, (7, 48), (7, 3))
    found, factors = dequantize_fp4(packed, scale), decode_e8m0(scale)
    for row in range(7):
        for column in range(96):
            group = weight[row, column // 32 * 32 : column // 32 * 32 + 32]
            amax = float(group.abs().max())
            factor = 2.0 ** exact_exponent(amax, 6) if amax else 1.0
            assert float(factors[row, column // 32]) == factor
            x = float(weight[row, column]) / factor
            assert float(found[row, column]) == math.copysign(E2M1[nearest_e2m1(x)], x) * factor


def test_a_tile_with_inf_or_nan_gets_the_nan_scale() -> None:
    for bad in (math.inf, math.nan):
        weight = torch.ones(2, 256)
        weight[0, 200] = bad
        for values, scale in (quantize_fp8_block(weight), quantize_fp4(weight)):
            assert 0xFF in scale.view(torch.uint8)
            back = dequantize_fp8_block(values, scale) if values.dtype != torch.int8 else dequantize_fp4(values, scale)
            assert back[0, 200].isnan()
            assert (back[0, :128] == 1).all()


@pytest.mark.parametrize("group", [32, 64, 128])
def test_activation_groups(group: int) -> None:
    x = torch.randn(3, 5, 256, generator=torch.Generator().manual_seed(0)) * 3
    x[0, 0] = 0
    values, scale = quantize_fp8_group(x, group)
    assert tuple(scale.shape) == (3, 5, 256 // group)
    amax = x.unflatten(-1, (-1, group)).abs().amax(-1).clamp(min=1e-4)
    wanted = [2.0 ** exact_exponent(a, 448) for a in amax.flatten().tolist()]
    assert decode_e8m0(scale).flatten().tolist() == wanted
    back = dequantize_fp8_group(values, scale)
    assert ((back - x).abs() <= amax.repeat_interleave(group, -1) / 16).all()


def test_the_index_activation_floor_keeps_the_smallest_scale() -> None:
    _, scale = quantize_fp4(torch.zeros(1, 32), amax_floor=6 * 2.0**-126)
    assert scale.view(torch.uint8).tolist() == [[1]]


def test_wrong_shapes_and_dtypes_are_refused() -> None:
    fp8, e8m0 = torch.zeros(130, 64, dtype=torch.float8_e4m3fn), torch.zeros(1, 1, dtype=torch.float8_e8m0fnu)
    with pytest.raises(ValueError, match=r"needs scales \(2, 1\), found \(1, 1\)"):
        dequantize_fp8_block(fp8, e8m0)
    with pytest.raises(ValueError, match="float8_e4m3fn"):
        dequantize_fp8_block(torch.zeros(2, 2), e8m0)
    with pytest.raises(ValueError, match="scales are"):
        dequantize_fp8_block(fp8[:2], torch.ones(1, 1, dtype=torch.int8))
    with pytest.raises(ValueError, match=r"needs scales \(2, 1\)"):
        dequantize_fp4(torch.zeros(2, 16, dtype=torch.int8), torch.ones(2, 2))
    with pytest.raises(ValueError, match="int8"):
        dequantize_fp4(torch.zeros(2, 16), torch.ones(2, 1))
    with pytest.raises(ValueError, match="multiple of the group of 32"):
        quantize_fp4(torch.zeros(2, 33))
    with pytest.raises(ValueError, match="in pairs"):
        pack_fp4(torch.zeros(2, 3, dtype=torch.uint8))
