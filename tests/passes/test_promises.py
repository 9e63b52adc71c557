"""What the model promises of the passes, kept by every legal model, and what is said when a model breaks it."""

from __future__ import annotations

import copy
import itertools
import json
import re
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from atomc.capture import Program, capture
from atomc.compiler import Compiled, Options, check_scheme, compile_model, fuse
from atomc.formats import FP4_ACTIVATION, FP8_ACTIVATION, FP8_CHANNEL, FP8_TILE, MXFP4
from atomc.models.deepseek_v4 import hyper_connection, layers, moe
from atomc.models.deepseek_v4.config import DeepseekV4Config
from atomc.models.deepseek_v4.promises import NONE, Product, products_of, promised_matches, regions_of
from atomc.models.source import ModelSource, open_model
from atomc.passes import pipelines, quantize
from atomc.passes.graph import PassError
from atomc.passes.runner import Context, Row, run_pipeline
from atomc.passes.scheme import LINEARS, SCHEMES, SchemeError
from atomc.recipes import Load, joined
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
    # What is left for these is no fact about the model; what a checkpoint stores in bf16 is none either.
    free = {"canonicalize", "dead_code", "pointwise", "wide_linears"}
    labels = {p.label for target in ("cpu", "h100") for p in pipelines.compilation(target=get_target(target))}
    assert labels - free == set(NONE)


# A release in little, with every kind of layer and sizes that fill no tile.
RELEASE = tiny_dict(num_hidden_layers=4, compress_ratios=[0, 16, 4, 4, 0], num_hash_layers=3)


@pytest.fixture(scope="module")
def captured(tmp_path_factory: pytest.TempPathFactory) -> tuple[ModelSource, dict[str, Program]]:
    """The release, and what is captured of it in each compute dtype."""
    file = tmp_path_factory.mktemp("release") / "config.json"
    file.write_text(json.dumps(RELEASE))
    source = open_model(str(file), with_weights=False)
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    return source, {name: capture(source.config, dtype, TABLES) for name, dtype in dtypes.items()}


def compiled(
    captured: tuple[ModelSource, dict[str, Program]], scheme: str, dtype: str, target: str
) -> dict[str, Compiled]:
    """Run the passes of a compile on every region; a broken promise is an error of it."""
    source, programs = captured
    options = Options(scheme=scheme, dtype=dtype, with_weights=False)
    quantisation = check_scheme(options, source.config, get_target(target))
    program = programs[dtype]
    fresh = replace(program, regions=[replace(r, gm=copy.deepcopy(r.gm)) for r in program.regions])
    return {r.name: fuse(source, fresh, r, quantisation, options, lambda *_: None) for r in fresh.regions}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("scheme", "target"),
    [
        *((s, "cpu") for s in SCHEMES),
        ("native", "h100"),
        ("native", "mi300x"),
        ("fp8", "mi300x"),
        ("mxfp4", "mi355x"),
        ("none", "b200"),
    ],
)
def test_the_promises_of_every_scheme(
    captured: tuple[ModelSource, dict[str, Program]], scheme: str, target: str, dtype: str
) -> None:
    regions = compiled(captured, scheme, dtype, target)
    assert list(regions) == regions_of(captured[0].config)
    assert set(regions) == {"prologue", "layer_swa_hash", "layer_hca_hash", "layer_csa_hash", "layer_csa_topk", "head"}
    kinds = {decision.kind for region in regions.values() for decision in region.ctx.decisions}
    assert kinds == {"none": {"weight"}, "bf16": {"weight"} | ({"cache"} if dtype == "float32" else set())}.get(
        scheme, {"weight", "activation", "cache"}
    )


def rule(op: str, path: str, weight: str, activation: str | None = None) -> dict[str, str | None]:
    return {"op": op, "path": path, "weight": weight, "activation": activation}


_TILE, _A8, _FP4, _A4 = str(FP8_TILE), str(FP8_ACTIVATION), str(MXFP4), str(FP4_ACTIVATION)
_CHANNEL = str(FP8_CHANNEL)
CUSTOM: dict[str, list[dict[str, str | None]]] = {
    "one linear": [rule("linear", r"attn\.wq_b", _TILE, _A8)],
    "the shared expert": [rule("linear", r"ffn\.shared_experts\.w[123]", _TILE, _A8)],
    "weights of linears alone": [rule("linear", LINEARS, _TILE)],
    "weights of experts alone": [rule("experts", ".*", _FP4)],
    "two layouts in the experts": [
        rule("experts", r"ffn\.experts\.w13", _FP4, _A8), rule("experts", r"ffn\.experts\.w2", _FP4, _A4),
    ],
    "two layouts of one tensor": [
        rule("linear", r"attn\.wq_b", _TILE, _A8), rule("linear", r"attn\.indexer\.wq_b", _CHANNEL, _CHANNEL),
    ],
    "one linear in bf16": [
        rule("linear", r"attn\.wq_b", "bfloat16"), rule("linear", LINEARS, "stored", _A8),
        rule("experts", ".*", "stored", _A8),
    ],
    "compressors": [rule("linear", r".*\.compressor\..*", _TILE, _A8)],
    "the router": [rule("linear", r"ffn\.gate", _TILE, _A8)],
    "index weights": [rule("linear", r"attn\.indexer\.weights_proj", _TILE, _A8)],
    "the head": [rule("linear", "head", _TILE, _A8)],
    "everything": [rule(op, ".*", _TILE, _A8) for op in ("linear", "grouped_output", "experts")],
    "everything per channel": [rule(op, ".*", _CHANNEL, _CHANNEL) for op in ("linear", "grouped_output", "experts")],
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "target"), [("float32", "cpu"), ("bfloat16", "h100")])
@pytest.mark.parametrize("name", CUSTOM)
def test_the_promises_of_a_users_scheme(
    captured: tuple[ModelSource, dict[str, Program]], name: str, dtype: str, target: str, tmp_path: Path
) -> None:
    """Each product is promised by itself, so that a scheme may quantise any of them; its decisions are all there."""
    file = tmp_path / "scheme.json"
    file.write_text(json.dumps({"name": "mine", "rules": CUSTOM[name]}))
    for region, result in compiled(captured, str(file), dtype, target).items():
        packed = {d.name for d in result.ctx.decisions if d.kind == "weight" and ":" in d.layout}
        assert packed == {
            joined(product.paths)
            for product in products_of(region)
            if (found := next((r for r in CUSTOM[name] if fits(r, product)), None)) and found["weight"] != "bfloat16"
        }


def fits(one: dict[str, str | None], product: Product) -> bool:
    return one["op"] == product.kind and all(re.fullmatch(str(one["path"]), path) for path in product.paths)


def test_rounding_half_of_the_experts_is_refused(
    captured: tuple[ModelSource, dict[str, Program]], tmp_path: Path
) -> None:
    file = tmp_path / "scheme.json"
    rules = [rule("experts", r"ffn\.experts\.w13", _FP4, _A8), rule("experts", r"ffn\.experts\.w2", _FP4)]
    file.write_text(json.dumps({"name": "mine", "rules": rules}))
    with pytest.raises(PassError, match=r"rounds the input of ffn\.experts\.w13 but not that of ffn\.experts\.w2"):
        compiled(captured, str(file), "float32", "cpu")


@pytest.mark.parametrize(
    ("rules", "reason"),
    [
        ([rule("linear", "attn.wq_a", _TILE)],
         r"rule 1 (path 'attn.wq_a'): attn.wq_a|attn.wkv is one product; a rule must fit all of its weights, or none."),
        ([rule("linear", "nothing", _TILE)],
         "rule 1 (path 'nothing') decides nothing: the model's linear are attn.wq_a|attn.wkv, attn.wq_b, "),
        ([rule("linear", ".*", _TILE), rule("linear", "head", _TILE)],
         "rule 2 (path 'head') decides nothing: an earlier rule decides for head."),
    ],
)  # fmt: skip
def test_a_rule_that_decides_nothing_is_an_error(
    captured: tuple[ModelSource, dict[str, Program]], tmp_path: Path, rules: list[Any], reason: str
) -> None:
    file = tmp_path / "scheme.json"
    file.write_text(json.dumps({"name": "mine", "rules": rules}))
    with pytest.raises(SchemeError) as error:
        compiled(captured, str(file), "float32", "cpu")
    assert str(error.value).startswith("scheme mine, " + reason)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_promised_products_are_those_of_the_graph(
    captured: tuple[ModelSource, dict[str, Program]], dtype: str
) -> None:
    before = tuple(itertools.takewhile(lambda p: p.label != "quantize", pipelines.compilation()))
    for region in captured[1][dtype].regions:
        paths = {i.placeholder: i.name for i in region.inputs if i.role == "weight"}
        ctx = Context(region.name, {}, {p: Load(path) for p, path in paths.items()}, dict(paths))
        gm = copy.deepcopy(region.gm)
        run_pipeline(before, gm, ctx)
        found = list(quantize.products(gm, ctx))
        promised = products_of(region.name)
        assert sorted((p.kind, p.paths) for p in found) == sorted((p.kind, p.paths) for p in promised)
        wide = {p.paths for p in promised if p.wide}
        if dtype == "bfloat16":
            assert {p.paths for p in found if p.weight.meta["val"].dtype == torch.float32} == wide


def test_the_promises_of_the_kinds() -> None:
    config = tiny(compress_ratios=[0, 16, 4], num_hash_layers=1)
    assert set(promised_matches(config, "prologue").values()) == {0}
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
@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_models_keep_the_promises(name: str) -> None:
    dtype = (torch.float32, torch.bfloat16)[list(UNUSUAL).index(name) % 2]  # bfloat16 of all of them: `native`, below
    keep(tiny(compress_ratios=[0, 16, 4], num_hash_layers=1, **UNUSUAL[name]), dtype)


@pytest.mark.slow
@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_models_keep_the_promises_of_native(name: str, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    changes = {"num_hidden_layers": 3, "compress_ratios": [0, 16, 4], "num_hash_layers": 1, **UNUSUAL[name]}
    changes = {key: 64 if value == 48 else value for key, value in changes.items()}  # FP4 groups, rotations
    file.write_text(json.dumps(tiny_dict(num_nextn_predict_layers=0, **changes)))
    options = Options(dtype="bfloat16", with_weights=False, stop_after="dead_code")
    result = compile_model(str(file), "h100", tmp_path / "unused", options)
    assert {row.kind for table in result.layouts.values() for row in table} == {"weight", "activation", "cache"}


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
