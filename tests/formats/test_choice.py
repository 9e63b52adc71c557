"""Choosing scales: the best of the candidates, by brute force; importance; what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from atomc.formats import FP8_CHANNEL, FP8_TILE, MXFP4, Layout, dequantize, quantize
from atomc.formats.choice import quantize_with
from atomc.formats.scale import load_scale

LAYOUTS = [MXFP4, FP8_TILE, FP8_CHANNEL, Layout.parse("int8:1x16:float32"), Layout.parse("e4m3:4x8:e8m0")]


def errors(x: Tensor, pair: tuple[Tensor, Tensor], layout: Layout, importance: Tensor) -> Tensor:
    """Weighted squared error of each block, by a loop."""
    lost = (dequantize(*pair, layout) - x).square() * importance
    rows, columns = layout.rows, layout.columns or x.shape[1]
    return torch.stack(
        [
            torch.stack([lost[i : i + rows, j : j + columns].sum() for j in range(0, x.shape[1], columns)])
            for i in range(0, x.shape[0], rows)
        ]
    )


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("weighted", [False, True])
def test_no_block_is_worse_than_with_the_scale_that_fits(layout: Layout, weighted: bool) -> None:
    x = torch.randn(140, 192) * torch.rand(140, 1).exp2() * 3
    x[:, ::17] *= 20
    importance = torch.rand(192) * (torch.rand(192) > 0.3) if weighted else torch.ones(192)
    fitting, best = quantize(x, layout), quantize_with(x, layout, "mse", importance if weighted else None)
    a, b = (errors(x, pair, layout, importance) for pair in (fitting, best))
    assert bool((b <= a * (1 + 1e-5) + 1e-12).all())
    if layout in (MXFP4, FP8_CHANNEL):  # e4m3 has the same precision at half the scale, but for the smallest values
        assert float(b.sum()) < 0.999 * float(a.sum())
    ratio = load_scale(best[1]) / load_scale(fitting[1])
    assert bool((ratio < (2 if layout.scale == "float32" else 1 + 1e-6)).all())


def candidates(fitting: float, layout: Layout) -> list[float]:
    """The scales a block may take, as the module states them."""
    if layout.scale != "float32":
        return [fitting, max(fitting / 2, 2.0**-126)]
    shrunk = [float(torch.tensor(fitting) * factor) for factor in (1.0, 0.95, 0.9, 0.85, 0.8, 0.7, 0.6)]
    return [*shrunk, 2.0 ** math.ceil(math.log2(fitting))]


def loss(block: Tensor, scale: float, grid: Tensor, importance: Tensor) -> float:
    """Of the nearest number of the grid for each value, every number tried, in float64."""
    scaled = (block / torch.tensor(scale)).double()  # the quotient is a float32, as in the conversion
    nearest = grid[(scaled[..., None] - grid).abs().argmin(-1)]
    return float(((nearest * scale - block.double()).square() * importance).sum())


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("weighted", [False, True])
def test_each_block_has_the_best_candidate(layout: Layout, weighted: bool) -> None:
    """Ragged blocks too. The tolerance is that of float32 sums of at most 2^14 terms: 2^14 x 2^-24."""
    x = torch.randn(133, 160) * torch.rand(133, 1).exp2() * 3
    x[:, ::17] *= 20
    importance = torch.rand(160) * (torch.rand(160) > 0.3) if weighted else torch.ones(160)
    every = torch.arange(256, dtype=torch.uint8).view(layout.element.storage)[:, None]
    grid = layout.element.decode(every).flatten().double()
    grid = grid[grid.isfinite() & (grid.abs() <= layout.element.largest)].unique()
    fitting = load_scale(quantize(x, layout)[1])
    _, scales = quantize_with(x, layout, "mse", importance if weighted else None)
    rows, columns = layout.rows, layout.columns or x.shape[1]
    shrunk = 0
    for i, row in enumerate(load_scale(scales).tolist()):
        for j, chosen in enumerate(row):
            at = slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns)
            legal = candidates(float(fitting[i, j]), layout)
            losses = [loss(x[at], scale, grid, importance[at[1]].double()) for scale in legal]
            assert chosen in legal
            assert losses[legal.index(chosen)] <= min(losses) * (1 + 2**-10)
            shrunk += chosen != legal[0]
    assert shrunk or layout.element.name == "e4m3"


@pytest.mark.parametrize("layout", LAYOUTS[:3], ids=str)
def test_a_column_without_importance_may_clip(layout: Layout) -> None:
    x = torch.ones(128, 128) * 0.9
    x[:, 0] = 1.7
    importance = torch.ones(128)
    importance[0] = 0
    codes, scales = quantize_with(x, layout, "mse", importance)
    plain = errors(x, quantize(x, layout), layout, importance).sum()
    assert float(errors(x, (codes, scales), layout, importance).sum()) <= float(plain)


def test_stacked_weights_and_blocks_of_zeros() -> None:
    x = torch.randn(3, 32, 64)
    x[1] = 0
    codes, scales = quantize_with(x, MXFP4, "mse")
    assert codes.shape == (3, 32, 32) and scales.shape == (3, 32, 2)
    for i in range(3):
        one = quantize_with(x[i], MXFP4, "mse")
        assert torch.equal(codes[i], one[0]) and torch.equal(scales[i].view(torch.uint8), one[1].view(torch.uint8))
    assert bool((dequantize(codes, scales, MXFP4)[1] == 0).all())


def test_values_of_a_power_of_two_grid_are_kept_exactly() -> None:
    """FP8 tiles given a scale for each channel: the grid they lie on is one of the candidates."""
    x = dequantize(*quantize(torch.randn(40, 256) * torch.logspace(-3, 3, 40)[:, None], FP8_TILE), FP8_TILE)
    assert torch.equal(dequantize(*quantize_with(x, FP8_CHANNEL, "mse"), FP8_CHANNEL), x)
    assert not torch.equal(dequantize(*quantize(x, FP8_CHANNEL), FP8_CHANNEL), x)


def test_amax_is_the_plain_conversion_and_the_rest_is_refused() -> None:
    x = torch.randn(4, 32)
    assert torch.equal(quantize_with(x, MXFP4, "amax")[0], quantize(x, MXFP4)[0])
    with pytest.raises(ValueError, match="amax or mse, not 'best'"):
        quantize_with(x, MXFP4, "best")
    with pytest.raises(ValueError, match="for 32 columns"):
        quantize_with(x, MXFP4, "mse", torch.ones(31))
