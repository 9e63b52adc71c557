"""Placement rules: every operator of the graphs has one, and each says what it may and may not be given."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from atomc.ops import OPS
from atomc.ops.placement import OWN, PARTIAL, REPLICATE, Call, Operand, Placement, PlacementError, Shard, Size
from atomc.ops.placement_rules import RULES, propagate

R, S0, S1 = REPLICATE, Shard(0), Shard(1)
T = 11


def at(placement: Placement, *shape: int, dtype: torch.dtype = torch.float32) -> Operand:
    return Operand(placement, shape, dtype)


def test_every_operator_of_ours_has_a_rule() -> None:
    ours = {f"atom.{name}.default" for name, op in OPS.items() if op.reference.__module__.startswith("atomc.")}
    assert ours - set(RULES) == set()


CASES: list[tuple[str, tuple[Any, ...], tuple[int, ...], Placement]] = [
    ("aten.linear.default", (at(R, T, 8), at(R, 6, 8)), (T, 6), R),
    ("aten.linear.default", (at(S0, T, 8), at(R, 6, 8)), (T, 6), S0),
    ("aten.linear.default", (at(R, T, 8), at(S0, 3, 8)), (T, 3), S1),
    ("aten.linear.default", (at(S1, T, 4), at(S1, 6, 4)), (T, 6), PARTIAL),
    ("aten.bmm.default", (at(S0, 2, T, 8), at(S0, 2, 8, 5)), (2, T, 5), S0),
    ("aten.add.Tensor", (at(PARTIAL, T, 8), at(PARTIAL, T, 8)), (T, 8), PARTIAL),
    ("aten.mul.Tensor", (at(PARTIAL, T, 8), 0.5), (T, 8), PARTIAL),
    ("aten.mul.Tensor", (at(S0, T, 1, 8), at(R, 8)), (T, 1, 8), S0),
    ("aten.mul.Tensor", (at(S1, T, 4), at(R, T, 1)), (T, 4), S1),
    ("aten.to.dtype", (at(Shard(1, parts=2), 3, 8), torch.float32), (3, 8), Shard(1, parts=2)),
    ("aten.reshape.default", (at(S1, T, 12), [-1, 3, 4]), (T, 3, 4), S1),
    ("aten.reshape.default", (at(S1, T, 3, 4), [-1, 12]), (T, 12), S1),
    ("aten.reshape.default", (at(S0, T, 3, 4), [-1, 12]), (T, 12), S0),
    ("aten.transpose.int", (at(S0, 3, 4), 0, 1), (4, 3), S1),
    ("aten.transpose.int", (at(S1, 2, 3, 4), -2, -1), (2, 4, 3), Shard(2)),
    ("aten.unsqueeze.default", (at(S1, 3, 4), 0), (1, 3, 4), Shard(2)),
    ("aten.unsqueeze.default", (at(S0, 3, 4), -1), (3, 4, 1), S0),
    ("aten.slice.Tensor", (at(S0, T, 8), -1, 0, 4), (T, 4), S0),
    ("aten.sum.dim_IntList", (at(S0, T, 3), [-1], True), (T, 1), S0),
    ("aten.sum.dim_IntList", (at(S1, T, 3, 4), [0]), (3, 4), S0),
    ("aten.zeros.default", ([Size(True, T), 4],), (T, 4), S0),
    ("aten.zeros.default", ([Size(False, T), 4],), (T, 4), R),
    ("atom.rms_norm.default", (at(S1, T, 2, 8), None, 1e-6), (T, 2, 8), S1),
    ("atom.drop_padding.default", (at(PARTIAL, 14, 8), at(R, T, 8)), (T, 8), PARTIAL),
    ("atom.local_experts.default", (at(R, T, 3), Size(True, 4), 4), (T, 3), OWN),
    ("atom.local_experts.default", (at(R, T, 3), Size(False, 4), 4), (T, 3), R),
    ("atom.local_experts.default", (at(Shard(0, by="expert"), T, 3), Size(True, 4), 4), (T, 3), Shard(0, by="slot")),
    ("atom.vocabulary_embedding.default", (at(S0, 4, 8), at(R, T), Size(True, 4)), (T, 8), PARTIAL),
    ("aten.linear.default", (at(S0, T, 8), at(R, 6, 8), at(R, 6)), (T, 6), S0),
    ("aten.linear.default", (at(R, T, 8), at(S0, 3, 8), at(S0, 3)), (T, 3), S1),
    ("aten.to.dtype", (at(PARTIAL, T, 8), torch.bfloat16), (T, 8), PARTIAL),
]  # fmt: skip


@pytest.mark.parametrize(("op", "args", "shape", "expected"), CASES)
def test_what_comes_out(op: str, args: tuple[Any, ...], shape: tuple[int, ...], expected: Placement) -> None:
    assert propagate(Call(op, args, (shape,))) == (expected,)


REFUSED: list[tuple[str, tuple[Any, ...], tuple[int, ...], str]] = [
    ("aten.linear.default", (at(S1, T, 4), at(R, 6, 8)), (T, 6), "whole in its dim 1 where another is cut"),
    ("aten.linear.default", (at(S1, T, 4), at(S0, 3, 8)), (T, 3), "do not belong together"),
    ("aten.linear.default", (at(PARTIAL, T, 8), at(R, 6, 8)), (T, 6), "Partial(sum) is used as a full value"),
    ("aten.add.Tensor", (at(PARTIAL, T, 8), at(R, T, 8)), (T, 8), "Partial(sum) is used as a full value"),
    ("aten.add.Tensor", (at(PARTIAL, T, 8), 1.0), (T, 8), "Partial(sum) is used as a full value"),
    ("aten.silu.default", (at(PARTIAL, T, 8),), (T, 8), "Partial(sum) is used as a full value"),
    ("aten.mul.Tensor", (at(PARTIAL, T, 8), at(PARTIAL, T, 8)), (T, 8), "Partial(sum) is used"),
    ("aten.mul.Tensor", (at(S0, T, 8), at(R, T, 8)), (T, 8), "every rank would take a part of its own"),
    ("aten.reshape.default", (at(S1, T, 12), [-1, 6, 4]), (T // 2, 6, 4), "mixes the parts"),
    ("aten.reshape.default", (at(Shard(2), T, 3, 4), [-1, 12]), (T, 12), "mixes the parts"),
    ("aten.slice.Tensor", (at(S1, T, 8), -1, 0, 4), (T, 4), "a slice of a dim that is cut"),
    ("aten.sum.dim_IntList", (at(S1, T, 8), [-1]), (T,), "a reduction over dim 1"),
    ("aten.amax.default", (at(PARTIAL, T, 8), [-1]), (T,), "of parts it is not that of the whole"),
    ("aten.topk.default", (at(S1, T, 8), 2), (T, 2), "has to be whole"),
    ("atom.rms_norm.default", (at(S1, T, 8), None, 1e-6), (T, 8), "has to be whole"),
    ("atom.quantize.default", (at(S1, T, 64), "e4m3:1x128:e8m0"), (T, 64), "in blocks of 128"),
    ("atom.quantize.default", (at(S1, T, 64), "e4m3:1x*:float32"), (T, 64), "in whole rows"),
    ("atom.dequantize.default", (at(S1, T, 64), at(R, T, 1)), (T, 64), "codes that are Shard(1) with scales"),
    ("atom.index_topk.default",
     (at(S1, T, 2, 8), at(S1, T, 2), *(at(R, 4, 4) for _ in range(2)), *(at(R, T) for _ in range(3))), (T, 4),
     "has to be whole"),
    ("atom.hc_post.default", (at(R, T, 4, 8), at(PARTIAL, T, 8), at(R, T, 4), at(R, T, 4, 4)), (T, 4, 8), "Partial"),
    ("aten.linear.default", (at(S1, T, 4), at(S1, 6, 4), at(R, 6)), (T, 6), "has a bias: it would count once a rank"),
    ("aten.linear.default", (at(R, T, 8), at(S0, 3, 8), at(R, 3)), (T, 3), "whole in its dim 0 where another is cut"),
    ("aten.linear.default", (at(S1, T, 1), at(R, 6, 1)), (T, 6), "whole in its dim 1 where another is cut"),
    ("aten.bmm.default", (at(S0, 1, T, 8), at(R, 1, 8, 5)), (1, T, 5), "whole in its dim 0 where another is cut"),
    ("aten.to.dtype", (at(PARTIAL, T, 8), torch.int32), (T, 8), "is rounded to torch.int32 before it is taken"),
    ("aten.sum.dim_IntList", (at(OWN, T, 3), [-1]), (T,), "of a Partial(own)"),
    ("aten.slice.Tensor", (at(OWN, T, 8), -1, 0, 4), (T, 4), "a slice of a Partial(own)"),
    ("aten.add.Tensor", (at(OWN, T, 8), 1), (T, 8), "Partial(own) is used as a full value"),
    ("atom.vocabulary_embedding.default", (at(R, 4, 8), at(R, T), Size(True, 4)), (T, 8), "a table Replicate"),
    ("aten.convolution.default", (at(R, T, 8),), (T, 8), "has no placement rule"),
]  # fmt: skip


@pytest.mark.parametrize(("op", "args", "shape", "why"), REFUSED)
def test_what_may_not_go_in(op: str, args: tuple[Any, ...], shape: tuple[int, ...], why: str) -> None:
    with pytest.raises(PlacementError) as error:
        propagate(Call(op, args, (shape,)))
    assert why in str(error.value)


def test_a_generated_chain_is_its_lines() -> None:
    text = "v0 = aten.to.dtype(a0, float32)\nv1 = aten.add.Tensor(a1, v0)\nreturn v1,"

    def placed(a: Placement, b: Placement) -> tuple[Placement, ...]:
        return propagate(Call("atom.pointwise.default", ((at(a, T, 8), at(b, T, 8)), (), text), ((T, 8),)))

    assert placed(S0, S0) == (S0,)
    assert placed(PARTIAL, PARTIAL) == (PARTIAL,)
    with pytest.raises(PlacementError, match="used as a full value"):
        placed(R, PARTIAL)
    made = "v0 = aten.zeros.default([s0, 4], dtype=float32)\nreturn v0,"
    call = Call("atom.pointwise.default", ((at(R, 4),), (Size(True, T),), made), ((T, 4),))
    assert propagate(call) == (S0,)
