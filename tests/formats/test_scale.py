"""Scales: every E8M0 byte, and the rule of a block's scale against exact rational arithmetic."""

from __future__ import annotations

import math
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from atomc.formats.scale import (
    E8M0_NAN,
    Scale,
    block_scale,
    decode_e8m0,
    encode_e8m0,
    load_scale,
    power_of_two_above,
    store_scale,
)
from tests.support.minifloats import ceil_log2, with_neighbours
from tests.support.tiny import same_bits

BYTES = torch.arange(256, dtype=torch.uint8)
E8M0 = torch.float8_e8m0fnu
KINDS: tuple[Scale, ...] = ("e8m0", "float32", "pow2")
LARGEST = [448.0, 240.0, 224.0, 57344.0, 6.0, 127.0]
MAX = torch.finfo(torch.float32).max
LEAST = 2.0**-126


def exact_scale(amax: float, largest: float) -> float:
    """The least power of two that brings amax > 0 to at most `largest`, 2^-126 at the least."""
    return max(2.0 ** ceil_log2(Fraction(amax) / Fraction(largest)), LEAST)


def boundaries(largest: float) -> Tensor:
    """Every float32 amax = largest x 2^k, and its neighbours."""
    amax = torch.tensor([largest * 2.0**k for k in range(-170, 128)], dtype=torch.float64)
    return with_neighbours(amax.float()[(amax >= 2.0**-149) & (amax <= MAX)])


# -- E8M0 --------------------------------------------------------------------------------------------------------------


def test_every_e8m0_byte() -> None:
    values = decode_e8m0(BYTES)
    assert [Fraction(v) for v in values[:255].tolist()] == [Fraction(2) ** (byte - 127) for byte in range(255)]
    assert values[255].isnan()
    assert same_bits(decode_e8m0(BYTES.view(E8M0)), values)
    assert torch.equal(values[:255], BYTES.view(E8M0).float()[:255])
    theirs = BYTES.numpy().view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    assert torch.equal(values[:255], torch.from_numpy(theirs)[:255]) and np.isnan(theirs[255])


def test_every_power_of_two_has_its_byte() -> None:
    assert torch.equal(encode_e8m0(decode_e8m0(BYTES)).view(torch.uint8), BYTES)
    special = torch.tensor([math.inf, math.nan, -math.nan, torch.inf * 0])
    assert encode_e8m0(special).view(torch.uint8).tolist() == [E8M0_NAN] * 4


# -- the next power of two ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("largest", LARGEST)
def test_scales_are_exact_at_every_power_of_two_and_beside_it(largest: float) -> None:
    amax = boundaries(largest)
    assert len(amax) > 700
    wanted = [exact_scale(a, largest) if a > 0 else 1.0 for a in amax.tolist()]
    for kind in ("e8m0", "pow2"):
        assert block_scale(amax, largest, kind).tolist() == wanted
    ordinary = amax / largest >= LEAST
    assert power_of_two_above(amax / largest)[ordinary].tolist() == [
        w for w, o in zip(wanted, ordinary.tolist(), strict=True) if o
    ]


@given(st.floats(0, MAX, width=32, exclude_min=True), st.sampled_from(LARGEST))
def test_scales_are_the_least_power_of_two_that_fits(amax: float, largest: float) -> None:
    scale = float(block_scale(torch.tensor(amax), largest, "e8m0"))
    assert scale == exact_scale(amax, largest)
    assert Fraction(amax) <= Fraction(largest) * Fraction(scale)


def test_powers_of_two_above_ordinary_and_odd_ratios() -> None:
    ratios = torch.tensor([0.0, 2.0**-149, 2.0**-127, LEAST, 0.75, 1.0, 1.0000001, 3.0, 2.0**127, math.inf, math.nan])
    wanted = [1.0, LEAST, LEAST, LEAST, 1.0, 1.0, 2.0, 4.0, 2.0**127, math.inf, math.inf]
    assert power_of_two_above(ratios).tolist() == wanted
    every = torch.tensor([2.0**e for e in range(-126, 128)])
    assert torch.equal(power_of_two_above(every), every)
    assert torch.equal(power_of_two_above(every.nextafter(torch.tensor(0.0)))[1:], every[1:])
    assert torch.equal(power_of_two_above(every.nextafter(torch.tensor(math.inf)))[:-1], every[1:])


# -- a block's scale ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("largest", LARGEST)
def test_blocks_of_zeros_subnormals_and_no_numbers(kind: Scale, largest: float) -> None:
    amax = torch.tensor([0.0, 2.0**-149, 2.0**-130, math.inf, math.nan, MAX])
    scale = block_scale(amax, largest, kind)
    assert scale[:3].tolist() == [1.0, LEAST, LEAST]
    assert scale[3:5].tolist() == [math.inf, math.inf]
    wanted = float(np.float32(MAX) / np.float32(largest)) if kind == "float32" else exact_scale(MAX, largest)
    assert float(scale[5]) == wanted


@pytest.mark.parametrize("largest", LARGEST)
def test_float32_scales_are_the_rounded_quotient(largest: float) -> None:
    amax = boundaries(largest)
    scale = block_scale(amax, largest, "float32")
    wanted = np.maximum(amax.numpy() / np.float32(largest), np.float32(LEAST))
    assert torch.equal(scale, torch.where(amax == 0, 1.0, torch.from_numpy(wanted)))
    assert (amax.double() / scale.double() <= largest * (1 + 2.0**-23)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_scales_are_stored_and_loaded(kind: Scale) -> None:
    scale = block_scale(torch.tensor([[0.0, 1.0, 1e-30, 3e38], [448.0, 5.5, math.inf, math.nan]]), 448.0, kind)
    stored = store_scale(scale, kind)
    assert stored.shape == scale.shape
    assert stored.dtype == (E8M0 if kind == "e8m0" else torch.float32)
    loaded = load_scale(stored)
    assert loaded.isnan().tolist() == [[False] * 4, [False, False, True, True]]
    assert torch.equal(loaded[scale.isfinite()], scale[scale.isfinite()])


def test_scales_of_bfloat16_are_read_and_of_other_dtypes_refused() -> None:
    assert load_scale(torch.tensor([0.5, 3.0], dtype=torch.bfloat16)).tolist() == [0.5, 3.0]
    for dtype in (torch.uint8, torch.int32, torch.float16, torch.float64, torch.float8_e4m3fn):
        name = str(dtype).removeprefix("torch.")
        with pytest.raises(ValueError, match=f"^scales are float8_e8m0fnu, float32 or bfloat16, not {name}$"):
            load_scale(torch.ones(2).to(dtype))


def test_a_scale_is_a_quotient_and_no_product_with_a_reciprocal() -> None:
    """What CUDA makes of a division by a number: above every amax = 127 x 2^k it is a binade too low, so that the
    largest magnitude would saturate."""
    power = torch.tensor([2.0**k for k in range(-60, 60)])
    amax = (127 * power).nextafter(torch.tensor(math.inf))
    assert torch.equal(power_of_two_above(amax * torch.tensor(1 / 127)), power)
    assert torch.equal(block_scale(amax, 127.0, "pow2"), 2 * power)
