"""MergeLinears: sibling projections become one, and so do their weight recipes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule

from atomc.passes.canonicalize import Canonicalize
from atomc.passes.merge_linears import MergeLinears
from atomc.passes.runner import Context, Report, run_pipeline
from atomc.recipes import Concat, Load, evaluate, instantiate
from tests.support.graphs import TOKENS, randn, text, traced

GROUPS = (("attn.wq_a", "attn.wkv"), ("experts.w1", "experts.w3"))


def merge(gm: GraphModule, paths: dict[str, str]) -> tuple[Report, Context]:
    """Run the pass where the placeholders hold the parameters `paths`."""
    weights = {name: Load("{prefix}" + path) for name, path in paths.items()}
    ctx = Context("test", weights=dict(weights), module_paths=dict(paths))
    return run_pipeline((Canonicalize(), MergeLinears(GROUPS)), gm, ctx)[-1].report, ctx


PATHS = {"a_1": "attn.wq_a.weight", "b_1": "attn.wkv.weight"}


def siblings(x: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    second = F.linear(x, b).relu()
    return F.linear(x, a) * 2, second


def test_siblings_become_slices_of_one_product() -> None:
    x, a, b = randn(TOKENS, 8), randn(5, 8), randn(3, 8)
    gm = traced(siblings, x, a, b)
    report, ctx = merge(gm, PATHS)
    assert [m.module for m in report.matches] == ["attn.wq_a|attn.wkv"]
    assert text(gm) == (
        "linear_default = aten.linear(x_1, p_attn_wq_a_or_attn_wkv)\n"
        "slice_tensor = aten.slice.Tensor(linear_default, -1, 0, 5)\n"
        "slice_tensor_1 = aten.slice.Tensor(linear_default, -1, 5, END)\n"
        "relu = aten.relu(slice_tensor_1)\n"
        "mul = aten.mul.Tensor(slice_tensor, 2)"
    )
    assert ctx.weights == {
        "p_attn_wq_a_or_attn_wkv": Concat((Load("{prefix}attn.wq_a.weight"), Load("{prefix}attn.wkv.weight")), 0)
    }
    assert ctx.module_paths == {"p_attn_wq_a_or_attn_wkv": "attn.wq_a|attn.wkv.weight"}


def test_the_merged_recipe_gives_the_same_values() -> None:
    x, a, b = randn(TOKENS, 8), randn(5, 8), randn(3, 8)
    gm = traced(siblings, x, a, b)
    _, ctx = merge(gm, PATHS)
    stored = {"layers.3.attn.wq_a.weight": a, "layers.3.attn.wkv.weight": b}
    recipe = instantiate(ctx.weights["p_attn_wq_a_or_attn_wkv"], prefix="layers.3.")
    weight = evaluate(recipe, stored.__getitem__)
    for tokens in (TOKENS, 1):
        x = randn(tokens, 8)
        for got, want in zip(gm(x, weight), siblings(x, a, b), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


def test_two_parents_are_two_groups() -> None:
    def fn(x: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> tuple[Tensor, ...]:
        return F.linear(x, a), F.linear(x, b), F.linear(x, c), F.linear(x, d)

    gm = traced(fn, randn(TOKENS, 8), *(randn(3, 8) for _ in range(4)))
    paths = {"a_1": "0.experts.w1.weight", "b_1": "0.experts.w3.weight", "c_1": "1.experts.w1.weight",
             "d_1": "1.experts.w3.weight"}  # fmt: skip
    report, _ = merge(gm, paths)
    assert [m.module for m in report.matches] == ["0.experts.w1|0.experts.w3", "1.experts.w1|1.experts.w3"]


def apart(x: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return F.linear(x, a), F.linear(x.relu(), b)


def reused(x: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return F.linear(x, a), F.linear(x, b), b.sum()


def alone(x: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return F.linear(x, a), x @ b.T


@pytest.mark.parametrize(
    ("fn", "dtype", "reason"),
    [
        (apart, torch.float32, "they read different inputs"),
        (reused, torch.float32, "b_1 is used elsewhere too"),
        (alone, torch.float32, "only 1 of 2 are present"),
        (lambda x, a, b: (F.linear(x, a), F.linear(x, b.float())), torch.bfloat16, "only 1 of 2 are present"),
    ],
)
def test_what_is_refused(fn: object, dtype: torch.dtype, reason: str) -> None:
    assert callable(fn)
    gm = traced(fn, randn(TOKENS, 8), randn(5, 8), randn(3, 8, dtype=dtype))
    report, ctx = merge(gm, PATHS)
    assert not report.matches
    assert [r.reason for r in report.refusals] == [f"attn.wq_a|attn.wkv: {reason}"]
    assert report.refusals[0].where.startswith("passes/test_merge_linears.py:")
    assert set(ctx.weights) == set(PATHS)
