"""Pointwise: what becomes a program, what is computed where it is read, and what stays as it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule

from atomc.passes.canonicalize import Canonicalize, DeadCode
from atomc.passes.pointwise import Pointwise
from atomc.passes.runner import Context, run_pipeline
from atomc.recipes import Load
from tests.support.graphs import TOKENS, apply, assert_same, by_references, operators, randn, text, traced

BF16 = torch.bfloat16


def programs(gm: GraphModule) -> list[str]:
    return [str(n.args[2]) for n in gm.graph.nodes if "pointwise" in str(n.target)]


def rewritten(fn: Callable[..., Any], *inputs: Tensor) -> GraphModule:
    """The graph after the pass, which computes the same bits."""
    gm = traced(fn, *inputs)
    apply(gm, Pointwise(), DeadCode())
    assert_same(by_references(gm, *inputs), fn(*inputs))
    return gm


def test_a_chain_is_one_program() -> None:
    def fn(x: Tensor, y: Tensor) -> Tensor:
        return (x + y.float()).bfloat16()

    gm = rewritten(fn, randn(TOKENS, 8), randn(TOKENS, 8, dtype=BF16))
    assert programs(gm) == [
        ("v0 = aten.to.dtype(a0, float32)\nv1 = aten.add.Tensor(a1, v0)\n"
        "v2 = aten.to.dtype(v1, bfloat16)\nreturn v2,")
    ]  # fmt: skip
    assert text(gm).splitlines()[-1] == "getitem = getitem(pointwise_default, 0)"


def test_results_of_one_shape_share_a_program_and_its_inputs() -> None:
    def fn(positions: Tensor, slow: Tensor, fast: Tensor) -> tuple[Tensor, ...]:
        at = positions.float().unsqueeze(-1)
        return (at * slow).cos(), (at * slow).sin(), (at * fast).cos(), positions * 2

    gm = rewritten(fn, torch.arange(TOKENS).int(), randn(4), randn(4))
    first, second = programs(gm)
    assert first.endswith("return v3, v4, v6,") and first.count("unsqueeze") == 1
    assert second == "v0 = aten.mul.Tensor(a0, 2)\nreturn v0,"


def test_what_others_read_is_a_result_and_what_only_the_chain_reads_is_not_kept() -> None:
    def fn(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        y = x.sigmoid()
        return F.linear(y, w), y.exp() + 1

    gm = rewritten(fn, randn(TOKENS, 8), randn(8, 8))
    assert programs(gm) == [
        "v0 = aten.sigmoid.default(a0)\nv1 = aten.exp.default(v0)\nv2 = aten.add.Tensor(v1, 1)\nreturn v0, v2,"
    ]
    assert operators(gm)[0] == "atom.pointwise"


def test_a_program_runs_after_what_it_reads() -> None:
    def fn(x: Tensor, w: Tensor) -> Tensor:
        y = F.linear(x * 2, w)
        return y * 3

    gm = rewritten(fn, randn(TOKENS, 8), randn(8, 8))
    assert operators(gm) == ["atom.pointwise", "getitem", "aten.linear", "atom.pointwise", "getitem"]


def test_views_gathers_creations_and_sizes() -> None:
    def fn(table: Tensor, ids: Tensor, h: Tensor) -> tuple[Tensor, ...]:
        x = F.embedding(ids, table.float())
        eye = torch.eye(4).expand(ids.shape[0], -1, -1).contiguous()
        return x.unsqueeze(-2).expand(-1, 4, -1).contiguous(), torch.zeros(ids.shape[0], 4), eye, h[ids.clamp(min=0)]

    gm = traced(fn, randn(9, 6, dtype=BF16), torch.arange(TOKENS) % 9, randn(12, 5))
    ctx = Context("test", weights={"table_1": Load("table")})
    run_pipeline((Canonicalize(), Pointwise(), DeadCode()), gm, ctx)
    inputs = randn(9, 6, dtype=BF16), torch.arange(TOKENS) % 9, randn(12, 5)
    assert_same(by_references(gm, *inputs), fn(*inputs))
    streams = next(p for p in programs(gm) if "embedding" in p)
    # The rows are widened, not the table, and the row is not kept.
    assert streams.startswith("v0 = aten.embedding.default(a0, a1)\nv1 = aten.to.dtype(v0, float32)\nv2 = aten.unsq")
    assert "aten.to.dtype" not in operators(gm)
    assert any("zeros.default([s0, 4]" in p for p in programs(gm))


def test_norms_are_programs_with_a_reduction() -> None:
    def fn(x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)

    gm = rewritten(fn, randn(TOKENS, 8))
    assert len(programs(gm)) == 1 and "aten.mean.dim(v0, [-1], True)" in programs(gm)[0]


def written(x: Tensor) -> Tensor:
    y = x * 2
    x.add_(1)
    return y


@pytest.mark.parametrize(
    "fn",
    [
        written,
        lambda x: x.sum(0),
        lambda x: x > 0,
        lambda x: x.tanh(),
        lambda x: x * float("inf"),
        lambda x: torch.add(x, x, alpha=2),
        lambda x: x.t() * 2,  # the number of tokens is no first dim
        lambda x: x.half().double() * 1.5,
    ],
    ids=["written", "over dim 0", "bool", "unknown", "infinite", "alpha", "unknown size", "float64"],
)
def test_what_stays(fn: Callable[[Tensor], Tensor]) -> None:
    gm = traced(fn, randn(TOKENS, 8))
    apply(gm, Pointwise())
    kinds = [op for p in programs(gm) for op in p.split("aten.")[1:]]
    assert all(op.startswith("to.dtype") for op in kinds), programs(gm)


def test_what_is_made_of_weights_alone_is_left_for_loading() -> None:
    gm = traced(lambda x, w: x * (w.float() + 1), randn(TOKENS, 8), randn(8, dtype=BF16))
    run_pipeline((Canonicalize(), Pointwise()), gm, Context("test", weights={"w_1": Load("w")}))
    assert operators(gm)[:2] == ["aten.to.dtype", "aten.add.Tensor"]
    assert programs(gm) == ["v0 = aten.mul.Tensor(a0, a1)\nreturn v0,"]
