"""Configuration of DeepSeek-V4: the official `config.json` keys as a frozen, checked dataclass (spec section 1).

It reads the official form of every release (Flash, Pro, Base, 0731/0813 with DSpark) and the form transformers writes.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from atomc.errors import ConfigError
from atomc.models.deepseek_v4.config_rules import cross_problems
from atomc.models.deepseek_v4.config_schema import (
    CSA_RATIO,
    FIXED,
    QUANTIZATION,
    RopeScaling,
    read_values,
)
from atomc.models.deepseek_v4.config_transformers import (
    is_transformers_form,
    official_from_transformers,
    transformers_from_official,
)

__all__ = ["DeepseekV4Config", "LayerKind", "RopeScaling", "load_config"]

AttentionKind = Literal["swa", "csa", "hca"]
MoeKind = Literal["hash", "topk"]

# Keys of the official file that no computation reads; written so that `to_dict` is a complete official file.
_INERT: Mapping[str, Any] = {
    "architectures": ["DeepseekV4ForCausalLM"],
    "initializer_range": 0.02,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.57.1",
    "use_cache": True,
}


@dataclass(frozen=True)
class LayerKind:
    """What one block is made of; two blocks of equal kind differ in weights only."""

    attention: AttentionKind
    moe: MoeKind


@dataclass(frozen=True, kw_only=True)
class DeepseekV4Config:
    """Fields carry the official `config.json` names (spec 1.2, 1.3). Any illegal value raises `ConfigError`.

    `compress_ratios` has one entry per main layer and then one 0 per draft block. `quantized` says whether the file has
    a `quantization_config`; `expert_dtype` and `weight_block_size` mean something only then. `eos_token_id` may be
    several ids; `eos_token_ids` is always a tuple. The `dspark_*` fields are all set or all empty.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    head_dim: int
    qk_rope_head_dim: int
    q_lora_rank: int
    o_groups: int
    o_lora_rank: int
    sliding_window: int
    compress_ratios: tuple[int, ...]
    rope_theta: float
    compress_rope_theta: float
    rope_scaling: RopeScaling | None
    max_position_embeddings: int
    index_n_heads: int
    index_head_dim: int
    index_topk: int
    n_routed_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    num_hash_layers: int
    routed_scaling_factor: float
    swiglu_limit: float
    hc_mult: int
    hc_sinkhorn_iters: int
    hc_eps: float
    rms_norm_eps: float
    num_nextn_predict_layers: int
    bos_token_id: int
    eos_token_id: int | tuple[int, ...]
    quantized: bool
    expert_dtype: Literal["fp4", "fp8"]
    weight_block_size: tuple[int, int] = (128, 128)
    dspark_block_size: int | None = None
    dspark_noise_token_id: int | None = None
    dspark_target_layer_ids: tuple[int, ...] = ()
    dspark_markov_rank: int | None = None

    def __post_init__(self) -> None:
        # `dataclasses.replace` must not be a way around the checks of `from_dict`.
        problems: list[str] = []
        values = read_values(self.to_dict(), problems)
        problems += cross_problems(values)
        if problems:
            raise ConfigError("DeepseekV4Config", problems)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], source: str = "config.json") -> "DeepseekV4Config":
        """The configuration in a `config.json` dictionary, official or transformers' form.

        `source` names the file in errors. Raises `ConfigError` that lists every problem found.
        """
        if not isinstance(raw, Mapping):
            raise ConfigError(source, [f"the file holds {type(raw).__name__}, not an object with the official keys"])
        problems: list[str] = []
        if is_transformers_form(raw):
            raw = official_from_transformers(raw, problems)
        values = read_values(raw, problems)
        problems += cross_problems(values)
        if problems:
            raise ConfigError(source, problems)
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """The complete official `config.json`; `from_dict` of it gives an equal configuration."""
        raw = {**_INERT, **FIXED, **asdict(self)}
        quantized, blocks = raw.pop("quantized"), raw.pop("weight_block_size")
        if quantized:
            raw["quantization_config"] = {**QUANTIZATION, "weight_block_size": list(blocks)}
        if self.rope_scaling is not None:
            raw["rope_scaling"] = {"type": "yarn", **raw["rope_scaling"]}
        if not self.dspark_target_layer_ids:
            raw = {key: value for key, value in raw.items() if not key.startswith("dspark_") or value}
        return {key: list(value) if isinstance(value, tuple) else value for key, value in sorted(raw.items())}

    def to_transformers_dict(self) -> dict[str, Any]:
        """The form `transformers.DeepseekV4Config.to_dict` writes (spec 1.4). It cannot describe draft blocks."""
        return transformers_from_official(self.to_dict())

    @property
    def csa_ratio(self) -> int:
        """4 if a layer is CSA, else 0."""
        return CSA_RATIO if CSA_RATIO in self.compress_ratios else 0

    @property
    def hca_ratio(self) -> int:
        """The ratio of the HCA layers (128 in the releases), 0 if there is none."""
        return next((ratio for ratio in self.compress_ratios if ratio not in (0, CSA_RATIO)), 0)

    @property
    def num_draft_stages(self) -> int:
        """Number of `mtp.*` blocks: the entries of compress_ratios beyond the main layers (spec 1.3)."""
        return len(self.compress_ratios) - self.num_hidden_layers

    @property
    def draft_layers(self) -> range:
        """Indices into compress_ratios of the draft blocks; block `mtp.k` is `draft_layers[k]`."""
        return range(self.num_hidden_layers, len(self.compress_ratios))

    @property
    def is_dspark(self) -> bool:
        """The draft blocks are the stages of a DSpark drafter rather than one MTP block."""
        return bool(self.dspark_target_layer_ids)

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        return self.eos_token_id if isinstance(self.eos_token_id, tuple) else (self.eos_token_id,)

    def layer_kind(self, layer: int) -> LayerKind:
        """Kind of main layer `layer`, or of a draft block for an index in `draft_layers`."""
        if not 0 <= layer < len(self.compress_ratios):
            raise IndexError(f"layer {layer} of {len(self.compress_ratios)} (draft blocks included)")
        ratio = self.compress_ratios[layer]
        attention: AttentionKind = "swa" if ratio == 0 else "csa" if ratio == CSA_RATIO else "hca"
        return LayerKind(attention, "hash" if layer < self.num_hash_layers else "topk")

    def layer_prefix(self, layer: int) -> str:
        """Prefix of the tensor names of a block: `layers.N.` or `mtp.k.`."""
        main = layer < self.num_hidden_layers
        return f"layers.{layer}." if main else f"mtp.{layer - self.num_hidden_layers}."


def load_config(path: str | Path) -> DeepseekV4Config:
    """The configuration in a checkpoint folder (its `config.json`) or in a JSON file. Raises `ConfigError`."""
    file = Path(path) / "config.json" if Path(path).is_dir() else Path(path)
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(str(path), [f"{file} does not exist; give a checkpoint folder or a config.json"]) from error
    except (OSError, ValueError) as error:
        raise ConfigError(str(file), [f"the file cannot be read as JSON: {error}"]) from error
    return DeepseekV4Config.from_dict(raw, str(file))
