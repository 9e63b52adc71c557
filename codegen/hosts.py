"""Which operator has kernels: the host function of each, found when it is first needed."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any, Final

from atomc.targets import Target

Host = Callable[..., Any]
# module in codegen/kernels -> the operators of `atomc.ops` whose host functions it has, under their own names
FAMILIES: Final = {
    "attention": (
        "sparse_attention", "sparse_attention_inverse_rope", "sparse_attention_inverse_rope_quant",
    ),
    "cache": ("cache_insert", "pack_rows", "packed_insert", "qk_norm_rope_insert"),
    "compressor": ("compressor_pool_norm_rope_insert", "compressor_update"),
    "hyper_connection": (
        "hc_head", "hc_head_norm", "hc_post", "hc_post_pre_norm", "hc_post_pre_norm_quant", "hc_pre", "hc_pre_norm",
    ),
    "indexer": ("index_rope_topk", "index_topk"),
    "moe": ("scaled_moe_experts",),
    "norm": ("rms_norm", "rms_norm_pair", "rms_norm_pair_quant", "rope"),
    "quantize": ("hadamard", "quantize"),
    "router": ("route_hash", "route_topk"),
    "scaled_gemm": ("scaled_grouped_output", "scaled_linear"),
    "swiglu": ("swiglu", "swiglu_quant"),
}  # fmt: skip
HOSTS: Final = {f"atom.{op}.default": (module, op) for module, ops in FAMILIES.items() for op in ops}


def host_of(op: str, target: Target) -> Host | None:
    """The host function of an operator, named as in a plan's step; None where the target has no kernel for it."""
    if not target.is_gpu or op not in HOSTS:
        return None
    module, name = HOSTS[op]
    host: Host = getattr(import_module(f"atomc.codegen.kernels.{module}"), name)
    return host


# What torch's own, precompiled kernels do on a GPU: a few numbers of a step (angles, indexes), casts when weights are
# loaded. None of them is on the path of a layer's weights.
LIBRARY: Final = frozenset(
    {
        "aten.add.Tensor",
        "aten.clamp.default",
        "aten.contiguous.default",
        "aten.cos.default",
        "aten.embedding.default",
        "aten.eye.default",
        "aten.index.Tensor",
        "aten.linear.default",
        "aten.mul.Tensor",
        "aten.reshape.default",
        "aten.sin.default",
        "aten.sub.Tensor",
        "aten.to.dtype",
        "aten.zeros.default",
    }
)


def has_kernel(op: str, target: Target) -> bool:
    """Whether a GPU target can run an operator, named as in a plan's step: a kernel of ours, or torch's."""
    return target.is_gpu and (op in HOSTS or op in LIBRARY)
