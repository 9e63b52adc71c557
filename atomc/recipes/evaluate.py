"""Evaluating recipes: the tensor that a recipe describes, or its shape and dtype alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import assert_never

import torch
from torch import Tensor

from atomc.errors import RecipeError
from atomc.formats import FP8_TILE, Layout, dequantize, expand_mxfp4, to_fnuz
from atomc.formats.choice import check_method, quantize_with
from atomc.formats.convert import check_mxfp4, check_ocp
from atomc.formats.layout import check_pair
from atomc.recipes.halves import Half, Halves
from atomc.recipes.steps import (
    PREFIX,
    Cast,
    Concat,
    Constant,
    Convert,
    Dequantize,
    Load,
    Permute,
    Quantize,
    Recipe,
    Repeat,
    Reshape,
    Slice,
    Stack,
    TensorSpec,
    children,
    sources,
    torch_dtype,
)


def evaluate(recipe: Recipe, load: Callable[[str], Tensor], halves: Halves | None = None) -> Tensor:
    """The tensor a recipe describes, contiguous. `load` gives a checkpoint tensor by name.

    Streaming: beside the result it holds the inputs of one step; a `Stack` holds one part. `halves` is for recipes that
    are evaluated one after the other, so that a pair among them is made once. Raises `RecipeError` if a name still has
    its `{prefix}`, a source is missing (`load` raises KeyError), or a step does not fit its inputs.
    """
    return _evaluate(recipe, load, Halves([recipe]) if halves is None else halves).contiguous()


def _evaluate(recipe: Recipe, load: Callable[[str], Tensor], halves: Halves) -> Tensor:
    match recipe:
        case Load(name=name):
            return _load(name, load)
        case Stack():
            return _stack(recipe, load, halves)
        case _:
            half = recipe if isinstance(recipe, Half) else None
            if half is not None and (held := halves.take(half)) is not None:
                return held
            inputs = [_evaluate(child, load, halves) for child in children(recipe)]
            try:
                return _apply(recipe, inputs) if half is None else halves.part(half, _pair(half, inputs))
            except (RuntimeError, ValueError, IndexError) as error:
                raise _misfit(recipe, [tuple(t.shape) for t in inputs], str(error)) from error


def _load(name: str, load: Callable[[str], Tensor]) -> Tensor:
    if PREFIX in name:
        raise RecipeError(f"recipe source {name!r} has no prefix yet; call instantiate(recipe, prefix=...) first")
    try:
        return load(name)
    except KeyError as error:
        raise RecipeError(f"recipe source {name!r} is not in the checkpoint") from error


def _stack(recipe: Stack, load: Callable[[str], Tensor], halves: Halves) -> Tensor:
    out: Tensor | None = None
    for index, part_recipe in enumerate(recipe.parts):
        part = _evaluate(part_recipe, load, halves)
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


def _pair(half: Half, inputs: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Codes and scales."""
    if isinstance(half, Quantize):
        importance = inputs[1] if len(inputs) > 1 else None
        return quantize_with(inputs[0], Layout.parse(half.layout), half.method, importance)
    return (expand_mxfp4 if half.to == "fp8_tile" else to_fnuz)(inputs[0], inputs[1])


def _apply(recipe: Recipe, inputs: list[Tensor]) -> Tensor:
    """One step that gives one tensor, other than Load and Stack, on its evaluated inputs."""
    match recipe:
        case Dequantize(layout=layout, dtype=dtype):
            return dequantize(inputs[0], inputs[1], Layout.parse(layout), torch_dtype(dtype))
        case Repeat(times=times, length=length):
            repeated = inputs[0].repeat_interleave(times, 0)
            if not repeated.shape[0] >= length > repeated.shape[0] - times:
                raise ValueError(f"{length} rows are not what {repeated.shape[0]} are cut to")
            return repeated[:length]
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
        case Load() | Stack() | Quantize() | Convert():
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
    inputs = [_abstract(child, load) for child in children(recipe)]
    try:
        if isinstance(recipe, Stack):
            if len({(part.shape, part.dtype) for part in inputs}) != 1:
                raise ValueError("parts differ in shape or dtype")
            return torch.stack(inputs, recipe.dim)
        if isinstance(recipe, (Dequantize, Quantize, Convert)):
            return _converted(recipe, inputs)
        return _apply(recipe, inputs).to("meta")
    except (RuntimeError, ValueError, IndexError) as error:
        raise _misfit(recipe, [tuple(part.shape) for part in inputs], str(error)) from error


def _converted(recipe: Dequantize | Quantize | Convert, inputs: list[Tensor]) -> Tensor:
    """The result of a change of format, as a meta tensor."""
    if isinstance(recipe, Dequantize):
        shape = check_pair(inputs[0], inputs[1], Layout.parse(recipe.layout))
        return torch.empty(shape, dtype=torch_dtype(recipe.dtype), device="meta")
    if isinstance(recipe, Quantize):
        check_method(inputs[0], recipe.method, inputs[1] if len(inputs) > 1 else None)
        return _part(Layout.parse(recipe.layout), tuple(inputs[0].shape), recipe.part)
    if recipe.to == "fp8_tile":
        check_mxfp4(inputs[0], inputs[1])
        return _part(FP8_TILE, (inputs[0].shape[0], 2 * inputs[0].shape[1]), recipe.part)
    check_ocp(inputs[0], inputs[1])
    return torch.empty_like(inputs[1]) if recipe.part == "scales" else inputs[0].to(torch.float8_e4m3fnuz)


def _part(layout: Layout, shape: tuple[int, ...], part: str) -> Tensor:
    codes = torch.empty(layout.code_shape(shape), dtype=layout.element.storage, device="meta")
    scales = torch.empty(layout.scale_shape(shape), dtype=layout.scale_dtype, device="meta")
    return scales if part == "scales" else codes
