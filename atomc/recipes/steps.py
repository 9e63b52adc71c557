"""The steps of a weight recipe, as data that a manifest can hold.

A recipe is a tree of frozen structs over checkpoint names; it serialises to JSON and is evaluated once, streaming,
when an artifact is written. A name may contain `{prefix}`: one recipe then serves every layer of a kind, and
`instantiate` gives the recipe of one layer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Final, Literal, NamedTuple, TypeAlias, assert_never

import msgspec
import torch

from atomc.errors import RecipeError

PREFIX: Final = "{prefix}"

DType: TypeAlias = Literal[
    "float32", "bfloat16", "float16", "int64", "int32", "int8", "uint8", "float8_e4m3fn", "float8_e4m3fnuz",
    "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu",
]  # fmt: skip
Part: TypeAlias = Literal["codes", "scales"]
Method: TypeAlias = Literal["amax", "mse"]


class TensorSpec(NamedTuple):
    """Shape and dtype of a tensor that need not exist yet."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class _Step(msgspec.Struct, frozen=True, tag_field="op", tag=str.lower, forbid_unknown_fields=True):
    """A node of a recipe."""


class Load(_Step, frozen=True):
    """A checkpoint tensor as it is stored."""

    name: str


class Dequantize(_Step, frozen=True):
    """A quantised weight and its scales as `dtype`; exact in float32 and bfloat16 where scales are powers of two."""

    weight: Recipe
    scale: Recipe
    layout: str
    dtype: DType = "float32"


class Quantize(_Step, frozen=True):
    """One part of the source quantised to `layout`; `method` chooses the scales (`atomc.formats.choice`).

    `importance`: [K] float32 weights of the input channels, mean squares of what enters the layer; None: all alike.
    """

    source: Recipe
    layout: str
    part: Part
    method: Method = "amax"
    importance: Recipe | None = None


class Convert(_Step, frozen=True):
    """One part of a quantised weight in another layout that holds the same numbers; an error where it does not.

    `to`: `fp8_tile`, from MXFP4; `fnuz`, from OCP e4m3 with any scales.
    """

    weight: Recipe
    scale: Recipe
    to: Literal["fp8_tile", "fnuz"]
    part: Part


class Repeat(_Step, frozen=True):
    """Each row of dim 0 `times` times, and of all of these the first `length`."""

    source: Recipe
    times: int
    length: int


class Cast(_Step, frozen=True):
    """The source converted to `dtype`."""

    source: Recipe
    dtype: DType


class Concat(_Step, frozen=True):
    """The parts joined along an existing dimension."""

    parts: tuple[Recipe, ...]
    dim: int


class Stack(_Step, frozen=True):
    """Parts of one shape joined along a new dimension. Only one part at a time is held beside the result."""

    parts: tuple[Recipe, ...]
    dim: int = 0


class Reshape(_Step, frozen=True):
    """The source in row-major order under another shape; one -1 is inferred."""

    source: Recipe
    shape: tuple[int, ...]


class Permute(_Step, frozen=True):
    """Dimension d of the result is dimension `dims[d]` of the source."""

    source: Recipe
    dims: tuple[int, ...]


class Slice(_Step, frozen=True):
    """Rows `start` .. `stop` (0-based, end excluded, not negative) of dimension `dim`."""

    source: Recipe
    dim: int
    start: int
    stop: int


class Constant(_Step, frozen=True):
    """Literal values in row-major order; a single value fills the shape."""

    values: tuple[int | float, ...]
    shape: tuple[int, ...]
    dtype: DType


Recipe: TypeAlias = (
    Load | Dequantize | Quantize | Convert | Repeat | Cast | Concat | Stack | Reshape | Permute | Slice | Constant
)


def to_json(recipe: Recipe) -> bytes:
    """The recipe as JSON; equal recipes give equal bytes."""
    return msgspec.json.encode(recipe)


def from_json(data: bytes | str) -> Recipe:
    """The recipe in `to_json`'s JSON. Raises `RecipeError` that says where the text is not a recipe."""
    try:
        recipe: Recipe = msgspec.json.decode(data, type=Recipe)
    except msgspec.DecodeError as error:
        raise RecipeError(f"not a weight recipe: {error}") from error
    return recipe


def children(recipe: Recipe) -> tuple[Recipe, ...]:
    """The recipes a step reads, in order."""
    match recipe:
        case Load() | Constant():
            return ()
        case Dequantize(weight=weight, scale=scale) | Convert(weight=weight, scale=scale):
            return (weight, scale)
        case Concat(parts=parts) | Stack(parts=parts):
            return parts
        case Quantize(source=source, importance=importance):
            return (source,) if importance is None else (source, importance)
        case Cast(source=source) | Reshape(source=source) | Permute(source=source) | Slice(source=source):
            return (source,)
        case Repeat(source=source):
            return (source,)
        case _:
            assert_never(recipe)


def _loads(recipe: Recipe) -> Iterator[str]:
    if isinstance(recipe, Load):
        yield recipe.name
    for child in children(recipe):
        yield from _loads(child)


def sources(recipe: Recipe) -> list[str]:
    """Names of the checkpoint tensors the recipe reads, each once, in order of use."""
    return list(dict.fromkeys(_loads(recipe)))


def instantiate(recipe: Recipe, prefix: str) -> Recipe:
    """The recipe with `{prefix}` replaced in every name, e.g. by `layers.3.`."""
    match recipe:
        case Load(name=name):
            return Load(name.replace(PREFIX, prefix))
        case Constant():
            return recipe
        case Dequantize(weight=weight, scale=scale) | Convert(weight=weight, scale=scale):
            weight, scale = instantiate(weight, prefix), instantiate(scale, prefix)
            return msgspec.structs.replace(recipe, weight=weight, scale=scale)
        case Concat(parts=parts) | Stack(parts=parts):
            return msgspec.structs.replace(recipe, parts=tuple(instantiate(part, prefix) for part in parts))
        case Quantize(source=source, importance=importance):
            weigh = None if importance is None else instantiate(importance, prefix)
            return msgspec.structs.replace(recipe, source=instantiate(source, prefix), importance=weigh)
        case Cast(source=source) | Reshape(source=source) | Permute(source=source) | Slice(source=source):
            return msgspec.structs.replace(recipe, source=instantiate(source, prefix))
        case Repeat(source=source):
            return msgspec.structs.replace(recipe, source=instantiate(source, prefix))
        case _:
            assert_never(recipe)


def torch_dtype(name: DType) -> torch.dtype:
    """`torch.float32` for "float32", and so on."""
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype
