"""Choosing scales: from the largest magnitude (spec 3.4), or the one of a few that loses least.

Terms:
    candidate    a scale a block might take: the one that fits its largest magnitude, or a smaller one that clips it.
    importance   a weight for each column: the mean square of the input channel that it multiplies. The error of a
                 product is the sum of importance x (w - w')² if the channels are uncorrelated.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from atomc.formats.layout import Layout, bands, block_amax, matrices, quantize, scales_of, spread
from atomc.formats.scale import power_of_two_above, store_scale

# Of the scale that fits amax; smaller ones clip, for a finer grid. A power of two is halved or kept.
_SHRINK: Final = (1.0, 0.95, 0.9, 0.85, 0.8, 0.7, 0.6)
_HALVE: Final = (1.0, 0.5)


def quantize_with(x: Tensor, layout: Layout, method: str, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The pair of a weight x [..., N, K]; `mse` takes for each block the candidate of the least squared error.

    Args:
        importance: [K] float32, or None: all columns alike.
    Raises:
        ValueError: an unknown method, or importance of another length.
    """
    check_method(x, method, importance)
    if method == "amax":
        return quantize(x, layout)
    shape, flat = tuple(x.shape), matrices(x.detach(), layout)
    codes = flat.new_empty(layout.code_shape(tuple(flat.shape)), dtype=layout.element.storage)
    scales = flat.new_empty(layout.scale_shape(tuple(flat.shape)), dtype=layout.scale_dtype)
    for m, rows, tiles in bands(flat, layout):
        codes[m, rows], scales[m, tiles] = _best(flat[m, rows].float(), layout, importance)
    return codes.view(layout.code_shape(shape)), scales.view(layout.scale_shape(shape))


def check_method(x: Tensor, method: str, importance: Tensor | None) -> None:
    """Raise `ValueError` if the method is unknown or cannot use what it is given; meta tensors will do."""
    if method not in ("amax", "mse"):
        raise ValueError(f"scales are chosen by amax or mse, not {method!r}")
    if importance is None:
        return
    if method == "amax":
        raise ValueError("scales from amax have no use for importance; choose mse")
    if importance.shape != (x.shape[-1],):
        raise ValueError(f"importance of shape {tuple(importance.shape)} for {x.shape[-1]} columns")


def _best(x: Tensor, layout: Layout, importance: Tensor | None) -> tuple[Tensor, Tensor]:
    """The pair of a band [rows, columns]."""
    rows, columns = x.shape
    fitting = scales_of(block_amax(x, layout), layout)
    best, least = fitting, torch.full_like(fitting, torch.inf)
    factors = _SHRINK if layout.scale == "float32" else _HALVE
    candidates = [(fitting * factor).clamp(min=2.0**-126) for factor in factors]
    if layout.scale == "float32":
        # Values that come from a format with power-of-two scales lie on this grid, and on no other.
        candidates.append(power_of_two_above(fitting))
    for scale in candidates:
        error = _errors(x, scale, layout, importance)
        best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    codes = layout.element.encode(x / spread(best, layout, rows, columns))
    return codes, store_scale(best, layout.scale)


def _errors(x: Tensor, scale: Tensor, layout: Layout, importance: Tensor | None) -> Tensor:
    """Weighted squared error of each block under a scale."""
    wide = spread(scale, layout, *x.shape)
    lost = (layout.element.decode(layout.element.encode(x / wide)) * wide - x).square()
    if importance is not None:
        lost = lost * importance
    width = layout.columns or x.shape[-1]
    padded = torch.nn.functional.pad(lost, (0, -x.shape[-1] % width, 0, -x.shape[0] % layout.rows))
    total: Tensor = padded.unflatten(0, (-1, layout.rows)).unflatten(2, (-1, width)).sum((1, 3))
    return total
