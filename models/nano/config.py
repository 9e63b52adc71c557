"""Configuration of deepseek-v4-nano, readable from and writable to the official `config.json` keys."""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, cast

LayerKind = Literal["swa", "csa", "hca"]

CSA_RATIO = 4


@dataclass(frozen=True)
class YarnScaling:
    """The `rope_scaling` entry; it applies to the layers with a compressor only."""

    factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    original_max_position_embeddings: int = 1024
    type: str = "yarn"


@dataclass(frozen=True)
class NanoConfig:
    """The official keys. `compress_ratios`: 0 = SWA, 4 = CSA, else HCA; the last entry is the MTP block."""

    vocab_size: int = 8192
    hidden_size: int = 256
    num_hidden_layers: int = 5
    num_attention_heads: int = 4
    num_key_value_heads: int = 1
    head_dim: int = 128
    qk_rope_head_dim: int = 64
    q_lora_rank: int = 128
    o_groups: int = 2
    o_lora_rank: int = 128
    sliding_window: int = 64
    compress_ratios: tuple[int, ...] = (0, 4, 32, 4, 32, 0)
    rope_theta: float = 10000.0
    compress_rope_theta: float = 160000.0
    rope_scaling: YarnScaling = YarnScaling()
    max_position_embeddings: int = 4096
    index_n_heads: int = 4
    index_head_dim: int = 128
    index_topk: int = 32
    n_routed_experts: int = 8
    n_shared_experts: int = 1
    num_experts_per_tok: int = 4
    num_hash_layers: int = 1
    moe_intermediate_size: int = 256
    routed_scaling_factor: float = 1.5
    swiglu_limit: float = 10.0
    hc_mult: int = 4
    hc_sinkhorn_iters: int = 20
    hc_eps: float = 1e-6
    rms_norm_eps: float = 1e-6
    bos_token_id: int = 0
    eos_token_id: int = 1

    def kind(self, layer: int) -> LayerKind:
        """Attention kind of a layer; `layer == num_hidden_layers` is the MTP block."""
        ratio = self.compress_ratios[layer]
        return "swa" if ratio == 0 else "csa" if ratio == CSA_RATIO else "hca"

    def is_hash(self, layer: int) -> bool:
        return layer < self.num_hash_layers

    @property
    def blocks(self) -> list[tuple[str, int]]:
        """(name prefix, layer index) of every block, the MTP block last."""
        main = [(f"layers.{layer}", layer) for layer in range(self.num_hidden_layers)]
        return [*main, ("mtp.0", self.num_hidden_layers)]


# Constant for every V4 model, or fixed by the storage format this model ships in.
_OFFICIAL_CONSTANTS: dict[str, Any] = {
    "architectures": ["DeepseekV4ForCausalLM"],
    "model_type": "deepseek_v4",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "expert_dtype": "fp4",
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "norm_topk_prob": True,
    "num_nextn_predict_layers": 1,
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "scale_fmt": "ue8m0",
        "weight_block_size": [128, 128],
    },
    "scoring_func": "sqrtsoftplus",
    "tie_word_embeddings": False,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.57.1",
    "use_cache": True,
}


def write_config(config: NanoConfig, path: Path) -> None:
    """Write `config.json` with the official keys."""
    keys = _OFFICIAL_CONSTANTS | asdict(config)
    path.write_text(json.dumps(dict(sorted(keys.items())), indent=2) + "\n")


def read_config(path: Path) -> NanoConfig:
    """Read the fields of `NanoConfig` from an official `config.json`; constants must hold their one supported value."""
    keys = cast(dict[str, Any], json.loads(path.read_text()))
    for name in ("model_type", "scoring_func", "topk_method", "expert_dtype"):
        if keys[name] != _OFFICIAL_CONSTANTS[name]:
            raise ValueError(f"{path}: {name} is {keys[name]!r}, expected {_OFFICIAL_CONSTANTS[name]!r}")
    values = {field.name: keys[field.name] for field in fields(NanoConfig)}
    values["compress_ratios"] = tuple(values["compress_ratios"])
    values["rope_scaling"] = YarnScaling(**values["rope_scaling"])
    return NanoConfig(**values)
