"""Cutting recipes: the recipe of one rank's part of a parameter, reading no more of the checkpoint than that."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from atomc.errors import RecipeError
from atomc.recipes.steps import Cast, Concat, Constant, Recipe, Slice, Stack, TensorSpec, sources


def part_of(
    recipe: Recipe, dim: int, index: int, count: int, spec_of: Callable[[Recipe], TensorSpec], parts: int = 1
) -> Recipe:
    """Part `index` of `count` equal ones along `dim`; of each of `parts` equal runs of the dim, one after the other.

    Raises:
        RecipeError: the dim cannot be cut so. Codes and scales are cut each in its own units, so that a part ends where
            a block does.
    """
    size = spec_of(recipe).shape[dim]
    if size % (parts * count):
        of = ", ".join(sources(recipe)[:2])
        raise RecipeError(
            f"dim {dim} of {of or 'a constant'} has {size} units, which {parts * count} parts do not divide"
        )
    run, width = size // parts, size // parts // count
    pieces = [_cut(recipe, dim, p * run + index * width, p * run + (index + 1) * width, spec_of) for p in range(parts)]
    return pieces[0] if parts == 1 else Concat(tuple(pieces), dim)


def _cut(recipe: Recipe, dim: int, start: int, stop: int, spec_of: Callable[[Recipe], TensorSpec]) -> Recipe:
    """The slice, as near to the checkpoint's tensors as it can be."""
    match recipe:
        case Stack(parts=parts, dim=0):
            if dim == 0:
                return msgspec.structs.replace(recipe, parts=parts[start:stop])
            return msgspec.structs.replace(recipe, parts=tuple(_cut(p, dim - 1, start, stop, spec_of) for p in parts))
        case Concat(parts=parts, dim=along) if along != dim:
            return msgspec.structs.replace(recipe, parts=tuple(_cut(p, dim, start, stop, spec_of) for p in parts))
        case Concat(parts=parts):
            return _of_joined(parts, dim, start, stop, spec_of)
        case Cast(source=source):
            return msgspec.structs.replace(recipe, source=_cut(source, dim, start, stop, spec_of))
        case Constant(values=values, shape=(length,)) if len(values) == length:
            return msgspec.structs.replace(recipe, values=values[start:stop], shape=(stop - start,))
    return Slice(recipe, dim, start, stop)


def _of_joined(
    parts: tuple[Recipe, ...], dim: int, start: int, stop: int, spec_of: Callable[[Recipe], TensorSpec]
) -> Recipe:
    found, at = [], 0
    for part in parts:
        size = spec_of(part).shape[dim]
        low, high = max(start - at, 0), min(stop - at, size)
        if low < high:
            found.append(part if (low, high) == (0, size) else _cut(part, dim, low, high, spec_of))
        at += size
    return found[0] if len(found) == 1 else Concat(tuple(found), dim)
