"""A tiny random DeepSeek-V4 for tests: its configuration and an official-layout checkpoint with no trivial weight."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from atomc.formats import FP8_TILE, MXFP4, quantize
from atomc.models.deepseek_v4.checkpoint import Entry, entries, write_checkpoint
from atomc.models.deepseek_v4.config import DeepseekV4Config

# Two layers of every attention kind, two of them hash-MoE, an MTP block; spec section 7's sizes, a short HCA ratio.
TINY: dict[str, Any] = {
    "architectures": ["DeepseekV4ForCausalLM"],
    "model_type": "deepseek_v4",
    "vocab_size": 160,
    "hidden_size": 64,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "head_dim": 48,
    "qk_rope_head_dim": 16,
    "q_lora_rank": 40,
    "o_groups": 4,
    "o_lora_rank": 24,
    "sliding_window": 32,
    "compress_ratios": [0, 16, 4, 16, 4, 0, 0],
    "rope_theta": 10000,
    "compress_rope_theta": 160000,
    "rope_scaling": {
        "type": "yarn", "factor": 16, "beta_fast": 32, "beta_slow": 1, "original_max_position_embeddings": 65536,
    },
    "max_position_embeddings": 4096,
    "index_n_heads": 16,
    "index_head_dim": 32,
    "index_topk": 10,
    "n_routed_experts": 12,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 32,
    "num_hash_layers": 2,
    "routed_scaling_factor": 1.5,
    "swiglu_limit": 0.6,  # low, so that the clamp fires
    "hc_mult": 4,
    "hc_sinkhorn_iters": 20,
    "hc_eps": 1e-6,
    "rms_norm_eps": 1e-6,
    "num_nextn_predict_layers": 1,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "expert_dtype": "fp4",
    "quantization_config": {
        "quant_method": "fp8", "fmt": "e4m3", "scale_fmt": "ue8m0", "weight_block_size": [128, 128],
        "activation_scheme": "dynamic",
    },
}  # fmt: skip

# The DSpark drafter of the dated releases on the tiny model: three stages in place of the MTP block.
TINY_DSPARK: dict[str, Any] = {
    "compress_ratios": [*TINY["compress_ratios"][:6], 0, 0, 0],
    "dspark_block_size": 5,
    "dspark_noise_token_id": 150,
    "dspark_target_layer_ids": [3, 4, 5],
    "dspark_markov_rank": 16,
}


def tiny_dict(**overrides: Any) -> dict[str, Any]:
    """The tiny official `config.json` with some keys replaced."""
    return {**TINY, **overrides}


def tiny_config(**overrides: Any) -> DeepseekV4Config:
    """The tiny configuration with some official keys replaced; `tiny_config(**TINY_DSPARK)` has the DSpark drafter."""
    return DeepseekV4Config.from_dict(tiny_dict(**overrides), "tiny")


def random_values(entry: Entry, config: DeepseekV4Config, generator: torch.Generator) -> Tensor:
    """Values of one logical tensor, float32 (tid2eid: int64), scaled so that activations and logits stay near 1."""
    leaf = entry.name.removesuffix(".weight").rpartition(".")[2]
    if entry.format == "i64":
        noise = torch.rand(entry.shape[0], config.n_routed_experts, generator=generator)
        return noise.argsort(-1)[:, : entry.shape[1]].contiguous()
    value = torch.randn(entry.shape, generator=generator)
    if leaf.endswith("norm"):
        return 1 + 0.3 * value
    if leaf == "bias":
        return 0.3 * value
    if leaf.startswith("hc_") and leaf.endswith("scale"):
        return 1 + 0.3 * value.abs()
    if len(entry.shape) == 1 or leaf == "ape":
        return value
    if leaf == "embed":
        return value
    return value / math.sqrt(entry.shape[1])


def random_tensors(config: DeepseekV4Config, seed: int = 0) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of a random checkpoint as `config` stores it; if it is not `quantized`, all float32."""
    generator = torch.Generator().manual_seed(seed)
    for entry in entries(config):
        value = random_values(entry, config, generator)
        if entry.quantized:
            weight, scale = quantize(value, FP8_TILE if entry.format == "fp8" else MXFP4)
            yield entry.name, weight
            yield entry.scale_name, scale
        else:
            yield entry.name, value.bfloat16() if config.quantized and entry.format == "bf16" else value


def random_checkpoint(
    folder: str | Path, config: DeepseekV4Config, seed: int = 0, quantized: bool = True, shard_bytes: int = 200_000,
    change: Callable[[str, Tensor], Tensor] = lambda _, tensor: tensor,
) -> Path:  # fmt: skip
    """Write a random checkpoint in the official layout, in several shards; the same seed gives the same bytes.

    `quantized=False` writes every float tensor in float32 without scales, and a config.json that says so. `change` a
    tensor by its name before it is written.
    """
    config = dataclasses.replace(config, quantized=quantized)
    tensors = ((name, change(name, tensor)) for name, tensor in random_tensors(config, seed))
    return write_checkpoint(folder, config, tensors, shard_bytes=shard_bytes)


def to_first_experts(name: str, tensor: Tensor) -> Tensor:
    """Changes a router so that all tokens go to the same experts, the first ones."""
    if name.endswith("tid2eid"):
        return torch.arange(tensor.shape[1]).expand_as(tensor).contiguous()
    if name.endswith("gate.bias"):
        return torch.where(torch.arange(len(tensor)) < 3, 100.0, 0.0).to(tensor.dtype)
    return tensor


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal dtype, shape and bits; NaN equals itself."""
    bits = [tensor.contiguous().flatten().view(torch.uint8) for tensor in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*bits)
