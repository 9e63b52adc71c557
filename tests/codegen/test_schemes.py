"""Every scheme for every GPU target: each step that makes data has a kernel, and the kernels compile.

All pairs are lowered; of their kernels an excerpt is compiled, drawn as `tests/kernels/test_lanes.py` draws, or with
--every-kernel all of them.
"""

from __future__ import annotations

from copy import deepcopy
from functools import cache
from typing import Any

import pytest

pytest.importorskip("triton", reason="kernels are compiled by triton, which is an extra")

from atomc import compiler
from atomc.artifact.plan import RegionPlan
from atomc.capture import Program
from atomc.codegen.aot import build
from atomc.codegen.assertions import faults_of
from atomc.codegen.device import Variant
from atomc.codegen.missing import missing_kernels
from atomc.models.source import open_model
from atomc.passes.scheme import SCHEMES
from atomc.targets import TARGETS, Target, get_target

GPUS = [name for name, target in TARGETS.items() if target.is_gpu and name != "h200"]  # h200 is an h100 to a compiler
EXCERPT = 64  # one kernel in so many is compiled in `make test`
SOURCE = open_model("deepseek-v4-nano", with_weights=False)


def options(scheme: str) -> compiler.Options:
    return compiler.Options(dtype="bfloat16", scheme=scheme, with_weights=False)


@cache
def program() -> Program:
    """The model, captured once."""
    chosen = options("none")
    return compiler.trace(SOURCE.config, serving(), chosen, lambda *_: None)


@cache
def serving() -> Any:
    return compiler.serving_facts(SOURCE, compiler.check_limits(options("none"), SOURCE.config))


def fused(scheme: str, target: Target) -> list[compiler.Compiled]:
    """The regions after the passes."""
    chosen, captured = options(scheme), deepcopy(program())
    quantisation = compiler.check_scheme(chosen, SOURCE.config, target)
    return [
        compiler.fuse(SOURCE, captured, region, quantisation, chosen, lambda *_: None) for region in captured.regions
    ]


@pytest.mark.slow
@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_step_has_a_kernel_on_every_target_and_kernels_compile(
    scheme: str, request: pytest.FixtureRequest
) -> None:
    every = request.config.getoption("--every-kernel")
    by_dialect: dict[str | None, list[compiler.Compiled]] = {}  # of a target the passes ask for nothing else
    for target in map(get_target, GPUS):
        if target.fp8 not in by_dialect:
            by_dialect[target.fp8] = fused(scheme, target)
        kernels: dict[str, Variant] = {}
        for compiled in by_dialect[target.fp8]:
            plan, made = compiler.lower(compiled, serving().bounds(), target)
            kernels |= made
            check(plan, target, f"{scheme} for {target.name}")
        for name in sorted(kernels):
            if every or int(name[:8], 16) % EXCERPT == 0:
                variant = kernels[name]
                found = faults_of(variant, build(variant, target).facts, target)
                assert found == [], f"{scheme} for {target.name}: {variant.name} {dict(variant.constants)}"


def check(plan: RegionPlan, target: Target, where: str) -> None:
    """Each step is launched, in every bucket, or makes no data."""
    assert missing_kernels(plan, target) == [], where
    for step in plan.steps:
        launched = [bool(bucket.launches) for bucket in step.buckets]
        views = [plan.slots[slot].base is not None for slot in step.outputs if slot is not None]
        assert all(launched) if launched else views and all(views), f"{where}: {step.op} at {step.source}"
