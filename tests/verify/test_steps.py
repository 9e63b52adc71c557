"""One step at a time: every operator keeps its bounds, and every mistake in one breaks them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from atomc.ops import OPS, cpu
from atomc.verify import Verdict, examine, observe
from tests.verify.cases import CASES, EPS, arguments

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
RESERVED = frozenset({"cache", "window"})


def judged(case: str, dtype: torch.dtype = torch.float32) -> list[Verdict]:
    op, given = arguments(case, dtype)
    return examine(observe(op, given, RESERVED))


@DTYPES
@pytest.mark.parametrize("case", CASES)
def test_every_operator_keeps_its_bounds(case: str, dtype: torch.dtype) -> None:
    for seed in range(3):
        torch.manual_seed(seed)
        for verdict in judged(case, dtype):
            assert verdict.ok, verdict
            # One rounding, to 16 bits or of a scale, may take all of its half unit.
            assert verdict.use < 0.75 or dtype != torch.float32 or "dequantize" in case, verdict


@pytest.mark.parametrize(
    "case", ["dequantize", "dequantize fp4", "quantize", "quantize fp4", "pack_rows", "update", "pointwise gather"]
)
def test_formats_and_copies_are_exact(case: str) -> None:
    for verdict in judged(case):
        assert (verdict.error, verdict.bound) == (0, 0), verdict


# Most times the worst error seen that a bound may be, as norms. In float32 a bound holds for sums in any order, √K of
# what rounding each input moves; torch sums in blocks, which is closer. Three long sums after one another are furthest.
LOOSEST = {torch.float32: 1000.0, torch.bfloat16: 30.0}
# Products of codes have few bits: torch's sums of them are closer still.
LOOSER = {
    ("hc_post_pre_norm", torch.float32): 2500.0, ("hc_post_pre_norm_quant", torch.float32): 2500.0,
    ("scaled grouped", torch.float32): 1500.0,
}  # fmt: skip
IN_FULL = ("linear_fp32", "pointwise angles")  # in float32, whatever the model is in
# Where no error need be seen (a choice; numbers in a layout, and what follows from them), most of the result that may
# differ: what is undecided between two codes. In bfloat16 that is one number in four; FP4's codes are far apart.
UNDECIDED = {torch.float32: 0.03, torch.bfloat16: 0.1}
MORE_UNDECIDED = {
    ("index packed", torch.float32): 0.05, ("index packed", torch.bfloat16): 1.0,
    ("compressor index", torch.bfloat16): 0.25, ("experts packed", torch.bfloat16): 0.35,
    ("scaled experts packed", torch.bfloat16): 0.2, ("scaled experts packed fp8", torch.bfloat16): 0.2,
}  # fmt: skip
IN_A_LAYOUT = frozenset(("packed", "quant", "index"))


@DTYPES
@pytest.mark.parametrize("case", CASES)
def test_bounds_are_not_loose(case: str, dtype: torch.dtype) -> None:
    """Of fresh random arguments: each bound against the worst error seen of that result."""
    errors: dict[str, float] = {}
    widest: dict[str, float] = {}
    for _ in range(8):
        for v in judged(case, dtype):
            errors[v.what] = max(v.error, errors.get(v.what, 0.0))
            widest[v.what] = max(v.bound, widest.get(v.what, 0.0))
    for what, bound in widest.items():
        if CASES[case][0].startswith("route") and what == "out 1":
            assert bound <= 1e-5, (what, bound)  # scores in float32, whatever the model is in
        elif any(part in case for part in IN_A_LAYOUT) and not (errors[what] and bound < 1e-3):
            assert bound <= MORE_UNDECIDED.get((case, dtype), UNDECIDED[dtype]), (what, bound)
        else:
            held = torch.float32 if case in IN_FULL else dtype
            assert bound <= LOOSER.get((case, dtype), LOOSEST[held]) * errors[what], (what, bound, errors[what])


# -- mistakes ----------------------------------------------------------------------------------------------------------

Reference = Callable[..., Any]


def wrong(name: str, **changed: Any) -> Reference:
    """The operator with some of its arguments replaced."""
    right = OPS[name].cpu

    def run(**given: Any) -> Any:
        return right(**(given | {n: f(given[n]) if callable(f) else f for n, f in changed.items()}))

    return run


def positional(name: str, function: Reference) -> Reference:
    order = [a.name for a in OPS[name].overload._schema.arguments]
    return lambda *args, **kwargs: function(**dict(zip(order, args, strict=False)), **kwargs)


def after(name: str, change: Callable[[Tensor], Tensor]) -> Reference:
    """The operator with its first result changed."""
    right = OPS[name].cpu

    def run(**given: Any) -> Any:
        result = right(**given)
        return (change(result[0]), *result[1:]) if isinstance(result, tuple) else change(result)

    return run


def nudged(x: Tensor) -> Tensor:
    """By a thousandth; of a 16-bit float by four spacings, as a thousandth is less than one."""
    x = x.clone()
    x.view(-1)[x.numel() // 2] *= 1 + max(1e-3, 4 * torch.finfo(x.dtype).eps)
    return x


def not_a_number(x: Tensor) -> Tensor:
    x = x.clone()
    x.view(-1)[0] = torch.nan
    return x


def shifted(codes: Tensor) -> Tensor:
    """One code, one step up."""
    codes = codes.clone()
    codes.view(torch.uint8).view(-1)[7] += 1
    return codes


def without_last(codes: Tensor) -> Tensor:
    """Without the last block of 128 columns."""
    codes = codes.clone()
    codes[..., -128:] = 0
    return codes


def doubled(scales: Tensor) -> Tensor:
    """One E8M0 scale, one power of two up."""
    scales = scales.clone()
    scales.view(torch.uint8).view(-1)[0] += 1
    return scales


def exchanged(x: Tensor, dim: int) -> Tensor:
    """The first two of a dim in each other's place."""
    order = torch.arange(x.shape[dim])
    order[:2] = torch.tensor([1, 0])
    return x.view(torch.uint8).index_select(dim, order).view(x.dtype)


def below_none(rows: Tensor) -> Tensor:
    """One row that no list of rows may hold: only -1 means none."""
    rows = rows.clone()
    rows[-1, -1] = -2
    return rows


def chosen(name: str, change: Callable[[Tensor], Tensor]) -> Reference:
    """The operator with its second result, the experts chosen, changed."""
    right = OPS[name].cpu

    def run(**given: Any) -> Any:
        weights, experts = right(**given)
        return weights, change(experts)

    return run


MISTAKES: list[tuple[str, str, Callable[[str], Reference]]] = [
    ("norm without eps", "rms_norm", lambda n: wrong(n, eps=100 * EPS)),
    ("norm without its weight", "rms_norm", lambda n: wrong(n, weight=None)),
    ("one element off by a thousandth", "rms_norm", lambda n: after(n, nudged)),
    ("one element not a number", "rms_norm", lambda n: after(n, not_a_number)),
    ("rope the other way", "rope", lambda n: wrong(n, sin=lambda s: -s)),
    ("rope of q the other way", "insert packed", lambda n: wrong(n, sin=lambda s: -s)),
    ("rows inserted one place on", "insert", lambda n: wrong(n, positions=lambda p: p + 1)),
    ("packed rows inserted one place on", "insert packed", lambda n: wrong(n, positions=lambda p: p + 1)),
    ("one sinkhorn step less", "hc_post_pre_norm", lambda n: wrong(n, iters=2)),
    ("streams mixed by the transpose", "hc_post_pre_norm_quant", lambda n: wrong(n, comb=lambda c: c.mT)),
    ("window one short", "attention", lambda n: wrong(n, window_size=7)),
    ("window one long, packed", "attention packed", lambda n: wrong(n, window_size=9)),
    ("a sink left out", "attention", lambda n: wrong(n, sink=lambda s: s - 100)),
    ("attention scale", "attention packed", lambda n: wrong(n, scale=0.31)),
    ("compressed rows left out", "attention packed", lambda n: wrong(n, cache=None)),
    ("pooling without overlap's order", "compressor", lambda n: wrong(n, ape=lambda a: a.flip(0))),
    ("index rows not rotated", "compressor index", lambda n: wrong(n, rotate=False)),
    ("rows rotated that are not to be", "compressor packed", lambda n: wrong(n, rotate=True)),
    ("queries not rotated", "index packed", lambda n: wrong(n, layout="")),
    ("index weights left out", "index", lambda n: wrong(n, weights=lambda w: torch.ones_like(w))),
    ("a selected row twice", "index", lambda n: after(n, lambda r: torch.cat((r[:, :1], r[:, :1], r[:, 2:]), 1))),
    ("selected rows of the future", "index", lambda n: after(n, lambda r: r + 100)),
    ("a row below none", "index", lambda n: after(n, lambda r: r.index_fill(1, torch.tensor(0), -2))),
    ("a row below none for one token", "index packed", lambda n: after(n, below_none)),
    ("an expert below none", "route_topk", lambda n: chosen(n, lambda e: e - 2)),
    ("one row too few", "index", lambda n: after(n, lambda r: r[:, :-1])),
    ("state kept in the wrong place", "update", lambda n: wrong(n, positions=lambda p: p + 1)),
    ("no routing weight", "experts", lambda n: wrong(n, weights=lambda w: torch.ones_like(w))),
    ("no routing weight, packed", "experts packed", lambda n: wrong(n, weights=lambda w: torch.ones_like(w))),
    ("wrong clamp", "experts", lambda n: wrong(n, limit=10.0)),
    ("wrong clamp, packed", "experts packed", lambda n: wrong(n, limit=1.6)),
    ("gate and up swapped", "experts packed", lambda n: wrong(n, w13=lambda w: w.roll(128, 1))),
    ("experts not rounded inside", "experts packed", lambda n: wrong(n, inner_layout="e4m3:1x*:float32")),
    ("experts rounded to FP4 inside", "experts packed", lambda n: wrong(n, inner_layout="e2m1:1x32:e8m0")),
    ("swiglu without its clamp", "swiglu_quant", lambda n: wrong(n, limit=100.0)),
    ("one code off by one", "swiglu_quant", lambda n: after(n, shifted)),
    ("one code off by one, quantise", "quantize", lambda n: after(n, shifted)),
    ("the wrong experts", "route_topk", lambda n: wrong(n, bias=lambda b: 0 * b)),
    ("routing weights not normalised", "route_topk", lambda n: wrong(n, scale=1.0)),
    ("experts of the next token", "route_hash", lambda n: wrong(n, ids=lambda i: i.roll(1))),
    ("post mixed by the transpose", "hc_post", lambda n: wrong(n, comb=lambda c: c.mT)),
    ("the last columns left out", "linear_fp32", lambda n: wrong(n, x=lambda x: x.index_fill(1, torch.tensor(255), 0))),
    ("the last block left out", "scaled", lambda n: wrong(n, codes=without_last)),
    ("one tile's scale doubled", "scaled", lambda n: wrong(n, weight_scales=doubled)),
    ("rows of the weight swapped", "scaled", lambda n: wrong(n, weight=lambda w: exchanged(w, 0))),
    ("one token's scale doubled", "scaled grouped", lambda n: wrong(n, scales=doubled)),
    ("groups swapped", "scaled grouped", lambda n: wrong(n, codes=lambda c: c.flip(1), scales=lambda s: s.flip(1))),
    ("scales of a row of experts", "scaled experts packed", lambda n: wrong(n, w13_scales=lambda s: s.roll(1, -2))),
    ("no routing weight, FP4", "scaled experts packed", lambda n: wrong(n, weights=lambda w: torch.ones_like(w))),
    ("experts swapped", "scaled experts packed fp8", lambda n: wrong(n, w2=lambda w: exchanged(w, 0))),
    ("wrong clamp, FP8", "scaled experts packed fp8", lambda n: wrong(n, limit=10.0)),
    ("angles of the next token", "pointwise angles", lambda n: wrong(n, inputs=lambda i: [i[0] + 1, i[1]])),
    ("a row gathered twice", "pointwise gather", lambda n: wrong(n, inputs=lambda i: [i[0], i[1] * 0])),
    ("an addend left out", "pointwise add", lambda n: wrong(n, inputs=lambda i: [0 * i[0], i[1]])),
    ("a floor forgotten", "quantize", lambda n: wrong(n, layout="e4m3:1x128:e8m0:1000.0")),
]


# In bfloat16 one in four of the values inside is undecided between two codes: other scales move no more than those.
ONLY_IN_FLOAT32 = "experts not rounded inside"
SEEDED = [
    pytest.param(case, make, dtype, id=f"{what}, {str(dtype).removeprefix('torch.')}")
    for what, case, make in MISTAKES
    for dtype in (torch.float32, torch.bfloat16)
    if what != ONLY_IN_FLOAT32 or dtype == torch.float32
]


@pytest.mark.parametrize(("case", "make", "dtype"), SEEDED)
def test_every_mistake_breaks_a_bound(
    case: str, make: Callable[[str], Reference], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = CASES[case][0]
    assert all(v.ok for v in judged(case, dtype))
    monkeypatch.setitem(OPS, name, dataclasses.replace(OPS[name], cpu=positional(name, make(name))))
    assert any(not v.ok for v in judged(case, dtype))


def test_there_are_as_many_mistakes_as_there_should_be() -> None:
    assert len(MISTAKES) == 55
    assert len({m[0] for m in MISTAKES}) == 55
    assert len(SEEDED) == 109


@pytest.mark.parametrize("op", ["aten.linear.default", "aten.mul.Tensor", "aten.cos.default", "aten.embedding.default"])
def test_operators_of_torch_keep_their_bounds(op: str) -> None:
    given: dict[str, dict[str, Any]] = {
        "aten.linear.default": {"input": torch.randn(9, 640), "weight": torch.randn(30, 640)},
        "aten.mul.Tensor": {"self": torch.randn(9, 640), "other": 0.3},
        "aten.cos.default": {"self": torch.randn(9, 640) * 100},
        "aten.embedding.default": {"weight": torch.randn(30, 8), "indices": torch.randint(0, 30, (9,))},
    }
    seen = observe(op, given[op])
    (verdict,) = examine(seen)
    assert verdict.ok, verdict
    off = dataclasses.replace(seen, results=(nudged(seen.results[0]),))
    assert not examine(off)[0].ok


def test_a_rounded_product_is_within_half_a_spacing() -> None:
    given = {"self": torch.randn(40, 40), "dtype": torch.bfloat16}
    seen = observe("aten.to.dtype", given)
    assert examine(seen)[0].ok
    truncated = (given["self"].view(torch.int32) & -65536).view(torch.float32).bfloat16()
    assert not examine(dataclasses.replace(seen, results=(truncated,)))[0].ok


def test_the_cpu_kernels_are_what_is_judged() -> None:
    """An operator's own function, not the reference: else nothing would ever differ."""
    assert OPS["rms_norm"].cpu is cpu.rms_norm is not OPS["rms_norm"].reference


def test_a_row_below_none_is_named() -> None:
    op, given = arguments("index")
    seen = observe(op, given)
    (verdict,) = examine(dataclasses.replace(seen, results=(below_none(seen.results[0]),)))
    assert verdict.why == "token 23 chose row -2 of 3 that it may see"


# -- operators of torch that write, or give nothing --------------------------------------------------------------------

WRITES: dict[str, dict[str, Any]] = {
    "aten.copy_.default": {"self": torch.zeros(9, 64), "src": torch.randn(9, 64)},
    "aten.mul_.Tensor": {"self": torch.randn(9, 64), "other": torch.randn(64)},
    "aten.index_copy_.default": {
        "self": torch.randn(9, 64), "dim": 0, "index": torch.tensor([7, 2]), "source": torch.randn(2, 64),
    },
    "aten.add.out": {"self": torch.randn(9, 64), "other": torch.randn(9, 64), "out": torch.zeros(9, 64)},
}  # fmt: skip


@pytest.mark.parametrize("op", WRITES)
def test_what_an_operator_of_torch_writes_is_judged(op: str) -> None:
    given = WRITES[op]
    name = "out" if op.endswith(".out") else "self"
    before = given[name].clone()
    seen = observe(op, given)
    result, written = examine(seen)
    assert (result.what, written.what) == ("out 0", name)
    assert result.ok and written.ok, (result, written)
    assert torch.equal(given[name], before)  # judged on copies
    off = dataclasses.replace(seen, mutated={name: nudged(seen.mutated[name])})
    assert [v.ok for v in examine(off)] == [True, False]
    left = dataclasses.replace(seen, mutated={name: before})
    assert not examine(left)[1].ok


def test_a_cast_in_place_is_within_half_a_spacing() -> None:
    given = {"self": torch.zeros(40, 40).bfloat16(), "src": torch.randn(40, 40)}
    seen = observe("aten.copy_.default", given)
    assert examine(seen)[1].ok
    truncated = (given["src"].view(torch.int32) & -65536).view(torch.float32).bfloat16()
    assert not examine(dataclasses.replace(seen, mutated={"self": truncated}))[1].ok


def test_the_reserved_page_is_anyones() -> None:
    seen = observe("aten.copy_.default", WRITES["aten.copy_.default"], frozenset({"self"}))
    page = seen.mutated["self"].index_fill(0, torch.tensor(0), 7.0)
    assert examine(dataclasses.replace(seen, results=(None,), mutated={"self": page}))[0].ok
    page = seen.mutated["self"].index_fill(0, torch.tensor(1), 7.0)
    (verdict,) = examine(dataclasses.replace(seen, results=(None,), mutated={"self": page}))
    assert not verdict.ok
    assert verdict.index[0] == 1


def test_an_operator_that_gives_nothing_has_no_verdict() -> None:
    seen = observe("aten._assert_async.default", {"self": torch.tensor(True)})
    assert seen.results == ()
    assert examine(seen) == []


def test_a_result_that_nobody_uses_is_not_judged() -> None:
    seen = observe("aten.sort.default", {"self": torch.randn(9, 64)})
    assert [v.what for v in examine(seen)] == ["out 0", "out 1"]
    only = dataclasses.replace(seen, results=(None, seen.results[1]))
    assert [v.what for v in examine(only)] == ["out 1"]
