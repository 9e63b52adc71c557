"""The lanes of every kernel family that need no GPU: the interpreter, in a process of its own, and ahead of time.

`interp`: each case against the operator's reference. `aot`: the shapes of V4-Flash and V4-Pro compile for every target,
without a spill or with a listed, justified one, with a matrix instruction where the kernel has a product, and with
shared memory that the target has. Every shape for every target takes half an hour of two cores: `make kernels`. What
`make test` runs is each shape for one target, the next shape for the next. The gpu lane: `tests.kernels.lane`.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="kernels are compiled by triton, which is an extra")

from atomc.codegen.aot import build, default_store, key
from atomc.codegen.device import Recorder
from atomc.targets import TARGETS, get_target

FAMILIES = sorted(p.stem for p in Path(__file__).parent.glob("*.py") if p.stem not in ("lane", "test_lanes"))
GPUS = [name for name, target in TARGETS.items() if target.is_gpu and name != "h200"]  # h200 is an h100 to a compiler


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_case_is_the_reference_in_the_interpreter(family: str, repo_root: Path) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.kernels.lane", "interp", family]
    ran = subprocess.run(command, cwd=repo_root, env=environment, capture_output=True, text=True, timeout=900)
    assert ran.returncode == 0, ran.stdout[-6000:] + ran.stderr[-2000:]
    assert "ok   " in ran.stdout


@pytest.mark.slow
@pytest.mark.parametrize("target", GPUS)
@pytest.mark.parametrize("family", FAMILIES)
def test_kernels_compile_for_their_target(family: str, target: str) -> None:
    """Each shape of a family for one of the targets."""
    cases = importlib.import_module(f"tests.kernels.{family}")
    mine = [c for i, c in enumerate(cases.AOT) if i % len(GPUS) == GPUS.index(target)]
    if len(cases.AOT) >= len(GPUS):
        assert mine
    compile_all(mine, getattr(cases, "SPILLS", {}), target)


@pytest.mark.exhaustive
@pytest.mark.parametrize("target", GPUS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_kernel_compiles_for_every_target(family: str, target: str) -> None:
    cases = importlib.import_module(f"tests.kernels.{family}")
    assert compile_all(cases.AOT, getattr(cases, "SPILLS", {}), target) > 0


def compile_all(cases: Sequence[tuple[str, Callable[[Recorder], Any]]], spilling: dict[str, str], target: str) -> int:
    """Compile what the cases launch and hold it to what is promised of every kernel; how many there were."""
    known = get_target(target)
    store, seen = default_store(), 0
    for name, call in cases:
        recorder = Recorder(known, int(name.rpartition(" ")[2]))
        call(recorder)
        for variant in recorder.variants:
            binary = store.get(key(variant, known))
            if binary is None:
                binary = build(variant, known)
                store.put(key(variant, known), binary)
            facts, where = binary.facts, f"{name}: {variant.name} for {target} {dict(variant.constants)}"
            seen += 1
            assert facts.shared <= known.shared_bytes, where
            assert facts.spills == 0 or variant.name in spilling, f"{where}: {facts.spills} bytes of spills"
            if "tl.dot" in variant.kernel.src:
                assert facts.matrix, f"{where}: no matrix instruction"
    return seen
