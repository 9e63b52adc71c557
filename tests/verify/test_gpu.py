"""Artifacts for a GPU: every launched step is judged, on copies of an arena; what goes wrong is found and named."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from atomc.artifact.plan import RegionPlan, Slot, Step
from atomc.errors import AtomcError
from atomc.ops import OPS
from atomc.runtime.bind import Environment, value_of
from atomc.runtime.executor import Executor
from atomc.runtime.loader import load, read_plan
from atomc.runtime.watch import PlanMismatchError
from atomc.verify import Options, Verification, examine, verify_artifact, verify_steps
from atomc.verify.bisect import again, bisect, read_repro
from atomc.verify.steps import named_arguments
from tests.support.cli import Cli, environment
from tests.verify import fake_gpu
from tests.verify.conftest import Compiled
from tests.verify.fake_gpu import FakeGpu, install

# What a plan has on a GPU and not on the cpu.
ONLY_THERE = frozenset(
    f"atom.{name}.default"
    for name in ("hc_post", "linear_fp32", "pointwise", "scaled_grouped_output", "scaled_linear", "scaled_moe_experts")
)  # fmt: skip


def verified(artifact: Path, tokens: int = 40, region: str | None = None) -> Verification:
    return verify_artifact(artifact, (), Options(tokens, None, region))


def test_every_step_is_judged_and_within_its_bound(for_gpu: Compiled, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)
    found = verify_artifact(for_gpu.artifact, (), Options(80, str(for_gpu.checkpoint)))
    assert found.ok, found.problems
    assert found.weights
    _, regions = read_plan(for_gpu.artifact)
    expected = sum(len(region.prepare) + len(region.steps) for region in regions.values())
    assert len(found.steps) == expected
    judged = {step.op for step in found.steps}
    assert judged >= ONLY_THERE
    exact = {s.op for s in found.steps if s.worst.bound == 0}
    assert not exact & (ONLY_THERE - {"atom.pointwise.default"})


def test_a_step_that_is_skipped_is_watched_but_not_judged(for_gpu: Compiled, monkeypatch: pytest.MonkeyPatch) -> None:
    program, regions = read_plan(for_gpu.artifact)
    plan = regions[program.calls[1].region]
    experts = "atom.scaled_moe_experts.default"

    def fault(step: Step, results: list[Tensor], env: Environment, device: FakeGpu) -> None:
        if step.op == experts:
            results[0].zero_()

    install(monkeypatch, fault)
    artifact = load(for_gpu.artifact)
    judged = verify_steps(artifact, range(3, 30), Options(27, None, plan.name))
    skipped = verify_steps(artifact, range(3, 30), Options(27, None, plan.name, frozenset({experts})))
    assert [s.op for s in judged.steps if not s.ok] == [experts]
    assert skipped.ok
    assert {s.op for s in judged.steps} - {s.op for s in skipped.steps} == {experts}
    assert skipped.weights is None


LOADS = """
import sys
import torch, atomc
from pathlib import Path
from atomc.runtime import loader
loader.device_arch = lambda: "sm_90"
before = set(sys.modules)
loaded = loader.load(Path(sys.argv[1]))
assert any(step.op == "atom.pointwise.default" for region in loaded.regions.values() for step in region.steps)
print([name for name in ("torch._dynamo", "torch._inductor", "triton", "sympy") if name in set(sys.modules) - before])
"""


def test_loading_imports_no_compiler(for_gpu: Compiled, repo_root: Path) -> None:
    command = [sys.executable, "-c", LOADS, str(for_gpu.artifact)]
    run = subprocess.run(command, cwd=repo_root, capture_output=True, text=True, timeout=120)
    assert (run.returncode, run.stdout.strip()) == (0, "[]"), run.stderr


# -- mistakes of kernels -----------------------------------------------------------------------------------------------

Change = Callable[[dict[str, Any]], dict[str, Any]]


def wrong_arguments(op: str, tensor: str, change: Change, plan: RegionPlan) -> fake_gpu.Fault:
    """The step of `op` that reads the weight `tensor` computes with other arguments."""

    def fault(step: Step, results: list[Tensor], env: Environment, device: FakeGpu) -> None:
        slots = {item.slot for item in plan.inputs if item.name == tensor}
        reads = {a.id for a in (*step.args, *step.kwargs.values()) if isinstance(a, Slot)}
        if step.op == f"atom.{op}.default" and step in plan.steps and slots & reads:
            given = named_arguments(step.op, [value_of(a, env, {}) for a in step.args], {})
            assert not step.kwargs
            found = OPS[op].cpu(**(given | change(given)))
            before = results[0].clone()
            results[0].copy_(found)
            assert not torch.equal(before.contiguous().view(torch.uint8), results[0].contiguous().view(torch.uint8))

    return fault


def doubled(given: dict[str, Any], name: str) -> dict[str, Any]:
    """One scale, twice as large."""
    scales = given[name].clone()
    scales.view(torch.uint8).view(-1)[0] += 1
    return {name: scales}


def without_last_block(given: dict[str, Any]) -> dict[str, Any]:
    codes = given["codes"].clone()
    codes.view(torch.uint8)[..., codes.shape[-1] // 128 * 128 - 128 :] = 0
    return {"codes": codes}


def swapped(given: dict[str, Any], name: str, dim: int) -> dict[str, Any]:
    """Two rows of a weight in each other's place."""
    order = torch.arange(given[name].shape[dim])
    order[:2] = torch.tensor([1, 0])
    return {name: given[name].view(torch.uint8).index_select(dim, order).view(given[name].dtype)}


MISTAKES: list[tuple[str, str, str, Change]] = [
    ("wrong scale", "scaled_linear", "attn.wq_b.weight", lambda g: doubled(g, "weight_scales")),
    ("dropped last block", "scaled_linear", "attn.wo_b.weight", without_last_block),
    ("swapped rows", "scaled_linear", "attn.wq_b.weight", lambda g: swapped(g, "weight", 0)),
    ("wrong scale", "scaled_grouped_output", "attn.wo_a.weight", lambda g: doubled(g, "weight_scales")),
    ("swapped rows", "scaled_grouped_output", "attn.wo_a.weight", lambda g: swapped(g, "weight", 0)),
    ("wrong scale", "scaled_moe_experts", "ffn.experts.w13", lambda g: {"w13_scales": g["w13_scales"].roll(1, -2)}),
    ("dropped last block", "scaled_moe_experts", "ffn.experts.w13", without_last_block),
    ("swapped experts", "scaled_moe_experts", "ffn.experts.w13", lambda g: swapped(g, "w2", 0)),
    (
        "dropped columns",
        "linear_fp32",
        "ffn.gate.weight",
        lambda g: {"x": g["x"] * (torch.arange(g["x"].shape[1]) < 128)},
    ),
]


@pytest.mark.parametrize(("what", "op", "tensor", "change"), MISTAKES, ids=[f"{m[0]}, {m[1]}" for m in MISTAKES])
def test_a_mistake_of_a_kernel_is_found_and_named(
    for_gpu: Compiled, monkeypatch: pytest.MonkeyPatch, what: str, op: str, tensor: str, change: Change
) -> None:
    program, regions = read_plan(for_gpu.artifact)
    plan = regions[program.calls[1].region]
    install(monkeypatch, wrong_arguments(op, tensor, change, plan))
    found = verified(for_gpu.artifact, region=plan.name)
    assert [(s.op, s.region) for s in found.steps if not s.ok] == [(f"atom.{op}.default", plan.name)]
    (message,) = found.problems
    assert f"atom.{op}" in message and f"layers.0.{tensor}" in message and message.startswith("step ")
    assert found.first is not None and found.first.report.op == f"atom.{op}.default"


# -- memory ------------------------------------------------------------------------------------------------------------


def first_at(plan: RegionPlan, op: str) -> int:
    return next(at for at, step in enumerate(plan.steps) if step.op == f"atom.{op}.default")


def test_what_a_step_writes_over_is_named_with_who_had_left_it(
    for_gpu: Compiled, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The value of one step, written over by another before it is read: both are right by their own numbers."""
    program, regions = read_plan(for_gpu.artifact)
    plan = regions[program.calls[1].region]
    made = first_at(plan, "rms_norm_pair_quant")
    kept = plan.steps[made].outputs[2]  # kv, which the step after the next reads
    assert kept is not None

    def fault(step: Step, results: list[Tensor], env: Environment, device: FakeGpu) -> None:
        if step == plan.steps[made]:
            offset = plan.slots[kept].offset
            assert offset is not None
            victim.append(device.arena[offset : offset + 3])
        elif victim:
            victim.pop().bitwise_xor_(1)

    victim: list[Tensor] = []
    install(monkeypatch, fault)
    found = verified(for_gpu.artifact, region=plan.name)
    (message,) = found.problems
    assert f"is not what step {made} (atom.rms_norm_pair_quant.default) left: 3 bytes were written over" in message


def test_weights_and_state_that_are_written_over_are_named(for_gpu: Compiled, monkeypatch: pytest.MonkeyPatch) -> None:
    program, regions = read_plan(for_gpu.artifact)
    plan = regions[program.calls[1].region]
    weight = next(i.slot for i in plan.inputs if i.name == "attn.wo_b.weight")
    window = next(i.slot for i in plan.inputs if i.name == "window")

    def fault(step: Step, results: list[Tensor], env: Environment, device: FakeGpu) -> None:
        if step == plan.steps[first_at(plan, "qk_norm_rope_insert")]:
            env[weight].view(torch.uint8)[0, 0] ^= 1
        if step == plan.steps[first_at(plan, "scaled_grouped_output")]:
            env[window].view(torch.uint8).view(-1)[-1] ^= 1

    install(monkeypatch, fault)
    found = verified(for_gpu.artifact, region=plan.name)
    said = "\n".join(found.problems)
    assert "layers.0.attn.wo_b.weight: weight is not what the artifact left: 1 bytes were written over" in said
    assert "layers.0.window" in said and "(atom.qk_norm_rope_insert.default) left: 1 bytes were written over" in said


def test_state_that_a_capture_leaves_behind_is_seen(for_gpu: Compiled, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)
    monkeypatch.setattr(Executor, "_forget", lambda self: None)
    program, _ = read_plan(for_gpu.artifact)
    found = verified(for_gpu.artifact, region=program.calls[1].region)
    assert found.problems
    assert all("is not what the executor left" in problem for problem in found.problems)


def test_a_result_in_another_place_is_refused(for_gpu: Compiled, monkeypatch: pytest.MonkeyPatch) -> None:
    def fault(step: Step, results: list[Tensor], env: Environment, device: FakeGpu) -> None:
        slot = step.outputs[0] if step.op == "atom.rms_norm_pair_quant.default" else None
        if slot is not None:
            env[slot] = env[slot].clone()

    install(monkeypatch, fault)
    with pytest.raises(PlanMismatchError, match=r"rms_norm_pair_quant.* of the arena, the plan says"):
        verified(for_gpu.artifact)


# -- repro -------------------------------------------------------------------------------------------------------------


def test_a_repro_launches_the_step_again(for_gpu: Compiled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program, regions = read_plan(for_gpu.artifact)
    plan = regions[program.calls[1].region]
    with monkeypatch.context() as patch:
        install(patch, wrong_arguments("scaled_linear", "attn.wq_b.weight", lambda g: swapped(g, "weight", 0), plan))
        found = verified(for_gpu.artifact, region=plan.name)
        assert found.first is not None
        repro = bisect(found.first, tmp_path / "repro")
        assert repro.before > repro.after == 1
        recorded = read_repro(tmp_path / "repro")
        assert recorded.launched is not None and recorded.launched.gpu is None
        kernels = recorded.launched.kernels()
        assert kernels and {f.stem for f in (tmp_path / "repro" / "kernels").glob("*.bin")} == kernels
        assert not all(v.ok for v in examine(again(recorded)))
    with monkeypatch.context() as patch:
        install(patch)
        assert all(v.ok for v in examine(again(recorded)))  # with nothing wrong
    assert not all(v.ok for v in examine(recorded))


def test_a_value_of_the_program_has_memory_in_a_repro(
    for_gpu: Compiled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has no place in the arena."""
    program, regions = read_plan(for_gpu.artifact)
    plan = regions[program.calls[1].region]
    made = next(s for s in plan.steps if s.buckets and set(s.outputs) & set(plan.outputs.values()))
    at = next(i for i, slot in enumerate(made.outputs) if slot in plan.outputs.values())
    assert plan.slots[made.outputs[at] or 0].offset is None

    def fault(step: Step, results: list[Tensor], env: Environment, device: FakeGpu) -> None:
        if step.op == made.op and step.source == made.source:
            env[step.outputs[at] or 0].mul_(2)

    install(monkeypatch, fault)
    found = verified(for_gpu.artifact, region=plan.name)
    assert found.first is not None and found.first.report.op == made.op
    assert bisect(found.first, tmp_path / "repro").after == 1
    assert not all(v.ok for v in examine(again(read_repro(tmp_path / "repro"))))


@pytest.mark.slow
def test_a_repro_without_its_gpu_says_so(for_gpu: Compiled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program, regions = read_plan(for_gpu.artifact)
    plan = regions[program.calls[1].region]
    with monkeypatch.context() as patch:
        install(patch, wrong_arguments("scaled_linear", "attn.wq_b.weight", lambda g: swapped(g, "weight", 0), plan))
        found = verified(for_gpu.artifact, region=plan.name)
        assert found.first is not None
        bisect(found.first, tmp_path / "repro")
    script = tmp_path / "repro" / "repro.py"
    ran = subprocess.run([sys.executable, script], env=environment(), capture_output=True, text=True, timeout=300)
    assert ran.returncode == 1
    assert "recorded: out 0: BROKEN" in ran.stdout
    assert ran.stderr == "The step is compiled for h100 (sm_90), and this machine has no GPU.\n"


def test_arguments_keep_their_strides(for_gpu: Compiled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a step that reads a slice: its kernel is told of them."""
    program, regions = read_plan(for_gpu.artifact)
    plan = regions[program.calls[1].region]

    def fault(step: Step, results: list[Tensor], env: Environment, device: FakeGpu) -> None:
        if step == plan.steps[first_at(plan, "rms_norm_pair_quant")]:
            results[0].view(torch.uint8).zero_()

    install(monkeypatch, fault)
    found = verified(for_gpu.artifact, region=plan.name)
    assert found.first is not None
    bisect(found.first, tmp_path / "repro")
    step = json.loads((tmp_path / "repro" / "step.json").read_text())
    read = read_repro(tmp_path / "repro").arguments["q"]
    assert list(read.stride()) == step["arguments"]["q"]["stride"]
    assert read.stride(0) > read.shape[1]


# -- refused -----------------------------------------------------------------------------------------------------------


def test_a_machine_without_the_gpu_says_so_in_one_line(cli: Cli, for_gpu: Compiled) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(AtomcError) as raised:
        verified(for_gpu.artifact)
    said = f"{for_gpu.artifact} is compiled for h100 (sm_90), and this machine has no GPU."
    assert raised.value.message.startswith(said)
    ran = cli("verify", for_gpu.artifact)
    assert ran.code != 0 and "Traceback" not in ran.err and ran.out == ""
