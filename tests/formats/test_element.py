"""Elements: every code and every rounding boundary, against the definitions, torch's casts and ml_dtypes."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from atomc.formats import E2M1, E4M3, ELEMENTS, INT8, Element, element
from atomc.formats.element import decode_e2m1, encode_e2m1, pack_e2m1, unpack_e2m1
from tests.support.minifloats import DEFINITIONS, Definition, decoded, encoded, midpoints, with_neighbours
from tests.support.tiny import same_bits

BYTES = torch.arange(256, dtype=torch.uint8)
FLOATS = [name for name in ELEMENTS if name != "int8"]
FP8 = [name for name in FLOATS if name != "e2m1"]
ML_DTYPES = {
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e4m3fnuz": ml_dtypes.float8_e4m3fnuz,
    "e5m2": ml_dtypes.float8_e5m2,
    "e5m2fnuz": ml_dtypes.float8_e5m2fnuz,
    "e2m1": ml_dtypes.float4_e2m1fn,
}
# All numbers of two 16-bit formats, which together cross every boundary of the formats here, subnormals included.
PATTERNS = torch.arange(-(1 << 15), 1 << 15).to(torch.int16)
SIXTEEN = {"float16": PATTERNS.view(torch.float16).float(), "bfloat16": PATTERNS.view(torch.bfloat16).float()}


def codes_of(of: Element, x: Tensor) -> Tensor:
    """`encode` as codes of one number each: uint8."""
    stored = of.encode(x)
    assert stored.dtype == of.storage
    return unpack_e2m1(stored) if of.packed == 2 else stored.view(torch.uint8)


def stored_bytes(of: Element) -> Tensor:
    """Every byte in the element's storage."""
    return BYTES.view(of.storage)


def codes_in(of: Element) -> Tensor:
    """What stands in every byte, code by code."""
    return torch.stack([BYTES & 15, BYTES >> 4], -1).flatten() if of.packed == 2 else BYTES


# -- decoding ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ELEMENTS)
@pytest.mark.parametrize("many", [0, 1 << 40])
def test_every_code_is_decoded_as_defined(name: str, many: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the table and without."""
    monkeypatch.setattr(element, "_MANY", many)
    of = ELEMENTS[name]
    found, codes = of.decode(stored_bytes(of)), codes_in(of)
    assert found.dtype == torch.float32 and found.shape == codes.shape
    for code, value in zip(codes.tolist(), found.tolist(), strict=True):
        wanted = DEFINITIONS[name].value(code)
        if isinstance(wanted, Fraction):
            assert Fraction(value) == wanted
        assert math.isnan(value) == (wanted != wanted)
        assert value == wanted or math.isnan(value)
        assert math.copysign(1, value) == math.copysign(1, wanted) or math.isnan(value)


@pytest.mark.parametrize("name", FLOATS)
def test_every_code_is_decoded_as_by_ml_dtypes(name: str) -> None:
    of = ELEMENTS[name]
    codes = codes_in(of).numpy()
    theirs = torch.from_numpy(codes.view(ML_DTYPES[name]).astype(np.float32))
    found = of.decode(stored_bytes(of))
    assert torch.equal(found.isnan(), theirs.isnan())
    assert same_bits(found.nan_to_num(7), theirs.nan_to_num(7))


@pytest.mark.parametrize("name", [*FP8, "int8"])
def test_every_code_is_decoded_as_by_torch(name: str) -> None:
    of = ELEMENTS[name]
    assert same_bits(of.decode(stored_bytes(of)), stored_bytes(of).to(torch.float32))


@pytest.mark.parametrize("name", ELEMENTS)
def test_many_codes_in_any_order_of_memory_are_decoded_like_few(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    of = ELEMENTS[name]
    codes = BYTES.repeat(96)[torch.randperm(256 * 96)].view(3, 64, 128).view(of.storage)
    assert codes.numel() > element._MANY
    for view in (codes, codes.transpose(0, 1), codes[:, 1:], codes[..., ::2]):
        found = of.decode(view)
        with monkeypatch.context() as patched:
            patched.setattr(element, "_MANY", 1 << 40)
            assert same_bits(found, of.decode(view))


@pytest.mark.parametrize("name", ELEMENTS)
def test_the_facts_of_an_element_are_those_of_its_definition(name: str) -> None:
    of, magnitudes = ELEMENTS[name], DEFINITIONS[name].magnitudes
    assert of.name == name
    assert (Fraction(of.largest), Fraction(of.smallest)) == (magnitudes[-1], magnitudes[1])
    definition = DEFINITIONS[name]
    if isinstance(definition, Definition):
        assert of.precision == definition.mantissa + 1
        assert of.bits == 1 + definition.exponent + definition.mantissa
        assert of.dialect == ("fnuz" if definition.fnuz else "ocp")
    assert of.packed * of.bits == 8 * of.storage.itemsize


@pytest.mark.parametrize("name", ELEMENTS)
def test_codes_of_another_dtype_or_dialect_are_refused(name: str) -> None:
    of = ELEMENTS[name]
    shared = {of.storage, torch.uint8} if of.packed == 2 else {of.storage}
    for dtype in {e.storage for e in ELEMENTS.values()} | {torch.uint8, torch.float32, torch.int32}:
        codes = torch.zeros(4, dtype=dtype)
        if dtype in shared:
            assert of.decode(codes).dtype == torch.float32
            continue
        theirs = str(dtype).removeprefix("torch.")
        with pytest.raises(ValueError, match=rf"^codes of {name} are \w+, not {theirs}$"):
            of.decode(codes)


# -- encoding ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ELEMENTS)
@pytest.mark.parametrize("source", SIXTEEN)
def test_every_number_of_16_bits_goes_to_the_nearest_code(name: str, source: str) -> None:
    x, of = SIXTEEN[source], ELEMENTS[name]
    codes, numbers = codes_of(of, x), ~x.isnan()
    assert torch.equal(codes[numbers], encoded(name, x[numbers]))
    values = of.decode(of.encode(x))
    if name in FP8:
        assert torch.equal(values.isnan(), x.isnan())
    else:
        assert (values[~numbers] == 0).all()
    assert (values[numbers].abs() <= of.largest).all()


@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize("source", SIXTEEN)
def test_every_number_of_16_bits_is_encoded_as_by_ml_dtypes(name: str, source: str) -> None:
    """They do not saturate: what rounds beyond the largest number is compared nowhere."""
    of, x = ELEMENTS[name], SIXTEEN[source]
    x = x[x.abs() <= of.largest]
    theirs = torch.from_numpy(x.numpy().astype(ML_DTYPES[name]).view(np.uint8))
    assert torch.equal(codes_of(of, x), theirs)


@pytest.mark.parametrize("name", FP8)
@pytest.mark.parametrize("source", SIXTEEN)
def test_every_number_of_16_bits_is_encoded_as_by_torch(name: str, source: str) -> None:
    of, x = ELEMENTS[name], SIXTEEN[source]
    x = x[x.abs() <= of.largest]
    assert torch.equal(codes_of(of, x), x.to(of.storage).view(torch.uint8))


@pytest.mark.parametrize("name", ELEMENTS)
def test_midpoints_go_to_the_even_code_and_their_neighbours_to_the_nearer(name: str) -> None:
    of, definition = ELEMENTS[name], DEFINITIONS[name]
    middles = torch.from_numpy(midpoints(name)).float()
    assert torch.equal(middles.double(), torch.from_numpy(midpoints(name)))
    x = with_neighbours(middles)
    x = torch.cat([x, x[:1]]) if len(x) % 2 else x  # pairs, for e2m1
    assert torch.equal(codes_of(of, x), encoded(name, x))
    assert torch.equal(codes_of(of, -x), encoded(name, -x))
    # The oracle itself, spelled out: code c below its midpoint with c + 1, c + 1 above, the even one of them on it.
    n = len(middles)
    c = torch.arange(n, dtype=torch.uint8)
    assert len(definition.magnitudes) == n + 1
    assert torch.equal(encoded(name, x[n : 2 * n]), c)
    assert torch.equal(encoded(name, x[2 * n : 3 * n]), c + 1)
    assert torch.equal(encoded(name, x[:n]), c + c % 2)


@pytest.mark.parametrize("name", ELEMENTS)
def test_every_number_of_an_element_keeps_its_code(name: str) -> None:
    of = ELEMENTS[name]
    codes = codes_in(of)
    known = decoded(name, codes)
    finite = known.isfinite() & ((codes != 0x80) if name == "int8" else True)
    again = codes_of(of, of.decode(stored_bytes(of)))
    assert torch.equal(again[finite], codes[finite])
    assert (of.decode(of.encode(torch.tensor([math.inf, -math.inf]))).abs() == of.largest).all()


@pytest.mark.parametrize("name", ELEMENTS)
def test_what_is_out_of_range_saturates(name: str) -> None:
    of = ELEMENTS[name]
    top = torch.tensor([of.largest, math.nextafter(of.largest, math.inf), 1.1 * of.largest, 1e30, math.inf, 3e38])
    assert of.decode(of.encode(top)).tolist() == [of.largest] * 6
    assert of.decode(of.encode(-top)).tolist() == [-of.largest] * 6


@pytest.mark.parametrize("name", ELEMENTS)
def test_signed_zeros_subnormals_and_nan(name: str) -> None:
    of = ELEMENTS[name]
    tiny = [-0.0, 0.0, -(2.0**-149), 2.0**-149, -of.smallest / 2, of.smallest / 2]
    values = of.decode(of.encode(torch.tensor(tiny)))
    assert (values == 0).all()
    signed = of.dialect == "ocp"
    assert torch.signbit(values).tolist() == [signed, False, signed, False, signed, False]
    above = torch.tensor([of.smallest / 2]).nextafter(torch.tensor(1.0)).repeat(2)
    assert of.decode(of.encode(above)).tolist() == [of.smallest] * 2
    nan = of.decode(of.encode(torch.tensor([math.nan, -math.nan])))
    assert nan.isnan().all() if name in FP8 else (nan == 0).all()


@given(st.sampled_from(list(ELEMENTS)), st.floats(allow_nan=False, width=32))
def test_any_float32_goes_to_the_nearest_code(name: str, x: float) -> None:
    """By the distances to all codes, one by one."""
    magnitudes = DEFINITIONS[name].magnitudes
    a = Fraction(min(abs(x), 1e30))
    distances = [abs(a - m) for m in magnitudes]
    least = min(distances)
    nearest = min((code for code, d in enumerate(distances) if d == least), key=lambda code: code % 2)
    found = ELEMENTS[name].decode(ELEMENTS[name].encode(torch.tensor([x, x])))
    assert Fraction(abs(float(found[0]))) == magnitudes[nearest]
    assert found[0] == 0 or math.copysign(1, float(found[0])) == math.copysign(1, x)


# -- e2m1, packed ------------------------------------------------------------------------------------------------------


def test_the_low_nibble_is_the_even_column() -> None:
    """Spec 3.2: byte j holds column 2j low and 2j + 1 high, bit 3 of a nibble is the sign."""
    codes = torch.tensor(list(itertools.product(range(16), range(16))), dtype=torch.uint8)
    packed = pack_e2m1(codes.flatten())
    assert packed.dtype == torch.int8
    assert packed.view(torch.uint8).tolist() == [low + 16 * high for low, high in codes.tolist()]
    assert torch.equal(unpack_e2m1(packed), codes.flatten())
    assert torch.equal(unpack_e2m1(packed.view(torch.uint8)), codes.flatten())
    assert E2M1.encode(torch.tensor([6.0, -0.5, 1.5, 4.0])).view(torch.uint8).tolist() == [0x97, 0x63]


def test_e2m1_codes_are_their_own_nearest() -> None:
    codes = torch.arange(16, dtype=torch.uint8)
    assert decode_e2m1(codes).tolist() == [0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6]
    assert torch.equal(encode_e2m1(decode_e2m1(codes)), codes)  # -0 keeps its sign


def test_an_odd_number_of_columns_cannot_be_packed() -> None:
    with pytest.raises(ValueError, match="3 columns cannot be packed in pairs"):
        pack_e2m1(torch.zeros(2, 3, dtype=torch.uint8))
    with pytest.raises(ValueError, match="5 columns cannot be packed in pairs"):
        E2M1.encode(torch.zeros(5))
    assert E2M1.encode(torch.zeros(2, 0)).shape == (2, 0)


def test_dialects_read_the_same_byte_as_other_numbers() -> None:
    """Why a dialect is part of the type: FNUZ is half of OCP, and where OCP has -0 it has NaN."""
    fnuz = ELEMENTS["e4m3fnuz"]
    ocp, other = E4M3.decode(BYTES.view(E4M3.storage)), fnuz.decode(BYTES.view(fnuz.storage))
    shared = (BYTES & 0x7F != 0x7F) & (BYTES != 0x80)
    assert torch.equal(ocp[shared], 2 * other[shared])
    assert other[0x80].isnan() and ocp[0x80] == 0
    assert INT8.decode(BYTES.view(torch.int8))[0x80] == -128
