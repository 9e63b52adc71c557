"""`atomc inspect` of an artifact for a GPU: kernels, formulas, predictions, the roofline. No kernel is compiled."""

from __future__ import annotations

import json
import re
import shutil
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from atomc.artifact.kernels import KernelFacts
from atomc.codegen.aot import Binary, key
from atomc.codegen.device import Variant
from atomc.compiler import Options, compile_model
from atomc.targets import Target
from tests.support.artifact import ONE_LAYER, write_checkpoint
from tests.support.cli import Cli

REGIONS = ["prologue", "layer_swa_hash", "head"]


def facts_of(variant: Variant, target: Target) -> KernelFacts:
    """As if it had been compiled."""
    return KernelFacts(
        name=variant.name, target=target.name, signature=[kind for _, kind in variant.signature], warps=variant.warps,
        wavefront=target.wavefront, stages=variant.stages, shared=4096, registers=96, spills=0, scalar_spills=0,
        matrix={"v_mfma_f32_32x32x16_bf16": 8} if "gemm" in variant.name else {}, loads=1, wide_loads=1,
        constants={name: str(value) for name, value in variant.constants},
    )  # fmt: skip


@pytest.fixture(scope="module")
def gpu_artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One layer for an MI355X, without weights."""
    pytest.importorskip("triton", reason="kernels are written in triton, which is an extra")
    folder = tmp_path_factory.mktemp("gpu")
    model, output = write_checkpoint(folder / "model", **ONE_LAYER), folder / "gpu.atom"
    options = Options(max_context=320, max_batch_tokens=48, max_requests=20, max_logit_rows=40, with_weights=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "atomc.compiler.build_kernels",
            lambda variants, target, _: {
                key(v, target): Binary(b"\x7fELF", facts_of(v, target)) for v in variants.values()
            },
        )
        compile_model(str(model), "mi355x", output, options)
    return output


def test_kernels_and_predicted_times_are_printed(cli: Cli, gpu_artifact: Path) -> None:
    out = cli("inspect", gpu_artifact, "--kernels").out
    words = re.sub(r"[│┃\s]+", " ", out)
    assert "for mi355x: predicted by the static model, not measured" in words
    assert "assumed, nothing was measured on it" in words and "rates measured" not in words
    for head in (
        "kernel key configuration chosen by registers spills LDS occupancy matrix instructions",
        "kernel key tokens predicted for bytes FLOPs µs bound in a step",
        "step context prologue, 1× layer_swa_hash, 1× head, 1×",
        "step context ms bound memory ms compute ms latency ms GB TFLOP launches",
    ):
        assert head in words
    assert "8×v_mfma_f32_32" in words and "static model 96 0 4,096 20/32 (registers)" in words
    assert re.findall(r"(decode|prefill) (\d+) \d+ [\d.]+ latency", words)[-3:] == [
        ("decode", "1"), ("decode", "16"), ("prefill", "48")]  # fmt: skip


def test_flags_choose_the_step(cli: Cli, gpu_artifact: Path) -> None:
    found = cli("inspect", gpu_artifact, "--kernels", "--batch", "7", "--context", "300", "--json").json
    assert found["memory_plan"]["requests"] == 7 and found["memory_plan"]["context"] == 300
    steps = found["predictions"]["steps"]
    assert [(s["tokens"], s["requests"], s["context"]) for s in steps] == [(7, 7, 300), (48, 1, 300)]
    cli("inspect", gpu_artifact, "--kernels", "--batch", "21").failed(2, "--batch 21", "--max-requests 20")
    cli("inspect", gpu_artifact, "--kernels", "--context", "321").failed(2, "--context 321", "--max-context 320")


def test_json_has_each_kernel_by_bucket_and_the_totals(cli: Cli, gpu_artifact: Path) -> None:
    found = cli("inspect", gpu_artifact, "--kernels", "--json").json["predictions"]
    assert found["predicted_with"]["rates"] == "assumed"
    kernels = found["kernels"]
    assert set(kernels) == {f.stem for f in (gpu_artifact / "kernels").glob("*.json")} and len(kernels) > 20
    for kernel in kernels.values():
        assert kernel["origin"] == "static model" and kernel["target"] == "mi355x"
        assert kernel["occupancy"]["most"] == 32 and kernel["buckets"]
        for bucket in kernel["buckets"]:
            assert bucket["predicted"]["bound"] in ("memory", "compute", "latency")
            assert bucket["predicted"]["seconds"] >= found["predicted_with"]["launch_seconds"]
    assert {bucket["bucket"] for kernel in kernels.values() for bucket in kernel["buckets"]} == {16, 48}
    for step in found["steps"]:
        assert list(step["regions"]) == REGIONS
        assert step["seconds"] == pytest.approx(sum(r["seconds"] * r["uses"] for r in step["regions"].values()))
    decode, launched = found["steps"][1], 0
    for kernel in kernels.values():
        launched += sum(b["launches_in_a_step"] for b in kernel["buckets"] if b["bucket"] == 16)
    assert decode["tokens"] == 16 and decode["launches"] == launched > 20


def test_operators_of_a_region_have_costs(cli: Cli, gpu_artifact: Path) -> None:
    out = cli("inspect", gpu_artifact, "--kernels", "--plan", "head").out
    assert "Operators of head" in out and "atom.linear_fp32" in out and "kernels for mi355x" not in out
    cli("inspect", gpu_artifact, "--kernels", "--plan", "tail").failed(2, "choose one of prologue")


def test_the_page_draws_a_roofline(cli: Cli, gpu_artifact: Path, tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    assert cli("inspect", gpu_artifact, "--html", path).code == 0
    page = path.read_text()
    assert "<script" not in page and "http" not in page
    plans = [json.loads(file.read_text()) for file in (gpu_artifact / "plan").glob("*.json")]
    slots = [slot for plan in plans for slot in plan.get("slots", [])]
    assert page.count('class="buffer"') == sum(slot["offset"] is not None for slot in slots) > 20
    scratch = [b["scratch"] for p in plans for s in p.get("steps", []) for b in s.get("buckets", [])]
    assert any(scratch)  # drawn too
    figure = ET.fromstring(re.search(r"<figure><svg[^>]*roofline.*?</figure>", page, re.DOTALL)[0])  # type: ignore[index]
    kernels = cli("inspect", gpu_artifact, "--kernels", "--json").json["predictions"]["kernels"]
    expected = {
        (key[:8], bucket["bucket"])
        for key, kernel in kernels.items()
        for bucket in kernel["buckets"]
        if bucket["predicted"]["flops"]
    }
    circles = [c for c in figure.iter("circle") if c.get("class") == "kernel"]
    assert len(circles) == len(expected) > 20
    assert {(c[0].text or "").split()[1] for c in circles} == {name for name, _ in expected}
    assert all(96 <= float(c.get("cx", 0)) <= 1120 and 0 <= float(c.get("cy", 0)) <= 620 for c in circles)
    text = "".join(figure.itertext())
    assert "Predicted by the static model, not measured" in text and "7.12 TB/s" in text
    assert all(name in text for name in ("bf16", "fp8", "fp4", "float32", "FLOPs of a byte", "bound: latency"))


def test_a_cpu_has_no_kernels_and_a_damaged_artifact_is_refused(
    cli: Cli, artifact: Path, gpu_artifact: Path, tmp_path: Path
) -> None:
    cli("inspect", artifact, "--kernels").failed(2, "cpu runs the references")
    assert cli("inspect", artifact, "--html", tmp_path / "x.html").code == 0
    assert "roofline" not in (tmp_path / "x.html").read_text()
    copy = Path(shutil.copytree(gpu_artifact, tmp_path / "copy.atom"))
    damaged = next((copy / "kernels").glob("*.json"))
    damaged.write_text(json.dumps(json.loads(damaged.read_text()) | {"warps": 0}))
    cli("inspect", copy, "--kernels").failed(1, damaged.name)
