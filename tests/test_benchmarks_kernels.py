"""The cases of `benchmarks/kernels.py`: each launches, each reference runs, and what is counted is what is moved."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from atomc.models.bundled import bundled_config
from atomc.targets import get_target
from tests.support.tiny import tiny_config

FAMILIES = ("linear", "gemm", "experts", "attention", "indexer", "compressor", "hyper_connection", "norm", "router",
            "cache", "swiglu", "sort", "pointwise")  # fmt: skip
# Rows of 512 and of 128 channels are what row layouts are of; all else is small.
SMALL: dict[str, Any] = {
    "hidden_size": 256, "num_attention_heads": 4, "head_dim": 512, "qk_rope_head_dim": 64, "q_lora_rank": 128,
    "o_groups": 2, "o_lora_rank": 128, "index_n_heads": 64, "index_head_dim": 128, "index_topk": 8,
    "n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 128, "sliding_window": 128,
}  # fmt: skip


@pytest.fixture
def bench(repo_root: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module of the cases, at sizes that a reference computes at once."""
    monkeypatch.setattr(sys, "path", [str(repo_root / "benchmarks"), *sys.path])
    cases = importlib.import_module("kernel_cases")
    for name, value in (("DECODE", (1, 3)), ("PREFILL", (256,)), ("CONTEXTS", (256, 512))):
        monkeypatch.setattr(cases, name, value)
    return cases


@pytest.mark.parametrize("family", FAMILIES)
def test_every_case_runs_in_plain_torch_and_launches_for_a_gpu(bench: Any, family: str) -> None:
    inputs, device = importlib.import_module("kernel_inputs"), importlib.import_module("kernel_device")
    config, target = tiny_config(**SMALL), get_target("h100")
    assert set(bench.FAMILIES) == set(FAMILIES)
    for case in bench.FAMILIES[family](config):
        at, fake = inputs.Inputs("cpu"), inputs.Inputs("meta")
        _, function, make = case.peer
        expected = function(*make(at))
        result, recorder = device.record(target, case.tokens, case.host(target), case.make(fake))
        assert recorder.variants, case.name
        _, real = device.record(target, case.tokens, case.host(target), case.make(at))
        assert {device.label(v) for v in real.variants} == {device.label(v) for v in recorder.variants}, case.name
        if isinstance(expected, torch.Tensor) and isinstance(result, torch.Tensor):
            # A peer that is not the reference may give a result before its last view.
            assert result.shape[0] == expected.shape[0], case.name
            assert case.plain is not None or result.shape == expected.shape, case.name
        assert case.bytes is None or case.bytes > 0, case.name


@pytest.mark.parametrize("family", ["cache", "norm", "compressor"])
def test_what_inductor_gets_is_one_graph(bench: Any, family: str) -> None:
    peers, inputs = importlib.import_module("kernel_peers"), importlib.import_module("kernel_inputs")
    case = next(bench.FAMILIES[family](tiny_config(**SMALL)))
    arguments = case.make(inputs.Inputs("cpu"))
    kept = [a.clone() if isinstance(a, torch.Tensor) else a for a in arguments]
    expected = case.peer[1](*kept)
    with peers.followed():
        torch._dynamo.reset()
        found = torch.compile(case.peer[1], backend="eager", fullgraph=True)(*arguments)
    torch.testing.assert_close(found, expected)
    for a, b in zip(arguments, kept, strict=True):
        assert not isinstance(a, torch.Tensor) or torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def test_bytes_and_operations_of_a_linear_are_its_own(bench: Any) -> None:
    kernels = importlib.import_module("kernels")
    case = next(bench.linears(bundled_config("deepseek-v4-flash")))
    inputs, device = importlib.import_module("kernel_inputs"), importlib.import_module("kernel_device")
    arguments = case.make(inputs.Inputs("meta"))
    result, _ = device.record(get_target("h100"), case.tokens, case.host(get_target("h100")), arguments)
    n, k = 1536, 4096
    assert case.flops == 2 * n * k
    assert bench.size_of(arguments) + bench.size_of(result) == k + k // 128 + n * k + n * k // 128**2 + 2 * n
    row = kernels.Row("linear", "flash", case.name, 1, 8e9, 1e12, "fp8")
    row.judge(4e-3, {"copy": 4e12, "fp8": 1e15})
    assert (row.bound, row.share, row.bytes_per_s) == ("copy", pytest.approx(0.5), pytest.approx(2e12))


def test_grouped_experts_are_the_operator(bench: Any) -> None:
    torch.manual_seed(0)
    t, e, d, i, k = 5, 6, 32, 16, 2
    x, w13, w2 = torch.randn(t, d), torch.randn(e, 2 * i, d) / 6, torch.randn(e, d, i) / 4
    given = [part.bfloat16() for part in (x, w13, w2)]
    indices = torch.rand(t, e).topk(k).indices
    weights = torch.rand(t, k)
    wanted = torch.ops.atom.moe_experts(*given, indices, weights, 10.0)
    torch.testing.assert_close(
        importlib.import_module("grouped").grouped_experts(*given, indices, weights, 10.0), wanted, rtol=0.02, atol=0.02
    )


def test_kernels_of_other_sources_are_refused(bench: Any, tmp_path: Path) -> None:
    device = importlib.import_module("kernel_device")
    (tmp_path / "sources.txt").write_text("of another day")
    with pytest.raises(SystemExit, match="other sources"):
        device.build(tmp_path, [], get_target("h100"))


class Silent:
    """A device whose launches do nothing."""

    def __init__(self, *_: Any) -> None:
        self.target, self.tokens, self.made = get_target("h100"), 0, set[str]()

    def empty(self, shape: Any, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(tuple(shape), dtype=dtype)

    def launch(self, *_: Any, **__: Any) -> None:
        return None

    def library(self, name: str, arguments: Any) -> bool:
        return not arguments()


def timed(calls: Any, *_: Any, **__: Any) -> float:
    """Seconds of calls that are made once."""
    for call in calls if isinstance(calls, list) else [calls]:
        call()
    return 1e-3


def test_a_run_measures_all_and_writes_it(bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels, peers = importlib.import_module("kernels"), importlib.import_module("kernel_peers")
    inputs, out = importlib.import_module("kernel_inputs"), tmp_path / "out.json"
    monkeypatch.setattr(kernels, "bundled_config", lambda _: tiny_config(**SMALL))
    monkeypatch.setattr(kernels, "Inputs", lambda device: inputs.Inputs("meta" if device == "meta" else "cpu"))
    for module in (kernels, peers):
        monkeypatch.setattr(module, "replayed", timed)
        monkeypatch.setattr(module, "copies", lambda _: 2)
    monkeypatch.setattr(peers, "called", timed)
    monkeypatch.setattr(kernels, "BuiltDevice", Silent)
    monkeypatch.setattr(kernels, "build", lambda *_: 0)
    rates = {"copy": 1e12, "copy_by": "copy_ of 1 GiB", "bandwidths": {}, "bf16": 1e15, "fp8": 2e15}
    monkeypatch.setattr(kernels, "ceilings", lambda: rates)
    for module in (kernels, peers):
        monkeypatch.setattr(module, "trim", lambda: None)
        monkeypatch.setattr(module, "still_works", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "none")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1 << 40, 1 << 40))
    families = ["linear", "router", "experts", "compressor", "attention", "indexer", "cache", "sort",
                "pointwise"]  # fmt: skip
    arguments = [*families, "--models", "flash", "--peers", "eager,cublas", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["kernels.py", *arguments])
    assert kernels.main() == 0
    rows = json.loads(out.read_text())["rows"]
    assert {row["family"] for row in rows} == set(families)
    assert not [row for row in rows if "reason" in row]
    assert all(row["seconds"] == 1e-3 and row["share"] >= 0 for row in rows)
    # FP8 products of the library are made on a GPU: why they are not here is what is written.
    for row in rows:
        assert row["peers"]["eager"]["seconds"] > 0
        if row["family"] == "linear" and "wo_a" not in row["name"]:
            assert "reason" in row["peers"]["cublas fp8 blocks"]
