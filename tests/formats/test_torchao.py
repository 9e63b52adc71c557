"""torchao's MX formats as a second opinion, where it means the same.

What differs, and is not compared: FLOOR, its default, takes the power of two of amax alone and lets the elements above
saturate; CEIL and EVEN round that power, not amax / largest, so their scales may be a binade above ours; RCEIL is our
rule, by way of a floating logarithm. A block of zeros has scale 2^-127 there and 1 here; one with inf has a finite
scale there and NaN here. The rounding of elements under a given scale is the same and is compared in every mode.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from atomc.formats import E2M1, E4M3, E5M2, MXFP4, Element, Layout, dequantize, quantize
from atomc.formats.element import decode_e2m1, encode_e2m1, pack_e2m1, unpack_e2m1
from atomc.formats.scale import load_scale
from tests.support.tiny import same_bits

WHY = "torchao's MX formats cannot be imported; the dev extra installs the release that has them"
kernels: Any = pytest.importorskip("torchao.prototype.mx_formats.kernels", reason=WHY, exc_type=ImportError)
mx: Any = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor", reason=WHY, exc_type=ImportError)

PATTERNS = torch.arange(-(1 << 15), 1 << 15).to(torch.int16)
DTYPES = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2, "e2m1": torch.float4_e2m1fn_x2}
ELEMENTS = [E4M3, E5M2, E2M1]


def rows(seed: int) -> Tensor:
    """Blocks over many binades, none of them all zeros."""
    generator = torch.Generator().manual_seed(seed)
    shape = (257, 160)
    return torch.randn(shape, generator=generator) * torch.exp(6 * torch.randn((257, 1), generator=generator))


def theirs(x: Tensor, of: Element, mode: str, block: int = 32) -> tuple[Tensor, Tensor]:
    """Their bytes and scales."""
    scale, codes = mx.to_mx(x, DTYPES[of.name], block, getattr(mx.ScaleCalculationMode, mode))
    return codes.view(torch.uint8), load_scale(scale.view(torch.float8_e8m0fnu))


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_e2m1_of_every_number_of_16_bits(kind: torch.dtype) -> None:
    x = PATTERNS.view(kind).float()
    x = x[~x.isnan()]
    assert torch.equal(encode_e2m1(x), kernels.f32_to_f4_unpacked(x))


def test_e2m1_codes_and_their_packing() -> None:
    codes = torch.arange(16, dtype=torch.uint8)
    assert same_bits(decode_e2m1(codes), kernels.f4_unpacked_to_f32(codes))
    pairs = torch.cartesian_prod(codes, codes).flatten()
    assert torch.equal(pack_e2m1(pairs).view(torch.uint8), kernels.pack_uint4(pairs))
    every = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(unpack_e2m1(every), kernels.unpack_uint4(every))


@pytest.mark.parametrize("of", ELEMENTS, ids=lambda of: str(of.name))
@pytest.mark.parametrize("block", [32, 160])
def test_blocks_whose_scale_is_rounded_up(of: Element, block: int) -> None:
    layout = Layout.parse(f"{of.name}:1x{block}:e8m0")
    for seed in range(8):
        x = rows(seed)
        codes, scales = quantize(x, layout)
        their_codes, their_scales = theirs(x, of, "RCEIL", block)
        assert torch.equal(load_scale(scales), their_scales.view(scales.shape))
        assert torch.equal(codes.view(torch.uint8), their_codes.view(codes.shape))


@pytest.mark.parametrize("of", ELEMENTS, ids=lambda of: str(of.name))
@pytest.mark.parametrize("mode", ["FLOOR", "CEIL", "EVEN"])
def test_elements_under_their_scales(of: Element, mode: str) -> None:
    for seed in range(4):
        x = rows(seed)
        their_codes, their_scales = theirs(x, of, mode)
        scaled = x / their_scales.view(257, 5).repeat_interleave(32, 1)
        assert torch.equal(of.encode(scaled).view(torch.uint8), their_codes.view(257, -1))


def test_pairs_are_read_alike() -> None:
    x = rows(0)
    codes, scales = quantize(x, MXFP4)
    found = mx.to_dtype(codes.view(torch.uint8), scales, torch.float4_e2m1fn_x2, 32, torch.float32)
    assert torch.equal(found.view(x.shape), dequantize(codes, scales, MXFP4))
