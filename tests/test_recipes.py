"""Recipes: each step against plain torch, JSON round trips, streaming memory, shapes without data, clear refusals."""

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from atomc.errors import RecipeError
from atomc.formats import FP8_TILE, MXFP4, dequantize, quantize
from atomc.recipes import (
    Cast,
    Concat,
    Constant,
    Dequantize,
    Load,
    Permute,
    Recipe,
    Reshape,
    Slice,
    Stack,
    TensorSpec,
    evaluate,
    from_json,
    instantiate,
    output_spec,
    sources,
    to_json,
)

GENERATOR = torch.Generator().manual_seed(0)
A, B = torch.randn(4, 6, generator=GENERATOR), torch.randn(4, 6, generator=GENERATOR)
FP8, FP8_SCALE = quantize(torch.randn(130, 40, generator=GENERATOR), FP8_TILE)
FP4, FP4_SCALE = quantize(torch.randn(5, 64, generator=GENERATOR), MXFP4)
STORE = {
    "a": A, "b": B, "fp8.weight": FP8, "fp8.scale": FP8_SCALE, "fp4.weight": FP4, "fp4.scale": FP4_SCALE,
    "ids": torch.arange(6),
}  # fmt: skip


def spec_of(name: str) -> TensorSpec:
    return TensorSpec(tuple(STORE[name].shape), STORE[name].dtype)


STEPS: list[tuple[Recipe, Callable[[], Tensor]]] = [
    (Load("a"), lambda: A),
    (Cast(Load("a"), "bfloat16"), lambda: A.bfloat16()),
    (Cast(Load("ids"), "int32"), lambda: torch.arange(6, dtype=torch.int32)),
    (Concat((Load("a"), Load("b")), 0), lambda: torch.cat([A, B])),
    (Concat((Load("a"), Load("b"), Load("a")), -1), lambda: torch.cat([A, B, A], -1)),
    (Stack((Load("a"), Load("b"))), lambda: torch.stack([A, B])),
    (Stack((Load("a"), Load("b")), -1), lambda: torch.stack([A, B], -1)),
    (Stack((Load("a"), Load("b")), 1), lambda: torch.stack([A, B], 1)),
    (Reshape(Load("a"), (2, -1, 3)), lambda: A.reshape(2, 4, 3)),
    (Permute(Reshape(Load("a"), (2, 4, 3)), (2, 0, 1)), lambda: A.reshape(2, 4, 3).permute(2, 0, 1)),
    (Slice(Load("a"), 1, 2, 5), lambda: A[:, 2:5]),
    (Slice(Load("a"), -1, 0, 0), lambda: A[:, :0]),
    (Constant((1.5,), (2, 3), "float32"), lambda: torch.full((2, 3), 1.5)),
    (Constant((1, 2, 3, 4), (2, 2), "int64"), lambda: torch.tensor([[1, 2], [3, 4]])),
    (
        Dequantize(Load("fp8.weight"), Load("fp8.scale"), "e4m3:128x128:e8m0"),
        lambda: dequantize(FP8, FP8_SCALE, FP8_TILE),
    ),
    (
        Dequantize(Load("fp4.weight"), Load("fp4.scale"), "e2m1:1x32:e8m0", "bfloat16"),
        lambda: dequantize(FP4, FP4_SCALE, MXFP4).bfloat16(),
    ),
    (
        Dequantize(Slice(Load("fp4.weight"), 0, 1, 3), Slice(Load("fp4.scale"), 0, 1, 3), "e2m1:1x32:e8m0"),
        lambda: dequantize(FP4, FP4_SCALE, MXFP4)[1:3],
    ),
]


@pytest.mark.parametrize(("recipe", "wanted"), STEPS, ids=[type(recipe).__name__ for recipe, _ in STEPS])
def test_each_step(recipe: Recipe, wanted: Callable[[], Tensor]) -> None:
    found = evaluate(recipe, STORE.__getitem__)
    assert found.dtype == wanted().dtype
    assert torch.equal(found, wanted())
    assert found.is_contiguous()
    assert output_spec(recipe, spec_of) == TensorSpec(tuple(found.shape), found.dtype)
    assert from_json(to_json(recipe)) == recipe


def test_the_json_form_is_what_a_manifest_holds() -> None:
    recipe = Dequantize(Load("{prefix}w.weight"), Load("{prefix}w.scale"), "e4m3:128x128:e8m0")
    assert to_json(recipe) == (
        b'{"op":"dequantize","weight":{"op":"load","name":"{prefix}w.weight"},'
        b'"scale":{"op":"load","name":"{prefix}w.scale"},"layout":"e4m3:128x128:e8m0","dtype":"float32"}'
    )


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"op":"exec"}',
        '{"op":"load"}',
        '{"op":"load","name":3}',
        '{"op":"load","name":"a","extra":1}',
        '{"op":"cast","source":{"op":"load","name":"a"},"dtype":"float31"}',
    ],
)
def test_what_is_no_recipe_is_refused(text: str) -> None:
    with pytest.raises(RecipeError, match="not a weight recipe"):
        from_json(text)


def test_instantiate_fills_the_prefix_everywhere() -> None:
    inner = Concat((Load("{prefix}x"), Cast(Load("{prefix}y"), "float32"), Constant((0,), (1,), "float32")), 0)
    weight, scale = Reshape(Load("{prefix}w"), (1,)), Slice(Permute(Load("{prefix}s"), (0,)), 0, 0, 1)
    recipe = Stack((inner, Dequantize(weight, scale, "e2m1:1x32:e8m0")))
    assert sources(recipe) == ["{prefix}x", "{prefix}y", "{prefix}w", "{prefix}s"]
    done = instantiate(recipe, "layers.3.")
    assert sources(done) == ["layers.3.x", "layers.3.y", "layers.3.w", "layers.3.s"]
    assert instantiate(done, "other.") == done


def test_sources_are_listed_once() -> None:
    assert sources(Concat((Load("b"), Load("a"), Load("b")), 0)) == ["b", "a"]


@pytest.mark.parametrize(
    ("recipe", "match"),
    [
        (Load("{prefix}a"), "has no prefix yet"),
        (Cast(Load("nothing"), "float32"), "'nothing' is not in the checkpoint"),
        (Concat((Load("a"), Load("ids")), 0), "Concat over a, ids does not fit"),
        (Concat((Load("a"), Cast(Load("a"), "bfloat16")), 0), "dtypes"),
        (Concat((), 0), "Concat over no source"),
        (Stack((Load("a"), Slice(Load("b"), 0, 0, 2))), "part 1 differs from the first|differ in shape"),
        (Stack((Load("a"), Cast(Load("b"), "bfloat16"))), "part 1 differs from the first|differ in shape"),
        (Stack((Load("a"), Load("b")), 3), "Stack over a, b does not fit"),
        (Reshape(Load("a"), (5, 5)), "Reshape over a does not fit"),
        (Permute(Load("a"), (0,)), "Permute over a does not fit"),
        (Slice(Load("a"), 0, 2, 5), "rows 2:5 are not inside"),
        (Slice(Load("a"), 0, -1, 2), "rows -1:2 are not inside"),
        (Slice(Load("a"), 2, 0, 1), "Slice over a does not fit"),
        (Constant((1, 2), (3,), "float32"), "Constant over no source"),
        (
            Dequantize(Load("fp8.weight"), Load("fp4.scale"), "e4m3:128x128:e8m0"),
            "Dequantize over fp8.weight, fp4.scale",
        ),
        (Dequantize(Load("fp4.weight"), Load("fp8.scale"), "e2m1:1x32:e8m0"), "Dequantize over fp4.weight, fp8.scale"),
    ],
)
def test_a_step_that_does_not_fit_names_itself_and_its_sources(recipe: Recipe, match: str) -> None:
    with pytest.raises(RecipeError, match=match):
        evaluate(recipe, STORE.__getitem__)
    with pytest.raises(RecipeError, match=match):
        output_spec(recipe, spec_of)


def test_a_stack_holds_one_part_at_a_time() -> None:
    given_out: list[weakref.ref[Tensor]] = []

    def load(name: str) -> Tensor:
        assert not any(part() is not None for part in given_out), "an earlier part is still held"
        part = torch.full((2, 2), float(name))
        given_out.append(weakref.ref(part))
        return part

    result = evaluate(Stack(tuple(Cast(Load(str(i)), "float32") for i in range(6))), load)
    assert result[:, 0, 0].tolist() == [0, 1, 2, 3, 4, 5]
    assert len(given_out) == 6


names = st.sampled_from(["a", "b", "{prefix}c"])
dtypes = st.sampled_from(["float32", "bfloat16", "int8", "float8_e4m3fn"])
dims = st.integers(-3, 3)


def grow(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    parts = st.lists(inner, max_size=3).map(tuple)
    shape = st.lists(st.integers(-1, 9), max_size=3).map(tuple)
    return st.one_of(
        st.builds(Cast, inner, dtypes),
        st.builds(Concat, parts, dims),
        st.builds(Stack, parts, dims),
        st.builds(Reshape, inner, shape),
        st.builds(Permute, inner, shape),
        st.builds(Slice, inner, dims, dims, dims),
        st.builds(Dequantize, inner, inner, st.sampled_from(["e4m3:128x128:e8m0", "e2m1:1x32:e8m0"]), dtypes),
    )


constants = st.builds(Constant, st.lists(st.integers() | st.floats(-9, 9), max_size=3).map(tuple), st.just(()), dtypes)
recipes = st.recursive(st.builds(Load, names) | constants, grow, max_leaves=8)


@given(recipes)
def test_any_recipe_survives_json_and_fails_only_as_a_recipe_error(recipe: Recipe) -> None:
    assert to_json(from_json(to_json(recipe))) == to_json(recipe)
    outcomes: list[tuple[tuple[int, ...], torch.dtype] | None] = []
    for run in (lambda: evaluate(recipe, STORE.__getitem__), lambda: output_spec(recipe, spec_of)):
        try:
            result = run()
        except RecipeError:
            outcomes.append(None)
        else:
            outcomes.append((tuple(result.shape), result.dtype))
    assert outcomes[0] == outcomes[1]
