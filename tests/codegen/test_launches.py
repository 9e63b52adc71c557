"""Calls as launches: symbolic grids and arguments, results and scratch, buckets; and plans that say something else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="kernels are compiled by triton, which is an extra")

from atomc.artifact.check_region import Problems, check_region
from atomc.artifact.plan import RegionPlan, Size, Slot
from atomc.codegen import hosts
from atomc.codegen.device import Device, Recorder, cdiv
from atomc.codegen.kernels import copy, moe_plain
from atomc.codegen.lower import LoweringError
from atomc.codegen.missing import missing_kernels
from atomc.targets import get_target
from tests.codegen.test_lower import BOUNDS, WIDTH, X, captured
from tests.support.toy_kernels import add


def host(device: Device, x: Tensor, other: Tensor) -> Tensor:
    """x + other by way of scratch memory, in blocks that depend on the bucket."""
    block = 64 if device.tokens <= 16 else 256
    part, out = device.empty(tuple(x.shape), x.dtype), device.empty(tuple(x.shape), x.dtype)
    count = x.shape[0] * x.shape[1]
    for source, target in ((x, part), (part, out)):
        args = {"x": source, "y": other, "out": target, "n": count}
        device.launch(add, (cdiv(count, block),), args, {"BLOCK": block})
    return out


@pytest.fixture
def plan(monkeypatch: pytest.MonkeyPatch) -> RegionPlan:
    monkeypatch.setitem(hosts.HOSTS, "aten.add.Tensor", ("moe", "unused"))
    monkeypatch.setattr("atomc.codegen.lower.host_of", lambda op, target: host if op == "aten.add.Tensor" else None)
    lowering = captured(lambda x, w: torch.exp(x + w), x=X, w=("weight", (WIDTH,)))
    lowering.target, lowering.tokens = get_target("h100"), (16, 64)
    made = lowering.run()
    assert {v.name for v in lowering.variants.values()} == {"add"} and len(lowering.variants) == 2
    return made


def problems(plan: RegionPlan) -> list[str]:
    found = Problems()
    check_region(found, plan, {}, BOUNDS)
    return found.found


def test_a_call_becomes_launches_for_each_bucket(plan: RegionPlan) -> None:
    assert problems(plan) == []
    (step,) = [s for s in plan.steps if s.buckets]
    assert [b.tokens for b in step.buckets] == [16, 64]
    for bucket in step.buckets:
        first, second = bucket.launches
        assert first.kernel == second.kernel
        (scratch,) = bucket.scratch
        assert first.args[2] == Slot(scratch) == second.args[0]
        assert second.args[2] == Slot(step.outputs[0])  # type: ignore[arg-type]
        assert isinstance(first.args[3], Size) and "T" in first.args[3].expr
        assert isinstance(first.grid[0], str)
        info = plan.slots[scratch]
        assert info.role == "temporary" and info.first == info.last == plan.steps.index(step)
        assert info.offset is not None and scratch in step.release
    small, large = (plan.slots[b.scratch[0]] for b in step.buckets)
    assert small.shape == large.shape == ["T", WIDTH]


def changed(plan: RegionPlan, **fields: Any) -> RegionPlan:
    at = next(i for i, s in enumerate(plan.steps) if s.buckets)
    bucket = msgspec.structs.replace(plan.steps[at].buckets[0], **fields)
    step = msgspec.structs.replace(plan.steps[at], buckets=[bucket, *plan.steps[at].buckets[1:]])
    return msgspec.structs.replace(plan, steps=[*plan.steps[:at], step, *plan.steps[at + 1 :]])


def test_a_plan_that_launches_nonsense_is_refused(plan: RegionPlan) -> None:
    launches = next(s for s in plan.steps if s.buckets).buckets[0].launches
    bad = [
        (changed(plan, tokens=99), "its buckets are for"),
        (changed(plan, scratch=[999]), "out of range"),
        (changed(plan, launches=[msgspec.structs.replace(launches[0], grid=["T*nothing"])]), "unknown symbol"),
        (changed(plan, launches=[msgspec.structs.replace(launches[0], grid=[])]), "a grid of 0 dimensions"),
        (changed(plan, launches=[msgspec.structs.replace(launches[0], args=[Slot(len(plan.slots) - 1)])]), "not there"),
    ]
    for wrong, words in bad:
        assert any(words in p for p in problems(wrong)), (words, problems(wrong))


# -- copies ------------------------------------------------------------------------------------------------------------


def launched(function: Callable[..., Any], **arguments: Any) -> RegionPlan:
    """A plan for an H100 that the checker accepts."""
    lowering = captured(function, **arguments)
    lowering.target, lowering.tokens = get_target("h100"), (16, 64)
    made = lowering.run()
    assert problems(made) == []
    return made


def test_a_reshape_is_launched_where_it_copies_and_no_view_is() -> None:
    x, w = ("value", ("T", 2, WIDTH)), ("weight", (2, 8, WIDTH))

    def function(x: Tensor, w: Tensor) -> Tensor:
        z = torch.bmm(x.transpose(0, 1), w.transpose(1, 2))
        return z.transpose(0, 1).reshape(x.shape[0], -1).reshape(-1, 4, 4).reshape(-1)

    plan = launched(function, x=x, w=w)
    first, *others = [s for s in plan.steps if s.op == "aten.reshape.default"]
    (product,) = [s for s in plan.steps if s.op == "aten.bmm.default"]
    assert [len(first.buckets), len(product.buckets)] == [2, 2] and len(others) == 2
    assert not any(s.buckets for s in others)
    assert not missing_kernels(plan, get_target("h100"))
    (launch,) = first.buckets[0].launches
    assert isinstance(launch.args[2], Size) and launch.args[2].expr == "T"


def test_an_output_that_is_not_contiguous_is_copied_by_a_kernel() -> None:
    x, w = ("value", ("T", 2, WIDTH)), ("weight", (2, 8, WIDTH))
    plan = launched(lambda x, w: torch.bmm(x.transpose(0, 1), w.transpose(1, 2)).transpose(0, 1), x=x, w=w)
    assert plan.steps[-1].op == "aten.contiguous.default" and len(plan.steps[-1].buckets) == 2
    assert not missing_kernels(plan, get_target("h100"))


def test_a_result_with_strides_of_its_own_is_refused() -> None:
    """torch keeps the strides of what it clones; a step's memory is contiguous."""
    lowering = captured(lambda x: x.transpose(0, 1).clone() + 1, x=("value", ("T", 2, WIDTH)))
    lowering.target, lowering.tokens = get_target("h100"), (16, 64)
    with pytest.raises(LoweringError, match=r"aten.clone.default gives strides .*; a kernel gives contiguous results"):
        lowering.run()


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda x, w: torch.bmm(x.transpose(0, 1), w), r"the weight has strides"),
        (lambda x, w: torch.bmm(x[:, :, ::2].transpose(0, 1), w[:, :, :8].transpose(1, 2)), r"x has strides"),
    ],
)
def test_a_batched_product_whose_operands_lie_otherwise_is_refused(function: Callable[..., Any], words: str) -> None:
    lowering = captured(function, x=("value", ("T", 2, WIDTH)), w=("weight", (2, WIDTH, WIDTH)))
    lowering.target, lowering.tokens = get_target("h100"), (16, 64)
    with pytest.raises(LoweringError, match=f"its kernel for h100 takes no such call: {words}"):
        lowering.run()


def test_a_copy_that_no_kernel_makes_is_refused() -> None:
    device = Recorder(get_target("h100"), 16)
    five = torch.empty(2, 3, 4, 5, 6, device="meta").transpose(0, 1)
    with pytest.raises(ValueError, match="a copy of 5 dims; a kernel copies 1 to 4"):
        copy.contiguous(device, five)
    with pytest.raises(ValueError, match=r"strides \(2, 7, 1\) .* are no multiples of the first size"):
        copy.contiguous(device, torch.empty_strided((3, 2, 2), (2, 7, 1), device="meta"))


def test_experts_of_another_dtype_are_refused() -> None:
    device = Recorder(get_target("h100"), 16)
    x, w13, w2 = (torch.empty(s, device="meta") for s in ((4, 8), (2, 12, 8), (2, 8, 6)))
    chosen = torch.empty(4, 2, dtype=torch.int64, device="meta")
    with pytest.raises(ValueError, match=r"activations torch\.bfloat16: all are bfloat16, or float32"):
        moe_plain.moe_experts(device, x.bfloat16(), w13, w2, chosen, torch.empty(4, 2, device="meta"), 10.0)
