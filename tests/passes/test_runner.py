"""The runner: invariants, promises, dumps, fingerprints."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType
from typing import ClassVar

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule

from atomc.passes import fusions, pipelines
from atomc.passes.canonicalize import Canonicalize, DeadCode
from atomc.passes.graph import PassError
from atomc.passes.runner import INVARIANTS, Context, Match, Pass, Report, invariant, run_pipeline
from tests.support.graphs import TOKENS, operators, randn, traced


def norm(x: Tensor, w: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * w


def graph() -> GraphModule:
    return traced(norm, randn(TOKENS, 8), randn(8))


@dataclass(frozen=True)
class Relu(Pass):
    """Puts a relu on the output, `times` times; breaks what Canonicalize ensured if `breaking`."""

    name: ClassVar[str] = "relu"
    requires: ClassVar[frozenset[str]] = frozenset({"values"})
    times: int = 1
    valued: bool = True

    def run(self, gm: GraphModule, ctx: Context) -> Report:
        output = next(n for n in gm.graph.nodes if n.op == "output")
        for _ in range(self.times):
            source = output.args[0]
            with gm.graph.inserting_before(output):
                node = gm.graph.call_function(torch.ops.aten.relu.default, (source,))
            if self.valued:
                node.meta["val"] = source.meta["val"]
            output.args = (node,)
        return Report([Match("?", f"{self.times}")])


# -- invariants --------------------------------------------------------------------------------------------------------


def test_a_missing_requirement_names_the_pass_and_what_is_there() -> None:
    with pytest.raises(PassError, match=r"region: pass 'fuse_rms_norm' requires \['canonical', 'values'\]") as error:
        run_pipeline((fusions.RMS_NORM,), graph(), Context("region"))
    assert "Add a pass that ensures it, or reorder the pipeline." in str(error.value)


def test_a_broken_invariant_names_the_pass_and_the_node() -> None:
    with pytest.raises(PassError, match=r"after pass 'relu', invariant 'values' does not hold: relu_default .* no"):
        run_pipeline((Canonicalize(), Relu(valued=False)), graph(), Context("region"))


def test_what_a_pass_breaks_is_no_longer_held() -> None:
    @dataclass(frozen=True)
    class Breaking(Relu):
        breaks: ClassVar[frozenset[str]] = frozenset({"values"})

    pipeline = (Canonicalize(), Breaking(valued=False))
    run_pipeline(pipeline, graph(), Context("region"))  # it says so: no error
    with pytest.raises(PassError, match=r"'dead_code' requires \['values'\]"):
        run_pipeline((*pipeline, DeadCode()), graph(), Context("region"))


def test_an_invariant_can_be_added() -> None:
    @invariant("few")
    def few(gm: GraphModule) -> str | None:
        return "many nodes" if len(operators(gm)) > 7 else None

    @dataclass(frozen=True)
    class Ensuring(Relu):
        ensures: ClassVar[frozenset[str]] = frozenset({"few"})

    try:
        run_pipeline((Canonicalize(), Ensuring()), graph(), Context("region"))
        with pytest.raises(PassError, match="'few' does not hold: many nodes"):
            run_pipeline((Canonicalize(), Ensuring(times=9)), graph(), Context("region"))
    finally:
        del INVARIANTS["few"]


def test_a_graph_that_does_not_lint_is_caught() -> None:
    class Dangling(Relu):
        def run(self, gm: GraphModule, ctx: Context) -> Report:
            other = graph()
            stranger = next(n for n in other.graph.nodes if n.op == "call_function")
            next(n for n in gm.graph.nodes if n.op == "output").args = (stranger,)
            return Report()

    with pytest.raises(RuntimeError):
        run_pipeline((Canonicalize(), Dangling()), graph(), Context("region"))


# -- promises ----------------------------------------------------------------------------------------------------------


def test_a_promise_that_is_kept() -> None:
    rows = run_pipeline((Canonicalize(), fusions.RMS_NORM), graph(), Context("r", {"fuse_rms_norm": 1}))
    assert [(r.label, r.expected, len(r.report.matches)) for r in rows[1:]] == [("fuse_rms_norm", 1, 1)]
    assert (rows[1].nodes_before, rows[1].nodes_after) == (9, 4)


def eps_inside(x: Tensor, w: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True).sqrt() + 1e-6) * w


def eps_moved(x: Tensor, w: Tensor) -> Tensor:
    return x * (torch.rsqrt(x.square().mean(-1, keepdim=True)) + 1e-6) * w


@pytest.mark.parametrize(
    ("fn", "reason"),
    [
        (eps_inside, "at div: expected aten.mul.Tensor, found aten.div.Tensor"),
        (eps_moved, "at add: expected aten.rsqrt, found aten.add.Tensor"),
    ],
)
def test_a_broken_promise_names_the_nearest_candidate_and_its_line(fn: FunctionType, reason: str) -> None:
    gm = traced(fn, randn(TOKENS, 8), randn(8))
    with pytest.raises(PassError) as error:
        run_pipeline((Canonicalize(), fusions.RMS_NORM), gm, Context("layer", {"fuse_rms_norm": 1}))
    message = str(error.value)
    assert message.startswith("layer: pass 'fuse_rms_norm' found 0 matches; the model promises 1.")
    line = fn.__code__.co_firstlineno + 1
    assert f"refused at passes/test_runner.py:{line}: nearest candidate, {reason}" in message


def test_more_matches_than_promised_are_an_error_too() -> None:
    with pytest.raises(PassError, match=r"found 1 matches; the model promises 0\.\n  matched at passes/test_run"):
        run_pipeline((Canonicalize(), fusions.RMS_NORM), graph(), Context("r", {"fuse_rms_norm": 0}))


# -- dumps and stops ---------------------------------------------------------------------------------------------------


def test_the_dump_folder_has_the_graph_after_each_pass(tmp_path: Path) -> None:
    run_pipeline((Canonicalize(), fusions.RMS_NORM, DeadCode()), graph(), Context("r"), dump=tmp_path / "ir")
    files = sorted(f.name for f in (tmp_path / "ir").iterdir())
    assert files == ["00_captured.py", "01_canonicalize.py", "02_fuse_rms_norm.py", "03_dead_code.py"]
    assert "torch.ops.aten.rsqrt" in (tmp_path / "ir" / "01_canonicalize.py").read_text()
    assert "torch.ops.atom.rms_norm" in (tmp_path / "ir" / "02_fuse_rms_norm.py").read_text()


def test_the_dump_of_a_failing_pass_is_written(tmp_path: Path) -> None:
    with pytest.raises(PassError):
        run_pipeline((Canonicalize(), Relu(valued=False)), graph(), Context("r"), dump=tmp_path)
    assert (tmp_path / "02_relu.py").exists()


def test_stop_after() -> None:
    gm = graph()
    rows = run_pipeline((Canonicalize(), fusions.RMS_NORM, Relu()), gm, Context("r"), stop_after="fuse_rms_norm")
    assert [r.label for r in rows] == ["canonicalize", "fuse_rms_norm"]
    assert operators(gm) == ["atom.rms_norm"]


# -- fingerprints ------------------------------------------------------------------------------------------------------


def test_options_are_part_of_the_fingerprint() -> None:
    assert Relu().fingerprint() == Relu(times=1).fingerprint() != Relu(times=2).fingerprint()
    prints = {p.label: p.fingerprint() for p in pipelines.compilation()}
    assert len(set(prints.values())) == len(prints) == len(pipelines.compilation())


def test_fingerprints_are_the_same_in_every_process() -> None:
    code = "from atomc.passes import pipelines; print(*(p.fingerprint() for p in pipelines.compilation()))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == [p.fingerprint() for p in pipelines.compilation()]
