"""Recipes of a quantised weight: the codes and the scales of what a dense recipe describes, in a wanted layout.

Contract: where the checkpoint stores the weight in that layout, its bytes are taken as they are; where an exact
conversion exists (FP4 into FP8 tiles, OCP into FNUZ), that; else the dense values are quantised.

Terms:
    leaf    a dense recipe of one checkpoint tensor: `Dequantize` of a stored pair, or a plain `Load`, cast or not.
    tree    how leaves make a parameter: experts stacked, projections concatenated along their rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Final, Literal

import msgspec
import torch

from atomc.errors import RecipeError
from atomc.formats import FP8_TILE, MXFP4, Layout
from atomc.recipes.steps import (
    Cast,
    Concat,
    Convert,
    Dequantize,
    Load,
    Method,
    Quantize,
    Recipe,
    Repeat,
    Stack,
    TensorSpec,
    children,
    sources,
    torch_dtype,
)

SpecOf = Callable[[Recipe], TensorSpec]
# How the pair comes from what is stored: its very bytes, the same numbers in another layout, or rounded anew.
Origin = Literal["stored", "exact", "quantized"]
_WORSE: Final[tuple[Origin, ...]] = ("stored", "exact", "quantized")


@dataclass(frozen=True)
class Pair:
    """Recipes of codes and scales, the layout they have, and how they come from the checkpoint."""

    codes: Recipe
    scales: Recipe
    layout: Layout
    origin: Origin


@dataclass(frozen=True)
class Choice:
    """How scales are chosen where values are quantised: `importance` gives a leaf's input channels their weights."""

    method: Method = "amax"
    importance: Callable[[str], Recipe | None] = lambda _: None


def stored_layout(recipe: Recipe) -> Layout | None:
    """The layout in which the checkpoint stores all leaves; None where one is plain, or where they differ."""
    match recipe:
        case Dequantize(layout=layout):
            return Layout.parse(layout)
        case Stack(parts=parts) | Concat(parts=parts, dim=0):
            found = {stored_layout(part) for part in parts}
            return found.pop() if len(found) == 1 else None
    return None


def pair_of(recipe: Recipe, layout: Layout, spec_of: SpecOf, choice: Choice | None = None) -> Pair:
    """Codes and scales of a dense weight in `layout`; its blocks may come out with fewer rows, where tiles are cut.

    Args:
        spec_of: shape and dtype of a recipe's result.
    Raises:
        RecipeError: the recipe is not made of leaves by stacking and concatenating rows.
    """
    match recipe:
        case Dequantize() | Load() | Cast(source=Load()):
            return _leaf(recipe, layout, choice or Choice())
        case Stack(parts=parts, dim=0):
            pairs = [pair_of(part, layout, spec_of, choice) for part in parts]
            codes, scales = tuple(p.codes for p in pairs), tuple(p.scales for p in pairs)
            return replace(pairs[0], codes=Stack(codes), scales=Stack(scales), origin=_worst(p.origin for p in pairs))
        case Concat(parts=parts, dim=0):
            return _concat(
                [pair_of(part, layout, spec_of, choice) for part in parts], [spec_of(p).shape[0] for p in parts]
            )
    raise RecipeError(f"a weight made by {type(recipe).__name__} of {', '.join(sources(recipe)[:3])} cannot be packed")


def _leaf(recipe: Dequantize | Load | Cast, layout: Layout, choice: Choice) -> Pair:
    if isinstance(recipe, Dequantize):
        stored, pair = Layout.parse(recipe.layout), (recipe.weight, recipe.scale)
        if stored == layout:
            return Pair(*pair, layout, "stored")
        if stored == MXFP4 and layout == FP8_TILE:
            return Pair(Convert(*pair, "fp8_tile", "codes"), Convert(*pair, "fp8_tile", "scales"), layout, "exact")
        if stored.fnuz() == layout:
            return Pair(Convert(*pair, "fnuz", "codes"), Convert(*pair, "fnuz", "scales"), layout, "exact")
        if stored == MXFP4 and layout == FP8_TILE.fnuz():
            wide = _leaf(recipe, FP8_TILE, choice)
            pair = (wide.codes, wide.scales)
            return Pair(Convert(*pair, "fnuz", "codes"), Convert(*pair, "fnuz", "scales"), layout, "exact")
        dense: Recipe = msgspec.structs.replace(recipe, dtype="float32")
    else:
        dense = recipe.source if isinstance(recipe, Cast) else recipe
    importance = choice.importance(sources(recipe)[0])
    parts = [Quantize(dense, str(layout), part, choice.method, importance) for part in ("codes", "scales")]
    return Pair(parts[0], parts[1], layout, "quantized")


def _concat(pairs: list[Pair], rows: list[int]) -> Pair:
    """Rows joined. Where a part's rows do not fill its last tile, tiles are cut to what divides all parts."""
    layout = pairs[0].layout
    height = layout.rows
    cut = height if all(n % height == 0 for n in rows[:-1]) else math.gcd(height, *rows)
    scales = tuple(
        pair.scales if cut == height else Repeat(pair.scales, height // cut, n // cut)
        for pair, n in zip(pairs, rows, strict=True)
    )
    codes = tuple(pair.codes for pair in pairs)
    return Pair(Concat(codes, 0), Concat(scales, 0), replace(layout, rows=cut), _worst(p.origin for p in pairs))


def dense_origin(recipe: Recipe, spec_of: SpecOf) -> Origin:
    """How a weight that is not packed comes from what is stored."""
    match recipe:
        case Cast(source=source, dtype=dtype):
            stored = spec_of(source).dtype
            kept = torch.promote_types(stored, torch_dtype(dtype)) == torch_dtype(dtype)
            return _worst([dense_origin(source, spec_of), "exact" if kept else "quantized"])
        case Dequantize(layout=layout, dtype=dtype):
            # A code has a few bits, and a power of two moves no bit: the product is exact where its range is.
            exact = Layout.parse(layout).scale != "float32" and dtype in ("float32", "bfloat16")
            return "exact" if exact else "quantized"
    return _worst(dense_origin(child, spec_of) for child in children(recipe))


def _worst(origins: Iterable[Origin]) -> Origin:
    return max(origins, key=_WORSE.index, default="stored")


def uncast(recipe: Recipe) -> Recipe:
    """The recipe without the casts at its leaves, where each leaf has one; else the recipe itself."""
    match recipe:
        case Cast(source=source):
            return source
        case Stack(parts=parts) | Concat(parts=parts):
            bare = tuple(uncast(part) for part in parts)
            kept = any(a is b for a, b in zip(bare, parts, strict=True))
            return recipe if kept else msgspec.structs.replace(recipe, parts=bare)
    return recipe
