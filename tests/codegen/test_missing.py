"""What a target cannot run: counted from the plan, views left out, all in one error."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from atomc.codegen import hosts
from atomc.codegen.aot import KernelError
from atomc.codegen.missing import Missing, is_view, missing_kernels, refuse
from atomc.runtime.loader import read_plan
from atomc.targets import get_target


def test_the_cpu_runs_everything(artifact: Path) -> None:
    _, regions = read_plan(artifact)
    assert all(missing_kernels(region, get_target("cpu")) == [] for region in regions.values())


@pytest.mark.parametrize("target", ["mi355x", "h100"])
def test_every_step_that_makes_data_needs_a_kernel(artifact: Path, target: str) -> None:
    """A plan for the cpu has operators that no kernel computes: chains of pointwise ones, dequantised weights."""
    _, regions = read_plan(artifact)
    for region in regions.values():
        steps = [(s.op, s) for s in region.steps if s.op not in hosts.HOSTS]
        steps += [(s.op, s) for s in region.prepare if s.op not in hosts.PREPARES]
        expected = Counter(op for op, step in steps if not is_view(step, region))
        found = missing_kernels(region, get_target(target))
        assert {m.op: m.count for m in found} == expected
        for item in found:
            assert item.source in {step.source for op, step in steps if op == item.op}
            assert ".py:" in item.source
    csa = missing_kernels(regions["layer_csa_topk"], get_target(target))
    assert "aten.mul.Tensor" in {m.op for m in csa}
    assert not any("slice" in m.op or "transpose" in m.op for m in csa)


def test_an_operator_with_a_kernel_is_not_missing(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, regions = read_plan(artifact)
    region = regions["layer_csa_topk"]
    monkeypatch.delitem(hosts.HOSTS, "atom.swiglu.default")
    assert "atom.swiglu.default" in {m.op for m in missing_kernels(region, get_target("mi355x"))}
    monkeypatch.setitem(hosts.HOSTS, "atom.swiglu.default", ("kernels.swiglu", "swiglu"))
    assert "atom.swiglu.default" not in {m.op for m in missing_kernels(region, get_target("mi355x"))}


def test_every_host_function_is_there() -> None:
    pytest.importorskip("triton", reason="kernels are written in triton, which is an extra")
    for op in hosts.HOSTS:
        host = hosts.host_of(op, get_target("h100"))
        assert callable(host), op
        assert hosts.host_of(op, get_target("cpu")) is None
    assert hosts.host_of("aten.mm.default", get_target("h100")) is None


def test_without_triton_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {wanted!r}", name=wanted)

    monkeypatch.setattr(hosts, "import_module", absent)
    wanted = "triton"
    with pytest.raises(KernelError, match=r"kernels for h100 are compiled by Triton: pip install 'atomc\[kernels\]'"):
        hosts.host_of("atom.swiglu.default", get_target("h100"))
    wanted = "other"
    with pytest.raises(ModuleNotFoundError):
        hosts.host_of("atom.swiglu.default", get_target("h100"))


def test_the_error_lists_each_operator_once() -> None:
    missing = [
        Missing("atom.rope.default", "layer_a", 2, "model.py:1"),
        Missing("aten.bmm.default", "layer_a", 1, "model.py:2"),
        Missing("atom.rope.default", "layer_b", 3, "model.py:3"),
    ]
    error = refuse(missing, get_target("mi355x"))
    assert error.missing == (missing[0], missing[2], missing[1])
    lines = [" ".join(line.split()) for line in error.message.splitlines()]
    assert lines[0] == "target mi355x: no kernel for 2 operators, so nothing was written:"
    assert lines[1] == "atom.rope.default 5 in 2 regions, first in layer_a at model.py:1"
    assert lines[2] == "aten.bmm.default 1 in 1 region, first in layer_a at model.py:2"
    assert error.exit_code == 6
