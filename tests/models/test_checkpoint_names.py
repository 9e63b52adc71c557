"""Checkpoints with transformers' names: plain, quantised, as saved by transformers itself (spec 3.6)."""

import itertools
import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor
from transformers.models.deepseek_v4 import DeepseekV4Config as TransformersConfig
from transformers.models.deepseek_v4 import DeepseekV4ForCausalLM

from atomc.errors import CheckpointError
from atomc.models.deepseek_v4.checkpoint import CheckpointReader, expected_tensors, validate
from atomc.models.deepseek_v4.config import DeepseekV4Config, load_config
from tests.support.tiny import random_tensors, same_bits, tiny_config

E8M0, FP8 = torch.float8_e8m0fnu, torch.float8_e4m3fn


def transformers_model(config: DeepseekV4Config) -> DeepseekV4ForCausalLM:
    model = DeepseekV4ForCausalLM(TransformersConfig(**json.loads(json.dumps(config.to_transformers_dict())))).float()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape, generator=generator))
            else:
                assert name.endswith("tid2eid")
                tensor.copy_(torch.randint(0, config.n_routed_experts, tensor.shape, generator=generator))
    return model


PLAIN = tiny_config(quantization_config=None, compress_ratios=[0, 16, 4, 16, 4, 0])

# The table of spec 3.6, written out once more as official -> transformers.
SPEC_TABLE = {
    "embed.weight": "model.embed_tokens.weight",
    "head.weight": "lm_head.weight",
    "norm.weight": "model.norm.weight",
    "hc_head_fn": "model.hc_head.hc_fn",
    "layers.2.attn_norm.weight": "model.layers.2.input_layernorm.weight",
    "layers.2.ffn_norm.weight": "model.layers.2.post_attention_layernorm.weight",
    "layers.2.hc_attn_base": "model.layers.2.attn_hc.base",
    "layers.2.hc_ffn_scale": "model.layers.2.ffn_hc.scale",
    "layers.2.attn.wq_a.weight": "model.layers.2.self_attn.q_a_proj.weight",
    "layers.2.attn.q_norm.weight": "model.layers.2.self_attn.q_a_norm.weight",
    "layers.2.attn.wq_b.weight": "model.layers.2.self_attn.q_b_proj.weight",
    "layers.2.attn.wkv.weight": "model.layers.2.self_attn.kv_proj.weight",
    "layers.2.attn.kv_norm.weight": "model.layers.2.self_attn.kv_norm.weight",
    "layers.2.attn.wo_a.weight": "model.layers.2.self_attn.o_a_proj.weight",
    "layers.2.attn.wo_b.weight": "model.layers.2.self_attn.o_b_proj.weight",
    "layers.2.attn.attn_sink": "model.layers.2.self_attn.sinks",
    "layers.2.attn.compressor.wkv.weight": "model.layers.2.self_attn.compressor.kv_proj.weight",
    "layers.2.attn.compressor.wgate.weight": "model.layers.2.self_attn.compressor.gate_proj.weight",
    "layers.2.attn.compressor.ape": "model.layers.2.self_attn.compressor.position_bias",
    "layers.2.attn.compressor.norm.weight": "model.layers.2.self_attn.compressor.kv_norm.weight",
    "layers.2.attn.indexer.wq_b.weight": "model.layers.2.self_attn.compressor.indexer.q_b_proj.weight",
    "layers.2.attn.indexer.weights_proj.weight": (
        "model.layers.2.self_attn.compressor.indexer.scorer.weights_proj.weight"
    ),
    "layers.2.attn.indexer.compressor.wkv.weight": "model.layers.2.self_attn.compressor.indexer.kv_proj.weight",
    "layers.2.attn.indexer.compressor.wgate.weight": "model.layers.2.self_attn.compressor.indexer.gate_proj.weight",
    "layers.2.attn.indexer.compressor.ape": "model.layers.2.self_attn.compressor.indexer.position_bias",
    "layers.2.attn.indexer.compressor.norm.weight": "model.layers.2.self_attn.compressor.indexer.kv_norm.weight",
    "layers.2.ffn.gate.weight": "model.layers.2.mlp.gate.weight",
    "layers.2.ffn.gate.bias": "model.layers.2.mlp.gate.e_score_correction_bias",
    "layers.1.ffn.gate.tid2eid": "model.layers.1.mlp.gate.tid2eid",
    "layers.2.ffn.shared_experts.w1.weight": "model.layers.2.mlp.shared_experts.gate_proj.weight",
    "layers.2.ffn.shared_experts.w3.weight": "model.layers.2.mlp.shared_experts.up_proj.weight",
    "layers.2.ffn.shared_experts.w2.weight": "model.layers.2.mlp.shared_experts.down_proj.weight",
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("saving", ["state_dict", "no_prefix", "save_pretrained"])
def test_transformers_names_give_the_official_tensors(tmp_path: Path, dtype: torch.dtype, saving: str) -> None:
    model = transformers_model(PLAIN).to(dtype)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if saving == "save_pretrained":
        model.save_pretrained(tmp_path, max_shard_size="200KB")
    else:
        names = {name: name.removeprefix("model.") if saving == "no_prefix" else name for name in state}
        stored = {names[name]: tensor for name, tensor in state.items()}
        safetensors.torch.save_file(stored, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text(json.dumps(PLAIN.to_transformers_dict()))
    config = load_config(tmp_path)
    assert config == PLAIN
    reader = CheckpointReader(tmp_path)
    validate(reader, config, finite=True)
    assert sorted(reader) == sorted(expected_tensors(PLAIN))
    for official, theirs in SPEC_TABLE.items():
        assert same_bits(reader.load(official), state[theirs]), official
    for layer, expert in itertools.product((0, 5), (0, 11)):
        gate_up = state[f"model.layers.{layer}.mlp.experts.gate_up_proj"][expert]
        prefix = f"layers.{layer}.ffn.experts.{expert}."
        assert same_bits(reader.load(f"{prefix}w1.weight"), gate_up[:32])
        assert same_bits(reader.load(f"{prefix}w3.weight"), gate_up[32:])
        assert same_bits(
            reader.load(f"{prefix}w2.weight"), state[f"model.layers.{layer}.mlp.experts.down_proj"][expert]
        )


def renamed_like_transformers(tensors: dict[str, Tensor], config: DeepseekV4Config) -> dict[str, Tensor]:
    """Quantised tensors under transformers' names: `weight_scale_inv`, stacked experts."""
    table = {
        official.replace("layers.2.", "*"): theirs.replace("layers.2.", "*") for official, theirs in SPEC_TABLE.items()
    }
    stored: dict[str, Tensor] = {}
    experts: dict[tuple[str, str, str], dict[int, Tensor]] = {}
    for name, tensor in tensors.items():
        layer = name.partition(".")[2].partition(".")[0] if name.startswith("layers.") else ""
        local = name.replace(f"layers.{layer}.", "*") if layer else name
        if local.startswith("*ffn.experts."):
            _, _, expert, projection, kind = local.split(".")
            experts.setdefault((layer, projection, kind), {})[int(expert)] = tensor
            continue
        is_scale = local.endswith(".scale")
        local = local.removesuffix(".scale") + ".weight" if is_scale else local
        theirs = table.get(local) or _untabled(local)
        theirs = theirs.replace(".weight", ".weight_scale_inv") if is_scale else theirs
        stored[theirs.replace("*", f"layers.{layer}.")] = tensor
    for (layer, projection, kind), parts in experts.items():
        rows = [parts[e] for e in range(config.n_routed_experts)]
        if projection == "w1":
            rows = [torch.cat([parts[e], experts[layer, "w3", kind][e]]) for e in range(config.n_routed_experts)]
        if projection != "w3":
            theirs = {"w1": "gate_up_proj", "w2": "down_proj"}[projection] + ("_scale_inv" if kind == "scale" else "")
            stored[f"model.layers.{layer}.mlp.experts.{theirs}"] = torch.stack(rows)
    return stored


def _untabled(local: str) -> str:
    """Names the table above has for another layer or another part."""
    for old, new in (
        ("hc_head_", "model.hc_head.hc_"), ("*hc_attn_", "model.*attn_hc."), ("*hc_ffn_", "model.*ffn_hc."),
        ("*ffn.gate.tid2eid", "model.*mlp.gate.tid2eid"),
    ):  # fmt: skip
        if local.startswith(old):
            return local.replace(old, new)
    raise AssertionError(local)


@pytest.mark.parametrize(("expert_dtype", "inner"), [("fp4", 32), ("fp8", 128)])
def test_quantised_transformers_checkpoints(tmp_path: Path, expert_dtype: str, inner: int) -> None:
    config = tiny_config(
        expert_dtype=expert_dtype, moe_intermediate_size=inner, compress_ratios=PLAIN.to_dict()["compress_ratios"]
    )
    tensors = dict(random_tensors(config))
    safetensors.torch.save_file(renamed_like_transformers(tensors, config), tmp_path / "model.safetensors")
    reader = CheckpointReader(tmp_path)
    validate(reader, config)
    for name, tensor in tensors.items():
        assert same_bits(reader.load(name), tensor), name
    assert reader.where("layers.0.ffn.experts.3.w3.scale").endswith("gate_up_proj_scale_inv")


def test_a_scale_tile_over_both_halves_cannot_be_cut(tmp_path: Path) -> None:
    config = tiny_config(expert_dtype="fp8", moe_intermediate_size=96, compress_ratios=[0, 16, 4, 16, 4, 0])
    name = "model.layers.0.mlp.experts.gate_up_proj"
    tensors = {name: torch.zeros(12, 192, 64).to(FP8), f"{name}_scale_inv": torch.ones(12, 2, 1).to(E8M0)}
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="one scale tile covers rows of both w1 and w3"):
        validate(CheckpointReader(tmp_path), config)
