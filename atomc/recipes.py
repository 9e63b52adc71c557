"""Declarative weight changes: how a parameter is made from checkpoint tensors, as data that a manifest can hold.

A recipe is a tree of frozen structs over checkpoint names; it serialises to JSON and is evaluated once, streaming,
when an artifact is written. A name may contain `{prefix}`: one recipe then serves every layer of a kind, and
`instantiate` gives the recipe of one layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Final, Literal, NamedTuple, TypeAlias, assert_never

import msgspec
import torch
from torch import Tensor

from atomc.errors import RecipeError
from atomc.ops.formats import GROUP, TILE, dequantize_fp4, dequantize_fp8_block

PREFIX: Final = "{prefix}"

Format: TypeAlias = Literal["fp8_block128", "fp4_group32"]
DType: TypeAlias = Literal[
    "float32", "bfloat16", "float16", "int64", "int32", "int8", "uint8", "float8_e4m3fn", "float8_e8m0fnu"
]


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
    """A quantised weight and its scales (spec 3.2) as `dtype`; both formats are exact in float32 and bfloat16."""

    weight: Recipe
    scale: Recipe
    format: Format
    dtype: DType = "float32"


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


Recipe: TypeAlias = Load | Dequantize | Cast | Concat | Stack | Reshape | Permute | Slice | Constant


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


def _children(recipe: Recipe) -> tuple[Recipe, ...]:
    match recipe:
        case Load() | Constant():
            return ()
        case Dequantize(weight=weight, scale=scale):
            return (weight, scale)
        case Concat(parts=parts) | Stack(parts=parts):
            return parts
        case Cast(source=source) | Reshape(source=source) | Permute(source=source) | Slice(source=source):
            return (source,)
        case _:
            assert_never(recipe)


def _loads(recipe: Recipe) -> Iterator[str]:
    if isinstance(recipe, Load):
        yield recipe.name
    for child in _children(recipe):
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
        case Dequantize(weight=weight, scale=scale):
            weight, scale = instantiate(weight, prefix), instantiate(scale, prefix)
            return msgspec.structs.replace(recipe, weight=weight, scale=scale)
        case Concat(parts=parts) | Stack(parts=parts):
            return msgspec.structs.replace(recipe, parts=tuple(instantiate(part, prefix) for part in parts))
        case Cast(source=source) | Reshape(source=source) | Permute(source=source) | Slice(source=source):
            return msgspec.structs.replace(recipe, source=instantiate(source, prefix))
        case _:
            assert_never(recipe)


def torch_dtype(name: DType) -> torch.dtype:
    """`torch.float32` for "float32", and so on."""
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def evaluate(recipe: Recipe, load: Callable[[str], Tensor]) -> Tensor:
    """The tensor a recipe describes, contiguous. `load` gives a checkpoint tensor by name.

    Streaming: beside the result it holds the inputs of one step; a `Stack` holds one part. Raises `RecipeError` if a
    name still has its `{prefix}`, a source is missing (`load` raises KeyError), or a step does not fit its inputs.
    """
    return _evaluate(recipe, load).contiguous()


def _evaluate(recipe: Recipe, load: Callable[[str], Tensor]) -> Tensor:
    match recipe:
        case Load(name=name):
            return _load(name, load)
        case Stack():
            return _stack(recipe, load)
        case _:
            inputs = [_evaluate(child, load) for child in _children(recipe)]
            try:
                return _apply(recipe, inputs)
            except (RuntimeError, ValueError, IndexError) as error:
                raise _misfit(recipe, [tuple(t.shape) for t in inputs], str(error)) from error


def _load(name: str, load: Callable[[str], Tensor]) -> Tensor:
    if PREFIX in name:
        raise RecipeError(f"recipe source {name!r} has no prefix yet; call instantiate(recipe, prefix=...) first")
    try:
        return load(name)
    except KeyError as error:
        raise RecipeError(f"recipe source {name!r} is not in the checkpoint") from error


def _stack(recipe: Stack, load: Callable[[str], Tensor]) -> Tensor:
    out: Tensor | None = None
    for index, part_recipe in enumerate(recipe.parts):
        part = _evaluate(part_recipe, load)
        if out is None:
            out = _stacked_like(part, recipe)
        slot = out.select(recipe.dim, index)
        if part.shape != slot.shape or part.dtype != out.dtype:
            raise _misfit(recipe, [tuple(slot.shape), tuple(part.shape)], f"part {index} differs from the first")
        slot.copy_(part)
        del part  # before the next one is read
    if out is None:
        raise RecipeError("recipe step Stack has no parts")
    return out


def _stacked_like(part: Tensor, recipe: Stack) -> Tensor:
    """Room for all parts, so that they need not be held together."""
    if not -part.dim() - 1 <= recipe.dim <= part.dim():
        raise _misfit(recipe, [tuple(part.shape)], f"dimension {recipe.dim} is out of range")
    at = recipe.dim % (part.dim() + 1)
    return torch.empty([*part.shape[:at], len(recipe.parts), *part.shape[at:]], dtype=part.dtype)


def _apply(recipe: Recipe, inputs: list[Tensor]) -> Tensor:
    """One step other than Load and Stack on its evaluated inputs."""
    match recipe:
        case Dequantize(format="fp8_block128", dtype=dtype):
            return dequantize_fp8_block(inputs[0], inputs[1], torch_dtype(dtype))
        case Dequantize(dtype=dtype):
            return dequantize_fp4(inputs[0], inputs[1], torch_dtype(dtype))
        case Cast(dtype=dtype):
            return inputs[0].to(torch_dtype(dtype))
        case Concat(dim=dim):
            if len({part.dtype for part in inputs}) != 1:
                raise ValueError(f"parts have dtypes {[str(part.dtype) for part in inputs]}")
            return torch.cat(inputs, dim)
        case Reshape(shape=shape):
            return inputs[0].reshape(shape)
        case Permute(dims=dims):
            return inputs[0].permute(dims)
        case Slice(dim=dim, start=start, stop=stop):
            if not 0 <= start <= stop <= inputs[0].shape[dim]:
                raise ValueError(f"rows {start}:{stop} are not inside dimension {dim}")
            return inputs[0].narrow(dim, start, stop - start)
        case Constant(values=values, shape=shape, dtype=dtype):
            literal = torch.tensor(values, dtype=torch_dtype(dtype))
            return literal.expand(shape) if len(values) == 1 else literal.reshape(shape)
        case Load() | Stack():
            raise AssertionError(f"{type(recipe).__name__} is evaluated on its own")
        case _:
            assert_never(recipe)


def _misfit(recipe: Recipe, shapes: list[tuple[int, ...]], why: str) -> RecipeError:
    names = sources(recipe)
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return RecipeError(f"recipe step {type(recipe).__name__} over {shown or 'no source'} does not fit {shapes}: {why}")


def output_spec(recipe: Recipe, spec_of: Callable[[str], TensorSpec]) -> TensorSpec:
    """Shape and dtype `evaluate` would give, from those of the sources, without reading any data.

    Raises `RecipeError` as `evaluate` does.
    """

    def load(name: str) -> Tensor:
        spec = spec_of(name)
        return torch.empty(spec.shape, dtype=spec.dtype, device="meta")

    result = _abstract(recipe, load)
    return TensorSpec(tuple(result.shape), result.dtype)


def _abstract(recipe: Recipe, load: Callable[[str], Tensor]) -> Tensor:
    """The result as a meta tensor: shapes only."""
    if isinstance(recipe, Load):
        return _load(recipe.name, load)
    inputs = [_abstract(child, load) for child in _children(recipe)]
    try:
        if isinstance(recipe, Stack):
            if len({(part.shape, part.dtype) for part in inputs}) != 1:
                raise ValueError("parts differ in shape or dtype")
            return torch.stack(inputs, recipe.dim)
        if isinstance(recipe, Dequantize):
            shape = _dequantized_shape(recipe.format, *(tuple(part.shape) for part in inputs))
            return torch.empty(shape, dtype=torch_dtype(recipe.dtype), device="meta")
        return _apply(recipe, inputs).to("meta")
    except (RuntimeError, ValueError, IndexError) as error:
        raise _misfit(recipe, [tuple(part.shape) for part in inputs], str(error)) from error


def _dequantized_shape(format_: Format, weight: tuple[int, ...], scale: tuple[int, ...]) -> tuple[int, ...]:
    if format_ == "fp8_block128":
        expected = (*weight[:-2], -(-weight[-2] // TILE), -(-weight[-1] // TILE))
        shape = weight
    else:
        shape = (*weight[:-1], 2 * weight[-1])
        expected = (*weight[:-1], shape[-1] // GROUP)
    if scale != expected:
        raise ValueError(f"scales {scale} where {expected} are needed")
    return shape
