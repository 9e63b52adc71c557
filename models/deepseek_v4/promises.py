"""How many matches each pass must find in each region of DeepSeek-V4, counted from how the modules are written.

The compiler holds the passes to these numbers: a miss is an error that names the nearest candidate, never a slower
plan. The numbers do not depend on the dtype or on any size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from atomc.models.deepseek_v4.config import DeepseekV4Config


@dataclass(frozen=True)
class Rounded:
    """What a quantisation scheme rounds; by default nothing.

    Attributes:
        linear, grouped, experts: layout of what enters FP8 linears, wo_a and the routed experts; None: as it is.
        rows, index_rows: whether these caches are in a row layout. scaled: whether products take packed weights.
    """

    linear: str | None = None
    grouped: str | None = None
    experts: str | None = None
    rows: bool = False
    index_rows: bool = False
    scaled: bool = False


NONE: Final[Mapping[str, int]] = {
    "fuse_hc_pre": 0,
    "fuse_hc_head": 0,
    "fuse_hc_post": 0,
    "fuse_rms_norm": 0,
    "fuse_rms_norm_unit": 0,
    "fuse_rope_inverse": 0,
    "fuse_rope": 0,
    "fuse_moe_experts": 0,
    "fuse_swiglu": 0,
    "fuse_route_topk": 0,
    "fuse_route_hash": 0,
    "merge_linears": 0,
    "fuse_rms_norm_pair": 0,
    "fuse_qk_norm_rope_insert": 0,
    "fuse_compressor_pool_norm_rope_insert": 0,
    "fuse_index_rope_topk": 0,
    "fuse_sparse_attention_inverse_rope": 0,
    "fuse_hc_pre_norm": 0,
    "fuse_hc_post_pre_norm": 0,
    "fuse_hc_head_norm": 0,
    "quantize": 0,
    "cancel_quantize": 0,
    "fuse_moe_experts_quant": 0,
    "fuse_swiglu_quant": 0,
    "fuse_rms_norm_pair_quant": 0,
    "fuse_sparse_attention_inverse_rope_quant": 0,
    "fuse_hc_post_pre_norm_quant": 0,
    "fuse_scaled_moe_experts": 0,
    "fuse_scaled_grouped_output": 0,
    "fuse_scaled_linear": 0,
    "pointwise": 0,
}

# The prologue is an embedding and angles: nothing in it has a fused operator.
_PROLOGUE: Final[Mapping[str, int]] = {
    "pointwise": 12,  # the four parts of the residual; cos and sin of four sets of angles
}
_HEAD: Final[Mapping[str, int]] = {
    "fuse_hc_post": 1,  # Residual.streams: the last layer's output enters the streams
    "fuse_hc_head": 1,  # HyperHead
    "fuse_rms_norm": 1,  # the final norm
    "fuse_hc_head_norm": 1,  # the two together
    "pointwise": 4,  # the wanted rows of the four parts of the residual
}


def promised_matches(config: DeepseekV4Config, region: str, rounded: Rounded = Rounded()) -> dict[str, int]:
    """Label of each pass -> matches it must find in `region` (`prologue`, `layer_<attention>_<moe>`, `head`).

    Raises:
        KeyError: the model has no region of that name.
    """
    layers = {config.layer_kind(i) for i in range(config.num_hidden_layers)}
    regions: dict[str, Mapping[str, int]] = {"prologue": _PROLOGUE, "head": _HEAD}
    regions |= {f"layer_{kind.attention}_{kind.moe}": _layer(kind.attention, kind.moe, rounded) for kind in layers}
    return {**NONE, **regions[region]}


def _layer(attention: str, moe: str, rounded: Rounded) -> dict[str, int]:
    # A CSA layer has two compressors, its own and the indexer's; HCA has one; SWA none.
    compressors = {"swa": 0, "hca": 1, "csa": 2}[attention]
    indexers = 1 if attention == "csa" else 0
    return {
        "fuse_hc_pre": 2,  # hc_attn, hc_ffn
        "fuse_hc_post": 2,  # the streams are read before each of the two sublayers
        "fuse_rms_norm": 4 + compressors,  # attn_norm, q_norm, kv_norm, ffn_norm; each compressor's norm
        "fuse_rms_norm_unit": 1,  # the per-head norm of q
        "fuse_rope_inverse": 1,  # the attention's output
        "fuse_rope": 2 + compressors + indexers,  # q, kv; each compressor's rows; the index queries
        "fuse_moe_experts": 0 if rounded.experts else 1,  # the routed experts
        "fuse_swiglu": 1,  # the shared expert
        "fuse_route_topk": 1 if moe == "topk" else 0,
        "fuse_route_hash": 1 if moe == "hash" else 0,
        "merge_linears": 2 + compressors,  # wq_a|wkv, w1|w3 of the shared expert; wkv|wgate of each compressor
        "fuse_rms_norm_pair": 1,  # q_norm with kv_norm
        "fuse_qk_norm_rope_insert": 1,  # q's norm and RoPE with kv's RoPE and its insertion
        "fuse_compressor_pool_norm_rope_insert": compressors,
        "fuse_index_rope_topk": indexers,
        "fuse_sparse_attention_inverse_rope": 1,
        "fuse_hc_pre_norm": 2,  # hc_attn with attn_norm, hc_ffn with ffn_norm
        "fuse_hc_post_pre_norm": 2,  # each of the two with the post before it
        "pointwise": 1 + indexers,  # routed + shared experts; the scale of the weights of index heads
        **_quantized(compressors, indexers, rounded),
    }


def _quantized(compressors: int, indexers: int, rounded: Rounded) -> dict[str, int]:
    linear, grouped, experts = (int(bool(r)) for r in (rounded.linear, rounded.grouped, rounded.experts))
    linears = 5 + indexers  # wq_a|wkv, wq_b, wo_b, w1|w3, w2 of the shared expert; wq_b of the indexer
    caches = rounded.rows * (1 + (compressors > 0)) + rounded.index_rows * indexers
    scaled = int(rounded.scaled)
    shared = int(rounded.linear is not None and rounded.linear == rounded.experts)
    return {
        "quantize": linear * linears + grouped + 2 * experts + caches,
        # q_norm's output enters wq_b and the indexer; ffn_norm's the shared expert and the routed ones.
        "cancel_quantize": linear * indexers + shared,
        "fuse_moe_experts_quant": experts,
        "fuse_swiglu_quant": linear,
        "fuse_rms_norm_pair_quant": linear,
        "fuse_sparse_attention_inverse_rope_quant": grouped,
        "fuse_hc_post_pre_norm_quant": linear + int(bool(linear or experts)),
        "fuse_scaled_moe_experts": experts * scaled,
        "fuse_scaled_grouped_output": grouped * scaled,
        "fuse_scaled_linear": linear * linears * scaled,
    }
