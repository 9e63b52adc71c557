"""Quantising as operators: activations and weights to a layout and back, the Hadamard rotation (spec 2.7, 3.4)."""

from __future__ import annotations

from functools import lru_cache

import torch

from atomc.formats import Layout, RowLayout, hadamard_matrix
from atomc.formats import dequantize as from_layout
from atomc.formats import quantize as to_layout
from atomc.ops.registry import define

Pair = tuple[torch.Tensor, torch.Tensor]


def pair_like(x: torch.Tensor, shape: tuple[int, ...], layout: str) -> Pair:
    """Uninitialised codes and scales of values of that shape: what a fake of a quantising operator returns."""
    known = Layout.parse(layout)
    return (
        x.new_empty(known.code_shape(shape), dtype=known.element.storage),
        x.new_empty(known.scale_shape(shape), dtype=known.scale_dtype),
    )


@define(
    "quantize(Tensor x, str layout) -> (Tensor, Tensor)",
    tokens="x",
    spec="3.4",
    fake=lambda x, layout: pair_like(x, tuple(x.shape), layout),
)
def quantize(x: torch.Tensor, layout: str) -> Pair:
    """Codes and scales of x [..., K] in a layout with blocks of one row; see `atomc.formats.quantize`."""
    return to_layout(x, Layout.parse(layout))


def _dequantize_fake(codes: torch.Tensor, scales: torch.Tensor, layout: str, dtype: torch.dtype) -> torch.Tensor:
    return codes.new_empty((*codes.shape[:-1], codes.shape[-1] * Layout.parse(layout).element.packed), dtype=dtype)


@define(
    "dequantize(Tensor codes, Tensor scales, str layout, ScalarType dtype) -> Tensor",
    tokens="codes",
    spec="3.2, 3.4",
    fake=_dequantize_fake,
)
def dequantize(codes: torch.Tensor, scales: torch.Tensor, layout: str, dtype: torch.dtype) -> torch.Tensor:
    """The values of a pair in `dtype`; of a weight [..., N, K] or an activation [..., K]."""
    return from_layout(codes, scales, Layout.parse(layout), dtype)


def _rows_fake(x: torch.Tensor, rows: str) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], RowLayout.parse(rows).row_bytes), dtype=torch.uint8)


@define("pack_rows(Tensor x, str rows) -> Tensor", tokens="x", spec="4.2", fake=_rows_fake)
def pack_rows(x: torch.Tensor, rows: str) -> torch.Tensor:
    """Cache rows x [N, d] as bytes [N, row bytes]: the record, then its scales; `rows` spells a `RowLayout`."""
    return torch.cat(RowLayout.parse(rows).pack(x), dim=-1)


@lru_cache
def _matrix(n: int, device: torch.device) -> torch.Tensor:
    with torch.inference_mode(False):
        return hadamard_matrix(n).to(device)


@define("hadamard(Tensor x) -> Tensor", tokens="x", spec="2.7", fake=lambda x: x.new_empty(x.shape))
def hadamard(x: torch.Tensor) -> torch.Tensor:
    """The orthonormal Hadamard transform over the last dim (a power of two) in fp32, cast to x's dtype."""
    return (x.float() @ _matrix(x.shape[-1], x.device)).to(x.dtype)
