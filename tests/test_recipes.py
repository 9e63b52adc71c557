"""Recipes: each step against plain torch, JSON round trips, streaming memory, shapes without data, clear refusals."""

import sys
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from atomc.errors import RecipeError
from atomc.formats import FP8_CHANNEL, FP8_TILE, MXFP4, Layout, dequantize, expand_mxfp4, quantize, to_fnuz
from atomc.formats.choice import quantize_with
from atomc.recipes import (
    Cast,
    Concat,
    Constant,
    Convert,
    Dequantize,
    Halves,
    Load,
    Method,
    Part,
    Permute,
    Quantize,
    Recipe,
    Repeat,
    Reshape,
    Slice,
    Stack,
    TensorSpec,
    evaluate,
    from_json,
    instantiate,
    output_spec,
    part_of,
    sources,
    to_json,
)
from tests.support.tiny import same_bits

PARTS: tuple[Part, ...] = ("codes", "scales")
GENERATOR = torch.Generator().manual_seed(0)
A, B = torch.randn(4, 6, generator=GENERATOR), torch.randn(4, 6, generator=GENERATOR)
FP8, FP8_SCALE = quantize(torch.randn(130, 40, generator=GENERATOR), FP8_TILE)
FP4, FP4_SCALE = quantize(torch.randn(5, 64, generator=GENERATOR), MXFP4)
STORE = {
    "a": A, "b": B, "fp8.weight": FP8, "fp8.scale": FP8_SCALE, "fp4.weight": FP4, "fp4.scale": FP4_SCALE,
    "ids": torch.arange(6), "dense": torch.randn(130, 64, generator=GENERATOR),
    "importance": torch.rand(64, generator=GENERATOR),
}  # fmt: skip
DENSE, IMPORTANCE = STORE["dense"], STORE["importance"]


def spec_of(name: str) -> TensorSpec:
    return TensorSpec(tuple(STORE[name].shape), STORE[name].dtype)


def quantized(layout: Layout, part: Part, method: Method = "amax", weighted: bool = False) -> Recipe:
    return Quantize(Load("dense"), str(layout), part, method, Load("importance") if weighted else None)


FP8_OF_FP4 = [Convert(Load("fp4.weight"), Load("fp4.scale"), "fp8_tile", part) for part in PARTS]
FNUZ_OF_FP8 = [Convert(Load("fp8.weight"), Load("fp8.scale"), "fnuz", part) for part in PARTS]
FNUZ_OF_FP4 = [Convert(FP8_OF_FP4[0], FP8_OF_FP4[1], "fnuz", part) for part in PARTS]

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
    *(
        (quantized(layout, part), lambda at=at, layout=layout: quantize(DENSE, layout)[at])
        for layout in (MXFP4, FP8_TILE, FP8_CHANNEL, FP8_TILE.fnuz(), Layout.parse("e5m2fnuz:1x32:float32"))
        for at, part in enumerate(PARTS)
    ),
    *((quantized(MXFP4, p, "mse"), lambda at=at: quantize_with(DENSE, MXFP4, "mse")[at]) for at, p in enumerate(PARTS)),
    *(
        (quantized(MXFP4, p, "mse", True), lambda at=at: quantize_with(DENSE, MXFP4, "mse", IMPORTANCE)[at])
        for at, p in enumerate(PARTS)
    ),
    *((recipe, lambda at=at: expand_mxfp4(FP4, FP4_SCALE)[at]) for at, recipe in enumerate(FP8_OF_FP4)),
    *((recipe, lambda at=at: to_fnuz(FP8, FP8_SCALE)[at]) for at, recipe in enumerate(FNUZ_OF_FP8)),
    *((recipe, lambda at=at: to_fnuz(*expand_mxfp4(FP4, FP4_SCALE))[at]) for at, recipe in enumerate(FNUZ_OF_FP4)),
    (
        Dequantize(FNUZ_OF_FP8[0], FNUZ_OF_FP8[1], str(FP8_TILE.fnuz())),
        lambda: dequantize(FP8, FP8_SCALE, FP8_TILE),
    ),
    (Repeat(Load("a"), 3, 12), lambda: A[[0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]]),
    (Repeat(Load("a"), 3, 10), lambda: A[[0, 0, 0, 1, 1, 1, 2, 2, 2, 3]]),
    (Repeat(Load("fp8.scale"), 16, 20), lambda: FP8_SCALE.view(torch.uint8)[[0] * 16 + [1] * 4].view(FP8_SCALE.dtype)),
    (Cast(Load("a"), "float8_e4m3fnuz"), lambda: A.to(torch.float8_e4m3fnuz)),
    (Cast(Load("a"), "float8_e5m2fnuz"), lambda: A.to(torch.float8_e5m2fnuz)),
]


@pytest.mark.parametrize(("recipe", "wanted"), STEPS, ids=[type(recipe).__name__ for recipe, _ in STEPS])
def test_each_step(recipe: Recipe, wanted: Callable[[], Tensor]) -> None:
    found = evaluate(recipe, STORE.__getitem__)
    assert found.dtype == wanted().dtype
    assert found.shape == wanted().shape
    assert same_bits(found, wanted())
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
        (
            Dequantize(Load("fp8.weight"), Load("fp8.scale"), str(FP8_TILE.fnuz())),
            "are float8_e4m3fnuz, not float8_e4m3fn",
        ),
        (Quantize(Slice(Load("dense"), 1, 0, 63), str(MXFP4), "codes"), "63 columns cannot be packed in pairs"),
        (Quantize(Slice(Load("dense"), 1, 0, 63), str(MXFP4), "scales"), "63 columns cannot be packed in pairs"),
        (Quantize(Load("ids"), str(FP8_TILE), "codes"), "Quantize over ids does not fit"),
        (
            Quantize(Load("a"), str(MXFP4), "codes", "mse", Load("importance")),
            r"importance of shape \(64,\) for 6 columns",
        ),
        (Quantize(Load("dense"), str(MXFP4), "codes", "amax", Load("importance")), "no use for importance"),
        (Convert(Load("fp8.weight"), Load("fp8.scale"), "fp8_tile", "codes"), "has int8 codes and float8_e8m0fnu"),
        (Convert(Load("fp4.weight"), Load("fp8.scale"), "fp8_tile", "scales"), "need whole groups and scales"),
        (Convert(Load("fp4.weight"), Load("fp4.scale"), "fnuz", "codes"), "codes of e4m3 are float8_e4m3fn, not int8"),
        (Convert(Load("fp8.weight"), Load("ids"), "fnuz", "scales"), "float8_e8m0fnu, float32 or bfloat16, not int64"),
        (Repeat(Load("a"), 3, 9), "9 rows are not what 12 are cut to"),
        (Repeat(Load("a"), 3, 13), "13 rows are not what 12 are cut to"),
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


def counted(monkeypatch: pytest.MonkeyPatch, name: str) -> list[tuple[int, ...]]:
    """Shapes of what a conversion is given, one for each call."""
    seen: list[tuple[int, ...]] = []
    module = sys.modules["atomc.recipes.evaluate"]
    real = getattr(module, name)

    def convert(x: Tensor, *rest: Any) -> Any:
        seen.append(tuple(x.shape))
        return real(x, *rest)

    monkeypatch.setattr(module, name, convert)
    return seen


@pytest.mark.parametrize("order", [PARTS, PARTS[::-1]], ids="-".join)
def test_a_pair_is_made_once(monkeypatch: pytest.MonkeyPatch, order: tuple[Part, ...]) -> None:
    """Of stacked experts: all codes come before all scales, or the other way round."""
    seen = counted(monkeypatch, "quantize_with")
    loads: list[str] = []
    parts = {p: [Quantize(Load(str(e)), str(MXFP4), p, "mse") for e in range(4)] for p in PARTS}
    recipes = [Stack(tuple(parts[part])) for part in order]

    def load(name: str) -> Tensor:
        loads.append(name)
        return DENSE[: 1 + int(name)][:1] * (1 + int(name))

    halves = Halves(recipes)
    found = [evaluate(recipe, load, halves) for recipe in recipes]
    assert (len(seen), loads) == (4, ["0", "1", "2", "3"])
    for recipe, tensor in zip(recipes, found, strict=True):
        assert same_bits(tensor, evaluate(recipe, load))


def test_a_chain_of_conversions_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = counted(monkeypatch, "expand_mxfp4"), counted(monkeypatch, "to_fnuz")
    halves = Halves(FNUZ_OF_FP4)
    found = tuple(evaluate(recipe, STORE.__getitem__, halves) for recipe in FNUZ_OF_FP4)
    assert [len(calls) for calls in seen] == [1, 1]
    assert all(same_bits(a, b) for a, b in zip(found, to_fnuz(*expand_mxfp4(FP4, FP4_SCALE)), strict=True))
    evaluate(FNUZ_OF_FP4[0], STORE.__getitem__)  # alone: its two inputs are one pair
    assert [len(calls) for calls in seen] == [2, 2]


def test_a_half_that_does_not_fit_or_that_nobody_asks_for_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = counted(monkeypatch, "quantize_with")
    codes, scales = (quantized(MXFP4, part) for part in PARTS)
    size = evaluate(scales, STORE.__getitem__).nbytes
    pair = [codes, scales]
    for wanted, most, asked, made in (
        (pair, size, pair, 1),
        (pair, size - 1, pair, 2),
        ([codes], size, pair, 2),
        ([*pair, *pair], size, [*pair, *pair], 2),  # what was taken leaves its room
        ([*pair, *pair], size, [codes, codes, scales, scales], 3),
    ):
        seen.clear()
        halves = Halves(wanted, most)
        for recipe in asked:
            evaluate(recipe, STORE.__getitem__, halves)
        assert len(seen) == made, (wanted, most)


names = st.sampled_from(["a", "b", "{prefix}c", "fp8.weight", "fp8.scale", "fp4.weight", "fp4.scale"])
dtypes = st.sampled_from(["float32", "bfloat16", "int8", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2fnuz"])
layouts = st.sampled_from([str(x) for x in (FP8_TILE, FP8_TILE.fnuz(), MXFP4, FP8_CHANNEL)])
parts_of_a_pair = st.sampled_from(PARTS)
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
        st.builds(Dequantize, inner, inner, layouts, dtypes),
        st.builds(Quantize, inner, layouts, parts_of_a_pair, st.sampled_from(["amax", "mse"]), st.none() | inner),
        st.builds(Convert, inner, inner, st.sampled_from(["fp8_tile", "fnuz"]), parts_of_a_pair),
        st.builds(Repeat, inner, st.integers(0, 3), st.integers(0, 12)),
        st.sampled_from([*FP8_OF_FP4, *FNUZ_OF_FP8, *FNUZ_OF_FP4, quantized(MXFP4, "codes")]),
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


# -- parts -------------------------------------------------------------------------------------------------------------

_PARTS = {f"e{i}.w{k}": torch.randn(8, 6) for i in range(4) for k in (1, 3)}
_STACKED = Stack(tuple(Concat((Load(f"e{i}.w1"), Cast(Load(f"e{i}.w3"), "float32")), 0) for i in range(4)))


def _part_spec(recipe: Recipe) -> TensorSpec:
    return output_spec(recipe, lambda name: TensorSpec(tuple(_PARTS[name].shape), _PARTS[name].dtype))


@pytest.mark.parametrize(("dim", "count", "parts"), [(0, 2, 1), (0, 4, 1), (1, 2, 2), (1, 8, 1), (1, 4, 2), (2, 3, 1)])
def test_parts_are_those_of_the_whole(dim: int, count: int, parts: int) -> None:
    whole = evaluate(_STACKED, _PARTS.__getitem__)
    runs = whole.chunk(parts, dim)
    for index in range(count):
        recipe = part_of(_STACKED, dim, index, count, _part_spec, parts)
        expected = torch.cat([run.chunk(count, dim)[index] for run in runs], dim)
        assert torch.equal(evaluate(recipe, _PARTS.__getitem__), expected)
        assert _part_spec(recipe).shape == expected.shape
        assert from_json(to_json(recipe)) == recipe


def test_a_part_reads_no_other_experts() -> None:
    assert sources(part_of(_STACKED, 0, 1, 4, _part_spec)) == ["e1.w1", "e1.w3"]
    assert sources(part_of(_STACKED, 1, 0, 2, _part_spec)) == [f"e{i}.w1" for i in range(4)]


def test_a_part_of_a_constant_is_one() -> None:
    numbers = Constant((0, 3, 6), (3,), "int32")
    assert part_of(numbers, 0, 1, 3, _part_spec) == Constant((3,), (1,), "int32")


def test_units_that_parts_do_not_divide_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"dim 2 of e0\.w1, e0\.w3 has 6 units, which 4 parts do not divide"):
        part_of(_STACKED, 2, 0, 4, _part_spec)
