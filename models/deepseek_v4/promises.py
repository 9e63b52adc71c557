"""How many matches each pass must find in each region of DeepSeek-V4, counted from how the modules are written.

The compiler holds the passes to these numbers: a miss is an error that names the nearest candidate, never a slower
plan. The numbers do not depend on the dtype or on any size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from atomc.models.deepseek_v4.config import DeepseekV4Config


@dataclass(frozen=True)
class Product:
    """A product of activations with a weight, as it stands after linears are merged: what a scheme may quantise.

    Attributes:
        kind: `linear`, `grouped_output` (wo_a), `experts`. paths: its weights in the block; several: merged.
        reads: name of the tensor that enters it. wide: whether it is computed in float32 whatever the compute dtype.
    """

    kind: str
    paths: tuple[str, ...]
    reads: str
    wide: bool = False


@dataclass(frozen=True)
class Rounded:
    """What a quantisation scheme rounds; by default nothing.

    Attributes:
        products: paths of each product whose weight is packed -> layout of what enters it; None: as it is.
        rows, index_rows: whether these caches are in a row layout. scaled: whether products take packed weights.
        casts: whether a product in float32 reads a cast of its input, so not the tensor that others read.
    """

    products: Mapping[tuple[str, ...], str | None] = field(default_factory=dict)
    rows: bool = False
    index_rows: bool = False
    scaled: bool = False
    casts: bool = False


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
}

# The prologue is an embedding and angles: nothing in it has a fused operator.
_HEAD: Final[Mapping[str, int]] = {
    "fuse_hc_post": 1,  # Residual.streams: the last layer's output enters the streams
    "fuse_hc_head": 1,  # HyperHead
    "fuse_rms_norm": 1,  # the final norm
    "fuse_hc_head_norm": 1,  # the two together
}


_SHARED = ("ffn.shared_experts.w1", "ffn.shared_experts.w3")


def regions_of(config: DeepseekV4Config) -> list[str]:
    """Names of the model's regions, each kind of layer once, in the order of the model."""
    kinds = dict.fromkeys(config.layer_kind(i) for i in range(config.num_hidden_layers))
    return ["prologue", *(f"layer_{kind.attention}_{kind.moe}" for kind in kinds), "head"]


def products_of(region: str) -> tuple[Product, ...]:
    """The products of a region, in the order of its graph."""
    if region == "head":
        return (Product("linear", ("head",), "norm", wide=True),)
    if region == "prologue":
        return ()
    attention = region.split("_")[1]
    found = [Product("linear", ("attn.wq_a", "attn.wkv"), "attn_norm"), Product("linear", ("attn.wq_b",), "q_norm")]
    if attention != "swa":
        found.append(_compressor("attn"))
    if attention == "csa":
        found += [
            _compressor("attn.indexer"),
            Product("linear", ("attn.indexer.wq_b",), "q_norm"),
            Product("linear", ("attn.indexer.weights_proj",), "attn_norm", wide=True),
        ]
    return (
        *found,
        Product("grouped_output", ("attn.wo_a",), "heads"),
        Product("linear", ("attn.wo_b",), "groups"),
        Product("linear", ("ffn.gate",), "ffn_norm", wide=True),
        Product("experts", ("ffn.experts.w13",), "ffn_norm"),
        Product("experts", ("ffn.experts.w2",), "routed"),
        Product("linear", _SHARED, "ffn_norm"),
        Product("linear", ("ffn.shared_experts.w2",), "shared"),
    )


def _compressor(owner: str) -> Product:
    return Product("linear", (f"{owner}.compressor.wkv", f"{owner}.compressor.wgate"), "attn_norm", wide=True)


def promised_matches(config: DeepseekV4Config, region: str, rounded: Rounded = Rounded()) -> dict[str, int]:
    """Label of each pass -> matches it must find in `region` (`prologue`, `layer_<attention>_<moe>`, `head`).

    Raises:
        KeyError: the model has no region of that name.
    """
    if region not in regions_of(config):
        raise KeyError(region)
    found: Mapping[str, int] = _HEAD if region == "head" else {}
    if region.startswith("layer_"):
        _, attention, moe = region.split("_")
        found = _layer(attention, moe)
    return {**NONE, **found, **_quantized(region, rounded)}


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


def _quantized(region: str, rounded: Rounded) -> dict[str, int]:
    """The counts that a scheme decides."""
    products = products_of(region)
    packed = [p for p in products if p.paths in rounded.products]
    inputs: dict[str, list[str]] = {}  # tensor -> layout of each of its roundings
    for product in packed:
        if (layout := rounded.products[product.paths]) is not None:
            own_cast = product.wide and rounded.casts
            inputs.setdefault(f"{product.reads} in float32" if own_cast else product.reads, []).append(layout)
    rounded_of = {name: set(layouts) for name, layouts in inputs.items()}
    counts = {
        "quantize": len(packed) + _caches(region, rounded),
        # Several products of one tensor round it once for each layout.
        "cancel_quantize": sum(len(inputs[name]) - len(rounded_of[name]) for name in inputs),
    }
    scaled = [p.kind for p in packed if rounded.products[p.paths] is not None and rounded.scaled]
    counts["fuse_scaled_linear"] = scaled.count("linear")
    if not region.startswith("layer_"):
        return counts
    experts = int("routed" in inputs)  # then what enters w13 is rounded too: `Quantize` refuses anything else
    # A norm whose result is also read as it is, or rounded in another way, stays on its own.
    q_readers = sum(p.reads == "q_norm" for p in products)
    q_norm = len(inputs.get("q_norm", ())) == q_readers and len(rounded_of["q_norm"]) == 1
    return counts | {
        "fuse_moe_experts": 1 - experts,
        "fuse_moe_experts_quant": experts,
        "fuse_swiglu_quant": int("shared" in inputs),
        "fuse_rms_norm_pair_quant": int(q_norm),
        "fuse_sparse_attention_inverse_rope_quant": int("heads" in inputs),
        "fuse_hc_post_pre_norm_quant": sum(name in inputs for name in ("attn_norm", "ffn_norm")),
        "fuse_scaled_moe_experts": scaled.count("experts") // 2,
        "fuse_scaled_grouped_output": scaled.count("grouped_output"),
    }


def _caches(region: str, rounded: Rounded) -> int:
    """How many caches of a region are in a row layout: window rows, compressed rows, index rows."""
    attention = region.split("_")[1] if region.startswith("layer_") else ""
    main = {"": 0, "swa": 1, "hca": 2, "csa": 2}[attention]
    return rounded.rows * main + rounded.index_rows * (attention == "csa")
