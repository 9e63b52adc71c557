"""Weights that the compiler rounded: its own codes and scales are right, and what is only near them is found."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from atomc.formats import Layout, dequantize, quantize
from atomc.formats.choice import quantize_with
from atomc.verify import grid
from atomc.verify.weights import WeightReport, _packed

TEXTS = ("e4m3:1x*:float32", "e4m3:1x128:float32", "e2m1:1x32:e8m0", "e4m3:128x128:e8m0")
ROWWISE = TEXTS[:3]


def full(rows: int = 160, columns: int = 256) -> Tensor:
    """A weight with a few large values, for which clipping pays; every fifth row is on the grid of stored FP8."""
    x = torch.randn(rows, columns) * (1 + 4 * (torch.rand(rows, columns) > 0.995))
    tiles = Layout.parse("e4m3:128x128:e8m0")
    x[::5] = dequantize(*quantize(x, tiles), tiles)[::5]
    return x


def report(x: Tensor, codes: Tensor, scales: Tensor, text: str, method: str) -> WeightReport:
    found, scale = grid.unpacked(codes, scales, text)
    return _packed("w", text, "quantized", found, scale, [x.double()], method)


def repacked(x: Tensor, scales: Tensor, text: str) -> tuple[Tensor, Tensor]:
    """The codes for other scales: each value is rounded right, by a scale that may not be."""
    layout = Layout.parse(text)
    wide = grid.spread(grid.factors(scales, grid.grid_of(text)), grid.grid_of(text), tuple(x.shape)).float()
    return layout.element.encode(x / wide), scales


def other(chosen: Tensor, ruled: Tensor) -> Tensor:
    """For each block a candidate that was not chosen: the rule's scale, or else one below it."""
    lower = (ruled.view(torch.uint8) - 1).view(ruled.dtype) if ruled.itemsize == 1 else ruled * 0.6
    same = chosen.float() == ruled.float()
    return torch.where(same, lower.float(), ruled.float()).to(ruled.dtype)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("method", ["amax", "mse", "calibrated"])
def test_what_the_compiler_chooses_is_right(text: str, method: str) -> None:
    x = full()
    importance = torch.rand(x.shape[1]) if method == "calibrated" else None
    chosen = "amax" if method == "amax" else "mse"
    codes, scales = quantize_with(x, Layout.parse(text), chosen, importance)
    found = report(x, codes, scales, text, method)
    assert found.ok, found.why
    assert 0 < found.error < 0.2


@pytest.mark.parametrize("text", ROWWISE)
def test_some_scales_are_chosen_below_the_rules(text: str) -> None:
    """Else the tests here would say nothing of them."""
    x = full()
    (_, ruled), (_, chosen) = quantize(x, Layout.parse(text)), quantize_with(x, Layout.parse(text), "mse")
    assert float((chosen.float() < ruled.float()).float().mean()) > 0.05


@pytest.mark.parametrize("text", ROWWISE[:2])
@pytest.mark.parametrize("method", ["mse", "calibrated"])
@pytest.mark.parametrize("factor", [0.99, 0.97, 0.75, 0.55, 1.5])
def test_a_scale_that_is_no_candidate_is_found(text: str, method: str, factor: float) -> None:
    """Every value is what its scale rounds it to, and the scale is between those that are tried."""
    x = full()
    _, scales = quantize(x, Layout.parse(text))
    scales[3] *= factor
    found = report(x, *repacked(x, scales, text), text, method)
    assert "the scale at [3, 0]" in found.why


@pytest.mark.parametrize("text", ROWWISE)
def test_a_candidate_that_loses_more_is_found_where_nothing_weighs_columns(text: str) -> None:
    x = full()
    _, ruled = quantize(x, Layout.parse(text))
    _, chosen = quantize_with(x, Layout.parse(text), "mse")
    chosen[7] = other(chosen[7], ruled[7])
    pair = repacked(x, chosen, text)
    assert "mse chooses" in report(x, *pair, text, "mse").why
    assert report(x, *pair, text, "calibrated").ok  # the weights of its columns are not known
    assert "by the rule (amax)" in report(x, *pair, text, "amax").why


@pytest.mark.parametrize("text", TEXTS)
def test_a_code_beside_the_right_one_is_found(text: str) -> None:
    x = full()
    codes, scales = quantize_with(x, Layout.parse(text), "mse")
    codes.view(torch.uint8)[9, 40] ^= 1
    assert "differ from the checkpoint's" in report(x, codes, scales, text, "mse").why
