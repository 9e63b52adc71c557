"""What the model promises of the passes, kept by every legal model, and what is said when a model breaks it."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from atomc.capture import Program, capture
from atomc.compiler import Options, compile_model
from atomc.models.deepseek_v4 import hyper_connection, layers, moe
from atomc.models.deepseek_v4.config import DeepseekV4Config
from atomc.models.deepseek_v4.promises import NONE, promised_matches
from atomc.passes import pipelines
from atomc.passes.graph import PassError
from atomc.passes.runner import Context, Row, run_pipeline
from atomc.passes.scheme import SCHEMES
from atomc.recipes import Load
from atomc.targets import get_target
from tests.support.tiny import tiny_dict
from tests.support.v4_configs import tiny

TABLES = (9, 8)


def fused(config: DeepseekV4Config, program: Program) -> Iterator[tuple[str, list[Row]]]:
    """Run the pipeline on every region under the model's promises."""
    for region in program.regions:
        paths = {i.placeholder: i.name for i in region.inputs if i.role == "weight"}
        recipes = {placeholder: Load(path) for placeholder, path in paths.items()}
        ctx = Context(region.name, promised_matches(config, region.name), dict(recipes), paths)
        yield region.name, run_pipeline(pipelines.compilation(), region.gm, ctx)


def keep(config: DeepseekV4Config, dtype: torch.dtype) -> None:
    for _ in fused(config, capture(config, dtype, TABLES)):
        pass


def test_every_pass_that_can_find_something_is_promised() -> None:
    # What they erase is no fact about the model, and what a checkpoint stores in bf16 none either.
    free = {"canonicalize", "dead_code", "wide_linears"}
    labels = {p.label for target in ("cpu", "h100") for p in pipelines.compilation(target=get_target(target))}
    assert labels - free == set(NONE)


@pytest.mark.parametrize(
    ("scheme", "target"),
    [
        *((s, "cpu") for s in SCHEMES),
        ("native", "h100"),
        ("native", "mi300x"),
        ("mxfp4", "mi355x"),
        ("none", "b200"),
    ],
)
def test_the_promises_of_every_scheme(scheme: str, target: str, tmp_path: Path) -> None:
    """All kinds of layers, sizes that fill no tile; a miss is an error of the compile."""
    config = tmp_path / "config.json"
    config.write_text(json.dumps(tiny_dict(num_hidden_layers=4, compress_ratios=[0, 16, 4, 4, 0], num_hash_layers=3)))
    for dtype in ("float32", "bfloat16"):
        options = Options(scheme=scheme, dtype=dtype, with_weights=False, stop_after="dead_code")
        result = compile_model(str(config), target, tmp_path / "unused", options)
        assert set(result.explanation) == {"prologue", "layer_swa_hash", "layer_hca_hash", "layer_csa_hash",
                                           "layer_csa_topk", "head"}  # fmt: skip
        kinds = {row.kind for table in result.layouts.values() for row in table}
        assert kinds == {"none": {"weight"}, "bf16": {"weight"} | ({"cache"} if dtype == "float32" else set())}.get(
            scheme, {"weight", "activation", "cache"}
        )


def test_the_promises_of_the_kinds() -> None:
    config = tiny(compress_ratios=[0, 16, 4], num_hash_layers=1)
    assert {k: n for k, n in promised_matches(config, "prologue").items() if n} == {"pointwise": 12}
    assert promised_matches(config, "layer_csa_topk")["fuse_compressor_pool_norm_rope_insert"] == 2
    assert promised_matches(config, "layer_swa_hash")["fuse_route_hash"] == 1
    with pytest.raises(KeyError):
        promised_matches(config, "layer_swa_topk")


# Where sizes coincide or vanish, operations do too; none of it may cost a match.
UNUSUAL: dict[str, dict[str, Any]] = {
    "one stream": {"hc_mult": 1},
    "one sinkhorn iteration": {"hc_mult": 2, "hc_sinkhorn_iters": 1},
    "all channels rotated": {"qk_rope_head_dim": 16, "head_dim": 16, "index_head_dim": 16},
    "one of everything": {
        "num_attention_heads": 1, "o_groups": 1, "index_n_heads": 1, "index_topk": 1, "num_experts_per_tok": 1,
        "n_routed_experts": 1,
    },
    "all widths equal": {
        "hidden_size": 48, "q_lora_rank": 48, "head_dim": 48, "index_head_dim": 48, "moe_intermediate_size": 48,
        "num_attention_heads": 4, "o_groups": 4, "o_lora_rank": 48, "n_routed_experts": 48, "vocab_size": 48,
    },
    "numbers that are 1 or equal": {"hc_eps": 1e-6, "rms_norm_eps": 1e-6, "routed_scaling_factor": 1.0},
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_models_keep_the_promises(name: str, dtype: torch.dtype) -> None:
    keep(tiny(compress_ratios=[0, 16, 4], num_hash_layers=1, **UNUSUAL[name]), dtype)


@pytest.mark.slow
@pytest.mark.parametrize("size", ["flash", "pro"])
def test_the_releases_keep_the_promises_in_little_time(repo_root: Path, size: str) -> None:
    file = repo_root / "models" / "configs" / f"deepseek-v4-{size}.json"
    config = DeepseekV4Config.from_dict(json.loads(file.read_text()))
    program = capture(config, torch.bfloat16, TABLES)
    start = time.process_time()
    rows = dict(fused(config, program))
    assert time.process_time() - start < 12
    assert len(rows) == len(program.regions) <= 7


# -- a model that breaks them ------------------------------------------------------------------------------------------


class EpsOutsideTheMean(layers.RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        rstd = torch.rsqrt(x.float().square().mean(-1, keepdim=True)) + self.eps
        return (x.float() * rstd * self.weight).to(x.dtype)


class RoundedBeforeTheWeight(layers.RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        rstd = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.eps)
        return self.weight * (x.float() * rstd).to(torch.bfloat16)


class RowsFirst(hyper_connection.HyperConnection):
    def sinkhorn(self, a: Tensor) -> Tensor:
        a = torch.softmax(a, dim=-1) + self.hc_eps
        for _ in range(self.iters):
            a = a / (a.sum(dim=-1, keepdim=True) + self.hc_eps)
            a = a / (a.sum(dim=-2, keepdim=True) + self.hc_eps)
        return a


class SoftmaxGate(moe.Gate):
    def forward(self, x_TD: Tensor, ids_T: Tensor) -> tuple[Tensor, Tensor]:
        scores = torch.softmax(x_TD.float() @ self.weight.T, dim=-1)
        indices = torch.topk(scores + self.bias, self.k, dim=-1, sorted=False).indices
        weights = scores.gather(-1, indices)
        return weights / (weights.sum(-1, keepdim=True) + 1e-20) * self.scale, indices


@pytest.mark.parametrize(
    ("owner", "method", "broken", "label", "where", "reason"),
    [
        (layers.RMSNorm, "forward", EpsOutsideTheMean, "fuse_rms_norm", "passes/test_promises.py",
         "expected aten.rsqrt, found aten.add.Tensor"),
        (layers.RMSNorm, "forward", RoundedBeforeTheWeight, "fuse_rms_norm", "passes/test_promises.py",
         "expected aten.mul.Tensor, found aten.to.dtype"),
        (hyper_connection.HyperConnection, "sinkhorn", RowsFirst, "fuse_hc_pre", "deepseek_v4/hyper_connection.py",
         "expected -2, found -1"),
        (moe.Gate, "forward", SoftmaxGate, "fuse_route_topk", "passes/test_promises.py",
         "expected aten.sqrt, found aten.softmax.int"),
    ],
)  # fmt: skip
def test_a_changed_model_is_an_error_at_its_line(
    monkeypatch: pytest.MonkeyPatch, owner: type, method: str, broken: type, label: str, where: str, reason: str
) -> None:
    monkeypatch.setattr(owner, method, getattr(broken, method))
    config = tiny(compress_ratios=[0], num_hash_layers=0, hc_sinkhorn_iters=3)
    with pytest.raises(PassError) as error:
        keep(config, torch.float32)
    message = str(error.value)
    assert message.startswith(f"layer_swa_topk: pass '{label}' found 0 matches; the model promises")
    nearest = next(line for line in message.splitlines() if "nearest candidate" in line)
    assert re.search(rf"refused at {re.escape(where)}:\d+: nearest candidate, at \w+: {re.escape(reason)}", nearest), (
        message
    )
