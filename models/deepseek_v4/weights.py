"""How each parameter of the model is made from checkpoint tensors: one recipe per parameter (spec 3.1, 3.3).

Parameters carry the official names, except that the routed experts of a layer are stacked (`ffn.experts.w13`, w1 rows
then w3 rows, and `ffn.experts.w2`) and that a module may nest what a name joins (`hc_attn.fn` for `hc_attn_fn`).
"""

import re
from typing import Final, Literal, TypeAlias

import torch
from torch import nn

from atomc.errors import RecipeError
from atomc.formats import FP8_TILE, FP8_TILE_F32, MXFP4, Layout
from atomc.models.deepseek_v4.config import DeepseekV4Config
from atomc.models.deepseek_v4.layers import inverse_frequencies
from atomc.models.deepseek_v4.reader import CheckpointReader
from atomc.models.deepseek_v4.schema import Storage
from atomc.recipes import (
    PREFIX,
    Cast,
    Concat,
    Constant,
    Dequantize,
    Load,
    Recipe,
    Stack,
    evaluate,
    instantiate,
    output_spec,
)

ComputeDType: TypeAlias = Literal["float32", "bfloat16"]
_LAYOUTS: Final[dict[Storage, Layout]] = {"fp8": FP8_TILE, "fp8_f32": FP8_TILE_F32, "fp4": MXFP4}

# Linears a release quantises: in the compute dtype.
_QUANTIZED: Final = re.compile(
    r"(attn\.(wq_a|wq_b|wkv|wo_a|wo_b|indexer\.wq_b)|ffn\.shared_experts\.w[123]|e_proj|h_proj|main_proj)\.weight"
)
_COMPUTE: Final = re.compile(r"(embed|markov_head\.markov_w[12]|confidence_head\.proj)\.weight")
# Stored as F32, or computed in float32 by the reference: norms, router, compressors, index weights, mHC, head.
_FLOAT32: Final = re.compile(
    r"((attn\.(q|kv)|attn|ffn|main)_norm|norm|enorm|hnorm|head|ffn\.gate|attn\.indexer\.weights_proj"
    r"|attn\.(indexer\.)?compressor\.(wkv|wgate|norm))\.weight"
    r"|attn\.attn_sink|attn\.(indexer\.)?compressor\.ape|ffn\.gate\.bias|hc_(attn|ffn|head)_(fn|base|scale)"
)
_EXPERTS: Final = {"ffn.experts.w13": ("w1", "w3"), "ffn.experts.w2": ("w2",)}
_SHARED: Final = ("embed.weight", "head.weight")  # draft blocks use the main model's
_REGION: Final = re.compile(r"^(?:(?:prologue|block|head)\.(?=.*\.)|prologue\.(?=rope_))")
_LAYER: Final = re.compile(r"(layers\.\d+\.|mtp\.\d+\.)(.+)")


def official_parameter(name: str) -> str:
    """The official name behind a parameter name of a region or of the whole model: region names are dropped."""
    layer = _LAYER.fullmatch(name)
    prefix, rest = layer.groups() if layer else ("", name)
    rest = _REGION.sub("", rest)
    rest = re.sub(r"^(hc_attn|hc_ffn|hc_head)\.(fn|base|scale)$", r"\1_\2", rest)
    return prefix + rest


def weight_recipe(config: DeepseekV4Config, name: str, dtype: ComputeDType, *, stored: Storage) -> Recipe:
    """The recipe of parameter `name` in compute dtype `dtype`, for a checkpoint that stores it as `stored`.

    `name` is local to a block (`attn.wq_a.weight`; sources then carry `{prefix}`, to be `layers.N.`, `mtp.0.` or
    empty), or names its block itself (`layers.3.attn.wq_a.weight`). What the reference computes in float32 is float32
    whatever `dtype`; tid2eid is int32. `stored` counts only where a release quantises. Raises `RecipeError` for a name
    that is no parameter of the model.
    """
    local = official_parameter(name)
    layer = _LAYER.fullmatch(local)
    if layer is not None:
        return instantiate(weight_recipe(config, layer[2], dtype, stored=stored), layer[1])
    source = Load(local if local in _SHARED else PREFIX + local)
    if local in _EXPERTS:
        return _experts(config, _EXPERTS[local], dtype, stored)
    if _QUANTIZED.fullmatch(local):
        return _linear(PREFIX + local, dtype, stored)
    if _COMPUTE.fullmatch(local):
        return Cast(source, dtype)
    if _FLOAT32.fullmatch(local):
        return Cast(source, "float32")
    if local == "ffn.gate.tid2eid":
        return Cast(source, "int32")
    if local in ("rope_plain", "rope_yarn"):
        return _frequencies(config, compressed=local == "rope_yarn")
    raise RecipeError(
        f"{name!r} is no parameter of DeepSeek-V4; its parameters carry the checkpoint's names (spec 3.1)"
    )


def _linear(name: str, dtype: ComputeDType, stored: Storage) -> Recipe:
    weight = Load(name)
    if stored == "plain":
        return Cast(weight, dtype)
    scale = Load(name.removesuffix("weight") + "scale")
    return Dequantize(weight, scale, str(_LAYOUTS[stored]), dtype)


def _experts(config: DeepseekV4Config, projections: tuple[str, ...], dtype: ComputeDType, stored: Storage) -> Recipe:
    def expert(index: int) -> Recipe:
        parts = [_linear(f"{PREFIX}ffn.experts.{index}.{name}.weight", dtype, stored) for name in projections]
        return parts[0] if len(parts) == 1 else Concat(tuple(parts), 0)

    return Stack(tuple(expert(index) for index in range(config.n_routed_experts)))


def _frequencies(config: DeepseekV4Config, *, compressed: bool) -> Recipe:
    """RoPE frequencies are no checkpoint tensors; a float32 survives the way through Python floats and JSON."""
    values = inverse_frequencies(config, compressed)
    return Constant(tuple(values.tolist()), tuple(values.shape), "float32")


def official_storage(config: DeepseekV4Config, name: str) -> Storage:
    """How a release stores parameter `name` (local to a block or full), for compiling without weights."""
    local = re.sub(_LAYER, r"\2", official_parameter(name))
    if not config.quantized:
        return "plain"
    if local in _EXPERTS:
        return config.expert_dtype
    return "fp8" if _QUANTIZED.fullmatch(local) else "plain"


def checkpoint_storage(reader: CheckpointReader, prefix: str, name: str) -> Storage:
    """How the checkpoint at hand stores parameter `name` of block `prefix` (`layers.N.`, `mtp.k.` or empty).

    `validate` has seen to it that the experts of one layer are stored alike. Raises `CheckpointError` if it is missing.
    """
    local = official_parameter(name)
    if local in _EXPERTS:
        return reader.storage(f"{prefix}ffn.experts.0.{_EXPERTS[local][0]}.weight")
    return reader.storage(prefix + local) if _QUANTIZED.fullmatch(local) else "plain"


def load_parameters(
    module: nn.Module, config: DeepseekV4Config, reader: CheckpointReader, dtype: ComputeDType, prefix: str = ""
) -> None:
    """Fill every parameter of a module (the whole model, or a region whose block is `prefix`), one at a time.

    Raises `RecipeError` if a parameter's shape or dtype is not that of its recipe.
    """
    for name, parameter in module.named_parameters():
        layer = _LAYER.fullmatch(official_parameter(name))
        block, local = layer.groups() if layer else (prefix, name)
        stored = checkpoint_storage(reader, block, local)
        recipe = instantiate(weight_recipe(config, local, dtype, stored=stored), block)
        spec = output_spec(recipe, reader.spec)
        if (spec.shape, spec.dtype) != (tuple(parameter.shape), parameter.dtype):
            found = f"{list(parameter.shape)} {parameter.dtype}"
            raise RecipeError(f"parameter {name} is {found}, its recipe gives {list(spec.shape)} {spec.dtype}")
        with torch.no_grad():
            parameter.copy_(evaluate(recipe, reader.load))
