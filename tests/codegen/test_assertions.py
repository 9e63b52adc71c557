"""What is asserted of code objects: each fault is told, an exemption covers what it names and no more."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
import torch

pytest.importorskip("triton", reason="kernels are compiled by triton, which is an extra")

from atomc.artifact.kernels import KernelFacts
from atomc.codegen.aot import build
from atomc.codegen.assertions import EXEMPT, Exempt, faults_of, has_product, is_exempt
from atomc.codegen.device import Recorder, Variant
from atomc.targets import get_target
from tests.kernels.test_lanes import FAMILIES, GPUS, variants_of
from tests.support.toy_kernels import add, crowded, rowwise_dot

H100 = get_target("h100")


def variant(kernel: Any, constants: dict[str, Any], *tensors: torch.Tensor, **sizes: int) -> Variant:
    recorder = Recorder(H100, 16)
    names = list(kernel.arg_names)
    recorder.launch(kernel, (1,), {**dict(zip(names, tensors, strict=False)), **sizes}, constants, warps=1)
    return recorder.variants[0]


TILE = torch.empty(64, 64, device="meta")
DOT, ADD = variant(rowwise_dot, {"N": 64}, TILE, TILE, TILE), variant(add, {"BLOCK": 64}, TILE, TILE, TILE, n=64)
FIT = KernelFacts(
    name="rowwise_dot", target="h100", signature=[], warps=4, wavefront=32, shared=1024, registers=64, spills=0,
    scalar_spills=9, matrix={"wgmma.mma_async": 4}, loads=6, wide_loads=2, stages=3, constants={}, dependent=True,
)  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "fault"),
    [
        ({}, None),
        ({"shared": 1 << 20}, "1048576 bytes of shared memory, of 232448"),
        ({"spills": 12}, "12 bytes of registers are spilled"),
        ({"matrix": {}}, "a product without matrix instructions"),
        ({"wide_loads": 0}, "none of its 6 loads has 16 bytes"),
        ({"dependent": False}, "it waits for no launch before it"),
    ],
)
def test_each_fault_of_a_product_is_told(changed: dict[str, Any], fault: str | None) -> None:
    found = faults_of(DOT, msgspec.structs.replace(FIT, **changed), H100)
    assert found == ([] if fault is None else [fault])


def test_what_is_no_product_needs_no_wide_loads_and_has_no_matrix_instructions() -> None:
    assert faults_of(ADD, msgspec.structs.replace(FIT, matrix={}, wide_loads=0), H100) == []
    assert faults_of(ADD, FIT, H100) == ["matrix instructions {'wgmma.mma_async': 4}"]
    assert has_product(rowwise_dot) and not has_product(add)


def test_a_kernel_that_spills_is_caught() -> None:
    spilling = variant(crowded, {"N": 128}, torch.empty(128, 128, device="meta"), torch.empty(128, 128, device="meta"))
    (fault,) = faults_of(spilling, build(spilling, H100).facts, H100)
    assert "bytes of registers are spilled" in fault


@pytest.mark.parametrize("exempt", EXEMPT, ids=lambda e: f"{e.kernel}, {e.assertion}")
def test_an_exemption_covers_some_of_what_its_kernel_is_launched_with(exempt: Exempt) -> None:
    launched = [
        v
        for family in FAMILIES
        for target in GPUS
        for _, v in variants_of(family, get_target(target)).values()
        if v.name == exempt.kernel
    ]
    covered = [is_exempt(exempt.assertion, v) for v in launched]
    assert all(covered) == (not exempt.constants)
    assert (exempt.most > 0) == (exempt.assertion == "spills")
    if exempt.constants != {"HB": 16}:  # only models smaller than those of the tables have so few heads
        assert any(covered)
    assert exempt.why


def test_an_exemption_of_spills_has_a_limit() -> None:
    (_, folded), *_ = [x for x in variants_of("moe", H100).values() if x[1].name == "experts_folded"]
    facts = msgspec.structs.replace(FIT, spills=64)
    assert faults_of(folded, facts, H100) == []
    assert faults_of(folded, msgspec.structs.replace(facts, spills=68), H100) == ["68 bytes of registers are spilled"]
