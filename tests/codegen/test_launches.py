"""Calls as launches: symbolic grids and arguments, results and scratch, buckets; and plans that say something else."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="kernels are compiled by triton, which is an extra")

from atomc.artifact.check_region import Problems, check_region
from atomc.artifact.plan import RegionPlan, Size, Slot
from atomc.codegen import hosts
from atomc.codegen.device import Device, cdiv
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
