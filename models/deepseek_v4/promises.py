"""How many matches each pass must find in each region of DeepSeek-V4, counted from how the modules are written.

The compiler holds the passes to these numbers: a miss is an error that names the nearest candidate, never a slower
plan. The numbers do not depend on the dtype or on any size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from atomc.models.deepseek_v4.config import DeepseekV4Config

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
}

# The prologue is an embedding and angles: nothing in it has a fused operator.
_HEAD: Final[Mapping[str, int]] = {
    "fuse_hc_post": 1,  # Residual.streams: the last layer's output enters the streams
    "fuse_hc_head": 1,  # HyperHead
    "fuse_rms_norm": 1,  # the final norm
    "fuse_hc_head_norm": 1,  # the two together
}


def promised_matches(config: DeepseekV4Config, region: str) -> dict[str, int]:
    """Label of each pass -> matches it must find in `region` (`prologue`, `layer_<attention>_<moe>`, `head`).

    Raises:
        KeyError: the model has no region of that name.
    """
    layers = {config.layer_kind(i) for i in range(config.num_hidden_layers)}
    regions: dict[str, Mapping[str, int]] = {"prologue": {}, "head": _HEAD}
    regions |= {f"layer_{kind.attention}_{kind.moe}": _layer(kind.attention, kind.moe) for kind in layers}
    return {**NONE, **regions[region]}


def _layer(attention: str, moe: str) -> dict[str, int]:
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
        "fuse_moe_experts": 1,  # the routed experts
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
    }
