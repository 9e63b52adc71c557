"""Pairs sorted by expert where some have none of the rank's own: last in the order, in no tile."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="kernels are compiled by triton, which is an extra")

from atomc.codegen.aot import build
from atomc.codegen.assertions import faults_of
from atomc.codegen.device import Recorder
from atomc.targets import get_target

# In the interpreter, which needs a process of its own: one kernel for few pairs, three for many.
PROGRAM = """
from tests.support.interpreter import correct
correct()
import torch
from atomc.codegen.device import TorchDevice
from atomc.codegen.kernels.moe_sort import sort
from atomc.targets import get_target
torch.manual_seed(0)
for t, k, e, tokens in [(1, 1, 2, 1), (5, 2, 4, 5), (7, 3, 8, 16), (260, 6, 12, 300), (300, 6, 8, 400)]:
    for share in (0.0, 0.5, 0.9, 1.0):
        indices = torch.stack([torch.randperm(e)[:k] for _ in range(t)])
        indices[torch.rand(t, k) < share] = -1
        device = TorchDevice(get_target("h100"), tokens, "cpu")
        found = sort(device, torch.zeros(t, 16), None, None, indices, e, 16, "plain")
        pairs = indices.flatten()
        assert found.order.tolist() == torch.where(pairs < 0, e, pairs).argsort(stable=True).tolist(), (t, share)
        want, first = [], 0
        for expert in range(e):
            count = int((pairs == expert).sum())
            want += [[expert, first + at, min(16, count - at)] for at in range(0, count, 16)]
            first += count
        tiles = int(found.plan[0])
        assert found.plan[1 : 1 + 3 * tiles].view(-1, 3).tolist() == want, (t, share)
print("ok")
"""


@pytest.mark.slow
def test_pairs_of_no_expert_are_last_and_in_no_tile(repo_root: Path) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=repo_root, env=environment, capture_output=True, text=True, timeout=600
    )
    assert ran.stdout == "ok\n", ran.stdout + ran.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("target", ["mi355x", "h100"])
def test_the_kernels_that_sort_compile(target: str) -> None:
    from tests.kernels.moe import AOT

    known, seen = get_target(target), set()
    for name, call in AOT:
        if not name.startswith("experts"):
            continue
        recorder = Recorder(known, int(name.rpartition(" ")[2]))
        call(recorder)
        for variant in recorder.variants:
            if variant.name in ("sort_few", "count_pairs", "place_pairs") and variant.name not in seen:
                seen.add(variant.name)
                assert faults_of(variant, build(variant, known).facts, known) == [], variant.name
    assert seen == {"sort_few", "count_pairs", "place_pairs"}
