"""The lanes of every kernel family that need no GPU: the interpreter, in a process of its own, and ahead of time.

`interp`: each case against the operator's reference. `aot`: the shapes of V4-Flash and V4-Pro compile for every target,
and what `atomc.codegen.assertions` asserts of code objects holds: no spill, a matrix instruction and loads of 16 bytes
where the kernel has a product, shared memory that the target has. About 550 variants for each target: an excerpt of
them, or all with --every-kernel (`make kernels`). The gpu lane: `tests.kernels.lane`.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="kernels are compiled by triton, which is an extra")

from atomc.codegen.aot import build, key
from atomc.codegen.assertions import faults_of, has_product
from atomc.codegen.device import Recorder, Variant
from atomc.targets import TARGETS, Target, get_target

FAMILIES = sorted(p.stem for p in Path(__file__).parent.glob("*.py") if not p.stem.startswith(("lane", "test_")))
GPUS = [name for name, target in TARGETS.items() if target.is_gpu and name != "h200"]  # h200 is an h100 to a compiler
EXCERPT = 8  # one variant in so many is compiled in `make test`, beside both ends of each kernel's table


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_case_is_the_reference_in_the_interpreter(family: str, repo_root: Path) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.kernels.lane", "interp", family]
    ran = subprocess.run(command, cwd=repo_root, env=environment, capture_output=True, text=True, timeout=900)
    assert ran.returncode == 0, ran.stdout[-6000:] + ran.stderr[-2000:]
    assert "ok   " in ran.stdout


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_every_case_is_the_reference_on_a_gpu(family: str, repo_root: Path) -> None:
    command = [sys.executable, "-m", "tests.kernels.lane", "gpu", family]
    ran = subprocess.run(command, cwd=repo_root, capture_output=True, text=True, timeout=900)
    assert ran.returncode == 0, ran.stdout[-6000:] + ran.stderr[-2000:]
    assert "ok   " in ran.stdout


# -- ahead of time -----------------------------------------------------------------------------------------------------


def variants_of(family: str, target: Target) -> dict[str, tuple[str, Variant]]:
    """Key -> the first case that launches it, and what it launches."""
    found: dict[str, tuple[str, Variant]] = {}
    for name, call in importlib.import_module(f"tests.kernels.{family}").AOT:
        recorder = Recorder(target, int(name.rpartition(" ")[2]))
        call(recorder)
        for variant in recorder.variants:
            found.setdefault(key(variant, target), (name, variant))
    return found


def excerpt(found: dict[str, tuple[str, Variant]]) -> dict[str, tuple[str, Variant]]:
    """Of each kernel the first and the last of its table, and of all others one in EXCERPT, by their keys.

    A key follows the kernel's text: the same commit always compiles the same, a changed kernel draws others.
    """
    ends: dict[str, list[str]] = {}
    for name, (_, variant) in found.items():
        ends.setdefault(variant.name, []).append(name)
    kept = {name for names in ends.values() for name in (names[0], names[-1])}
    return {k: v for k, v in found.items() if k in kept or int(k[:8], 16) % EXCERPT == 0}


@pytest.mark.slow
@pytest.mark.parametrize("target", GPUS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_kernel_compiles_for_every_target(family: str, target: str, request: pytest.FixtureRequest) -> None:
    known = get_target(target)
    found = variants_of(family, known)
    if not request.config.getoption("--every-kernel"):
        found = excerpt(found)
    assert found
    for name, variant in found.values():
        assert faults_of(variant, build(variant, known).facts, known) == [], (
            f"{name}: {variant.name} for {target} {dict(variant.constants)}"
        )


@pytest.mark.parametrize("target", GPUS)
def test_an_excerpt_has_both_ends_of_every_kernel(target: str) -> None:
    found = variants_of("moe", get_target(target))
    some = excerpt(found)
    kernels = {variant.name for _, variant in found.values()}
    assert {variant.name for _, variant in some.values()} == kernels and len(some) < len(found) / 2
    assert {"experts 1", "experts 8192"} <= {name for name, _ in some.values()}
    products = {variant.name for _, variant in found.values() if has_product(variant.kernel)}
    assert products == {"experts_in", "experts_out"} | ({"experts_folded"} if target == "h100" else set())
