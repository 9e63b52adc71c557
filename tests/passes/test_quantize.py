"""Quantize: which products, weights and caches it rewrites, what it decides, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule

from atomc.formats import FP8_TILE, MXFP4, Layout, RowLayout, quantize
from atomc.passes.cancel_quantize import CancelQuantize
from atomc.passes.canonicalize import Canonicalize
from atomc.passes.graph import PassError
from atomc.passes.quantize import Quantize
from atomc.passes.rotation import index_rotation
from atomc.passes.runner import Context, run_pipeline
from atomc.passes.scheme import SCHEMES, Rule, Scheme
from atomc.recipes import Cast, Concat, Dequantize, Load, Recipe, Stack, dense_origin, evaluate, output_spec, pair_of
from atomc.recipes.steps import TensorSpec
from atomc.targets import get_target
from tests.support.graphs import TOKENS, operators, randn, text, traced

atom = torch.ops.atom
D, N = 128, 256
TILE, FOUR = str(FP8_TILE), str(MXFP4)
CHECKPOINT: dict[str, Tensor] = {}
for _name, _shape, _layout in (
    ("wq_b", (N, D), FP8_TILE), ("wkv", (40, D), FP8_TILE), ("wq_a", (48, D), FP8_TILE), ("wo_a", (64, D), FP8_TILE),
    *((f"e{i}.w{k}", (64, D), MXFP4) for i in range(3) for k in (1, 3)),
    *((f"e{i}.w2", (D, 64), MXFP4) for i in range(3)),
):  # fmt: skip
    _codes, _scales = quantize(torch.randn(_shape, generator=torch.Generator().manual_seed(len(CHECKPOINT))), _layout)
    CHECKPOINT |= {f"{_name}.weight": _codes, f"{_name}.scale": _scales}
CHECKPOINT |= {
    "gate": torch.randn(6, D).bfloat16(),
    "plain": torch.randn(N, D).bfloat16(),
    "wide": torch.randn(N, D),
    "table": torch.arange(9),
}


def stored(name: str, layout: str = TILE) -> Recipe:
    return Dequantize(Load(f"{name}.weight"), Load(f"{name}.scale"), layout)


W13 = Stack(tuple(Concat((stored(f"e{i}.w1", FOUR), stored(f"e{i}.w3", FOUR)), 0) for i in range(3)))
W2 = Stack(tuple(stored(f"e{i}.w2", FOUR) for i in range(3)))


def spec_of(recipe: Recipe) -> TensorSpec:
    return output_spec(recipe, lambda name: TensorSpec(tuple(CHECKPOINT[name].shape), CHECKPOINT[name].dtype))


class Case:
    """A function of activations and weights, its graph, and the pass run on it."""

    def __init__(self, fn: Callable[..., Any], inputs: list[Tensor], weights: dict[str, Recipe]) -> None:
        self.fn, self.inputs, self.recipes = fn, inputs, weights
        self.dense = [evaluate(r, CHECKPOINT.__getitem__) for r in weights.values()]
        self.gm: GraphModule = traced(fn, *inputs, *self.dense)
        names = [n.name for n in self.gm.graph.nodes if n.op == "placeholder"]
        self.ctx = Context("test", spec_of=spec_of)
        for placeholder, (path, recipe) in zip(names[len(inputs) :], weights.items(), strict=True):
            self.ctx.weights[placeholder], self.ctx.module_paths[placeholder] = recipe, path
        self.states = dict(zip(names, ("window", "rows", "index_rows"), strict=False))

    def run(
        self, scheme: Scheme | str, target: str = "cpu", rows: dict[str, str] | None = None, query: str = ""
    ) -> Any:
        known = SCHEMES[scheme] if isinstance(scheme, str) else scheme
        step = Quantize(known, get_target(target), rows or {}, query)
        return run_pipeline((Canonicalize(), step, CancelQuantize()), self.gm, self.ctx)

    def values(self, *inputs: Tensor) -> Any:
        given = {p: evaluate(r, CHECKPOINT.__getitem__) for p, r in self.ctx.weights.items()}
        names = [n.name for n in self.gm.graph.nodes if n.op == "placeholder"]
        return self.gm(
            *(given.get(name, None if name in given else next(it)) for it in [iter(inputs)] for name in names)
        )


def linear_case() -> Case:
    return Case(lambda x, w: F.linear(x, w), [randn(TOKENS, D)], {"attn.wq_b.weight": stored("wq_b")})


def rounded(x: Tensor, layout: str) -> Tensor:
    return atom.dequantize(*atom.quantize(x, layout), layout, x.dtype)


ACT = "e4m3:1x128:e8m0:0.0001"


def test_native_takes_the_bytes_of_the_checkpoint_and_rounds_what_enters() -> None:
    case = linear_case()
    case.run("native")
    assert operators(case.gm) == [
        "atom.dequantize",
        "atom.quantize",
        *["getitem"] * 2,
        "atom.dequantize",
        "aten.linear",
    ]
    assert set(map(str, case.ctx.weights.values())) == {str(Load("wq_b.weight")), str(Load("wq_b.scale"))}
    assert sorted(case.ctx.module_paths.values()) == ["attn.wq_b.scale", "attn.wq_b.weight"]
    x = randn(5, D)
    assert torch.equal(case.values(x), F.linear(rounded(x, ACT), case.dense[0]))
    weight, activation = case.ctx.decisions
    assert (weight.name, weight.layout, weight.bytes, weight.origin) == ("attn.wq_b", TILE, N * D + 2, "stored")
    assert (weight.by, activation.name) == ("native, rule 1", "input of attn.wq_b")
    assert (activation.layout, activation.bytes) == (ACT, D + 1)
    assert "when loaded" in weight.lowering


@pytest.mark.parametrize(
    ("scheme", "layout", "origin"),
    [("native", TILE, "stored"), ("fp8", TILE, "stored"), ("ptpc-fp8", "e4m3:1x*:float32", "quantized")],
)
def test_every_scheme_multiplies_what_its_table_says(scheme: str, layout: str, origin: str) -> None:
    case = linear_case()
    case.run(scheme)
    weight, activation = case.ctx.decisions
    assert (weight.layout, weight.origin) == (layout, origin)
    x = randn(5, D)
    w = case.dense[0] if origin == "stored" else rounded(case.dense[0], layout)
    assert torch.equal(case.values(x), F.linear(rounded(x, activation.layout), w))


def test_none_changes_nothing_and_bf16_stores_bfloat16() -> None:
    case = linear_case()
    before = text(case.gm)
    case.run("none")
    assert text(case.gm) == before
    case = linear_case()
    case.run("bf16")
    assert operators(case.gm) == ["aten.to.dtype", "aten.linear"]
    (recipe,) = case.ctx.weights.values()
    assert spec_of(recipe).dtype == torch.bfloat16
    (weight,) = case.ctx.decisions
    assert (weight.layout, weight.stored, weight.origin) == ("bfloat16", TILE, "exact")
    x = randn(3, D)
    assert torch.equal(case.values(x), F.linear(x, case.dense[0]))  # both formats are exact in bfloat16


def test_a_plain_checkpoint_stays_plain_under_native_and_is_quantised_under_others() -> None:
    for scheme, layout in (("native", "bfloat16"), ("w4a8", TILE), ("fp8", TILE)):
        case = Case(
            lambda x, w: F.linear(x, w), [randn(TOKENS, D)], {"attn.wq_b.weight": Cast(Load("plain"), "float32")}
        )
        case.run(scheme)
        assert case.ctx.decisions[0].layout == layout
        x = randn(3, D)
        w = CHECKPOINT["plain"].float()
        plain = scheme == "native"
        want = (
            F.linear(x, w)
            if plain
            else F.linear(rounded(x, ACT), atom.dequantize(*quantize(w, FP8_TILE), TILE, w.dtype))
        )
        assert torch.equal(case.values(x), want)


def test_the_table_tells_a_cast_that_rounds_from_one_that_does_not() -> None:
    for stored_as, dtype, origin in (("plain", "float32", "exact"), ("wide", "bfloat16", "quantized")):
        recipe = Cast(Load(stored_as), dtype)  # type: ignore[arg-type]
        assert dense_origin(recipe, spec_of) == origin
    assert dense_origin(Load("plain"), spec_of) == "stored"
    assert dense_origin(Stack((Load("plain"), Cast(Load("wide"), "bfloat16"))), spec_of) == "quantized"
    assert dense_origin(Dequantize(Load("a"), Load("b"), "e4m3:1x*:float32"), spec_of) == "quantized"


def test_a_packed_weight_is_as_its_worst_part() -> None:
    parts = (stored("wkv"), Cast(Load("plain"), "float32"))
    assert pair_of(Concat(parts, 0), FP8_TILE, spec_of).origin == "quantized"
    assert pair_of(Concat(parts[::-1], 0), FP8_TILE, spec_of).origin == "quantized"
    assert pair_of(Stack((stored("e0.w2", FOUR), stored("e1.w2", FOUR))), MXFP4, spec_of).origin == "stored"


def test_merged_weights_whose_rows_share_a_tile_get_smaller_tiles() -> None:
    """48 rows of one and 40 of the other: tiles of 8 rows, the same bytes and the same numbers."""
    recipe = Concat((stored("wq_a"), stored("wkv")), 0)
    case = Case(lambda x, w: F.linear(x, w), [randn(TOKENS, D)], {"attn.wq_a|attn.wkv.weight": recipe})
    case.run("native")
    assert case.ctx.decisions[0].layout == "e4m3:8x128:e8m0"
    x = randn(3, D)
    assert torch.equal(case.values(x), F.linear(rounded(x, ACT), case.dense[0]))


def experts(x: Tensor, indices: Tensor, w13: Tensor, w2: Tensor) -> Tensor:
    return atom.grouped_linear(F.silu(atom.grouped_linear(x, w13, indices)[..., :64]), w2, indices)


@pytest.mark.parametrize("scheme", ["native", "fp8", "mxfp4"])
def test_stacked_experts(scheme: str) -> None:
    indices = torch.stack([torch.randperm(3)[:2] for _ in range(TOKENS)])
    weights = {"ffn.experts.w13": W13, "ffn.experts.w2": W2}
    case = Case(experts, [randn(TOKENS, D), indices], weights)
    case.run(scheme)
    rows = {d.name: d for d in case.ctx.decisions}
    layout, origin = {"native": (FOUR, "stored"), "fp8": (TILE, "exact"), "mxfp4": (FOUR, "stored")}[scheme]
    cut = {TILE: "e4m3:64x128:e8m0"}.get(layout, layout)  # w1's 64 rows do not fill a tile
    assert (rows["ffn.experts.w13"].layout, rows["ffn.experts.w13"].origin) == (cut, origin)
    act = rows["input of ffn.experts.w13"].layout
    x = randn(TOKENS, D)
    hidden = F.silu(atom.grouped_linear(rounded(x, act), case.dense[0], indices)[..., :64])
    assert torch.equal(case.values(x, indices), atom.grouped_linear(rounded(hidden, act), case.dense[1], indices))


def grouped(o: Tensor, w: Tensor) -> Tensor:
    z = torch.bmm(o.flatten(-2).unflatten(-1, (4, -1)).transpose(0, 1), w.unflatten(0, (4, -1)).transpose(1, 2))
    return z.transpose(0, 1).flatten(-2)


def test_the_input_of_wo_a_is_rounded_below_its_transposition() -> None:
    case = Case(grouped, [randn(TOKENS, 8, 64)], {"attn.wo_a.weight": stored("wo_a")})
    case.run("native")
    found = operators(case.gm)
    assert found.index("atom.quantize") < found.index("aten.transpose.int", found.index("atom.quantize"))
    o = randn(3, 8, 64)
    assert torch.equal(
        case.values(o),
        grouped(rounded(o.flatten(-2).unflatten(-1, (4, -1)), ACT).flatten(-2).unflatten(-1, (8, -1)), case.dense[0]),
    )


def test_one_rounding_for_all_readers_of_one_layout() -> None:
    def two(x: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return F.linear(x, a), F.linear(x, b)

    weights = {"attn.wq_b.weight": stored("wq_b"), "attn.indexer.wq_b.weight": stored("wkv")}
    case = Case(two, [randn(TOKENS, D)], weights)
    rows = case.run("native")
    assert len(rows[-1].report.matches) == 1
    assert operators(case.gm).count("atom.quantize") == 1


def test_what_is_rounded_already_is_not_rounded_again_where_that_is_exact() -> None:
    def again(x: Tensor) -> tuple[Tensor, ...]:
        y = atom.dequantize(*atom.quantize(x, ACT), ACT, torch.float32)
        return tuple(atom.quantize(y, ACT))

    def moved(x: Tensor) -> tuple[Tensor, ...]:
        layout = "e4m3:1x*:float32"
        y = atom.dequantize(*atom.quantize(x, layout), layout, torch.float32)
        return tuple(atom.quantize(y, layout))

    gm = traced(again, randn(TOKENS, D))
    (_, row) = run_pipeline((Canonicalize(), CancelQuantize()), gm, Context("test"))
    assert [m.module for m in row.report.matches] == [f"already {ACT}"]
    assert operators(gm) == ["atom.quantize", "getitem", "getitem"]
    x = randn(9, D) * torch.logspace(-6, 3, 9)[:, None]
    codes, scales = gm(x)
    values = [atom.dequantize(*pair, ACT, torch.float32) for pair in ((codes, scales), again(x))]
    assert torch.equal(*values)
    gm = traced(moved, randn(TOKENS, D))
    (_, row) = run_pipeline((Canonicalize(), CancelQuantize()), gm, Context("test"))
    assert not row.report.matches and "float32 scales" in row.report.refusals[0].reason


def test_a_top_that_is_no_code_is_rounded_twice() -> None:
    """amax goes to 236, which is no e4m3 value: it may round to 240, and that asks for another scale."""
    layout = "e4m3:1x128:e8m0:max236"

    def again(x: Tensor) -> tuple[Tensor, ...]:
        return tuple(atom.quantize(atom.dequantize(*atom.quantize(x, layout), layout, torch.float32), layout))

    x = torch.full((1, D), 235.0)
    assert not torch.equal(again(x)[1], atom.quantize(x, layout)[1])
    gm = traced(again, randn(TOKENS, D))
    (_, row) = run_pipeline((Canonicalize(), CancelQuantize()), gm, Context("test"))
    assert not row.report.matches and "236 is no value of e4m3" in row.report.refusals[0].reason


def test_a_weight_in_full_is_stored_as_the_checkpoint_has_it() -> None:
    def route(x: Tensor, w: Tensor, table: Tensor) -> Tensor:
        return F.linear(x, w)[:, table[:2].long()]

    weights: dict[str, Recipe] = {
        "ffn.gate.weight": Cast(Load("gate"), "float32"),
        "tid2eid": Cast(Load("table"), "int32"),
    }
    case = Case(route, [randn(TOKENS, D)], weights)
    case.run("native")
    assert {spec_of(r).dtype for r in case.ctx.weights.values()} == {torch.bfloat16, torch.int64}
    assert {d.layout for d in case.ctx.decisions} == {"bfloat16", "int64"}
    x = randn(2, D)
    assert torch.equal(case.values(x), route(x, *case.dense))


# -- caches ------------------------------------------------------------------------------------------------------------

ROWS = str(RowLayout(8, Layout.parse("e4m3:1x4:e8m0:0.0001"), 8))
INDEX, QUERY = "16:e2m1:1x8:e8m0+0", "e2m1:1x8:e8m0"


def index_step(cache: Tensor, row: Tensor, q: Tensor, weights: Tensor, table: Tensor, requests: Tensor,
               positions: Tensor, query_start: Tensor) -> Tensor:  # fmt: skip
    atom.cache_insert(cache, row, table, requests, positions)
    return atom.index_topk(q, weights, cache, table, requests, positions, query_start, 1, 3)


def index_case() -> Case:
    ints = lambda *v: torch.tensor(v, dtype=torch.int32)  # noqa: E731
    inputs = [
        torch.zeros(5, 4, 16), randn(TOKENS, 16), randn(TOKENS, 3, 16), randn(TOKENS, 3), ints(1, 2, 3).view(1, 3),
        torch.zeros(TOKENS, dtype=torch.int32), torch.arange(TOKENS, dtype=torch.int32), ints(0, TOKENS),
    ]  # fmt: skip
    case = Case(index_step, inputs, {})
    placeholder = next(n.name for n in case.gm.graph.nodes if n.op == "placeholder")
    case.ctx.states = {placeholder: "index_rows"}
    return case


def test_index_rows_and_queries_are_rotated_and_rounded_both() -> None:
    case = index_case()
    case.run("native", rows={"index_rows": INDEX}, query=QUERY)
    assert operators(case.gm) == [
        "atom.hadamard", "atom.pack_rows", "atom.packed_insert", "atom.hadamard", "atom.quantize", *["getitem"] * 2,
        "atom.dequantize", "atom.index_topk",
    ]  # fmt: skip
    assert case.ctx.state_specs == {"index_rows": ((4 * RowLayout.parse(INDEX).row_bytes,), "uint8")}
    (decision,) = case.ctx.decisions
    assert (decision.kind, decision.layout, decision.bytes) == ("cache", INDEX, 10)
    assert index_rotation(case.gm) is None


@pytest.mark.parametrize("side", ["query", "row"])
def test_a_rotation_on_one_side_breaks_the_invariant(side: str) -> None:
    case = index_case()
    case.run("native", rows={"index_rows": INDEX}, query=QUERY)
    turns = [n for n in case.gm.graph.nodes if n.target is atom.hadamard.default]
    turn = turns[side == "query"]
    turn.replace_all_uses_with(turn.args[0])
    problem = index_rotation(case.gm)
    assert problem is not None and "rotated" in problem and "index" in problem


def test_a_cache_that_nothing_can_read_packed_is_refused() -> None:
    def step(cache: Tensor, row: Tensor, table: Tensor, requests: Tensor, positions: Tensor) -> Tensor:
        atom.cache_insert(cache, row, table, requests, positions)
        return cache[0].exp()

    ints = torch.zeros(TOKENS, dtype=torch.int32)
    case = Case(step, [torch.zeros(5, 4, 16), randn(TOKENS, 16), ints.view(1, -1), ints, ints.clone()], {})
    case.ctx.states = {next(n.name for n in case.gm.graph.nodes if n.op == "placeholder"): "window"}
    with pytest.raises(PassError, match=r"window: .* cannot read"):
        case.run("native", rows={"window": ROWS})


# -- targets -----------------------------------------------------------------------------------------------------------


def test_fnuz_holds_the_same_numbers() -> None:
    case = linear_case()
    case.run("native", target="mi300x")
    weight, activation = case.ctx.decisions
    assert weight.layout == "e4m3fnuz:128x128:e8m0:max224" and weight.origin == "exact"
    assert activation.layout == "e4m3fnuz:1x128:e8m0:0.0001:max224"
    x = randn(5, D)
    assert torch.equal(case.values(x), F.linear(rounded(x, ACT), case.dense[0]))


@pytest.mark.parametrize(
    ("target", "words"),
    [("mi355x", "scaled matrix instructions, e2m1 x e4m3"), ("h100", "weight expanded to e4m3 in registers"),
     ("mi300x", "weight expanded to e4m3fnuz"), ("b200", "scaled matrix instructions"), ("cpu", "expanded to float32")],
)  # fmt: skip
def test_the_table_says_what_the_target_does_with_fp4(target: str, words: str) -> None:
    case = Case(
        experts,
        [randn(TOKENS, D), torch.zeros(TOKENS, 2, dtype=torch.int64)],
        {"ffn.experts.w13": W13, "ffn.experts.w2": W2},
    )
    case.run("native", target=target)
    assert words in case.ctx.decisions[0].lowering


@pytest.mark.parametrize(
    ("weight", "words"),
    [("e4m3fnuz:128x128:e8m0", "FNUZ dialect, but h100 multiplies OCP"), ("int8:1x*:float32", "no product for weight"),
     ("e5m2:128x128:e8m0", "no product for weight")],
)  # fmt: skip
def test_a_layout_the_target_cannot_multiply_is_an_error_that_names_the_weight(weight: str, words: str) -> None:
    scheme = Scheme("mine", (Rule("linear", "attn.wq_b", weight, ACT),))
    with pytest.raises(PassError, match=rf"attn\.wq_b .*{words}"):
        linear_case().run(scheme, target="h100")


def test_a_scheme_survives_json() -> None:
    for scheme in SCHEMES.values():
        assert msgspec.json.decode(msgspec.json.encode(scheme), type=Scheme) == scheme
