"""Which operator has kernels: the host function of each, found when it is first needed."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any, Final

from atomc.codegen.aot import KernelError
from atomc.ops.exchange import EXCHANGES
from atomc.parallel.kinds import NAMESPACE
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
    "moe_plain": ("moe_experts",),
    "norm": ("rms_norm", "rms_norm_pair", "rms_norm_pair_quant", "rope"),
    "quantize": ("hadamard", "quantize"),
    "router": ("route_hash", "route_topk"),
    "gemm": ("linear_fp32",),
    "scaled_gemm": ("scaled_grouped_output", "scaled_linear"),
    "swiglu": ("swiglu", "swiglu_quant"),
}  # fmt: skip
HOSTS: Final = {f"atom.{op}.default": (f"kernels.{module}", op) for module, ops in FAMILIES.items() for op in ops} | {
    "aten.bmm.default": ("kernels.gemm", "bmm"),
    "aten.clone.default": ("kernels.copy", "clone"),
    "aten.contiguous.default": ("kernels.copy", "contiguous"),
    "aten.linear.default": ("kernels.gemm", "linear"),
    "aten.reshape.default": ("kernels.copy", "reshape"),
    "atom.pointwise.default": ("pointwise", "pointwise"),
}


def host_of(op: str, target: Target) -> Host | None:
    """The host function of an operator, named as in a plan's step; None where the target has no kernel for it.

    Raises:
        KernelError: Triton, which compiles kernels, is not installed.
    """
    if not target.is_gpu or op not in HOSTS:
        return None
    module, name = HOSTS[op]
    try:
        host: Host = getattr(import_module(f"atomc.codegen.{module}"), name)
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        raise KernelError(f"kernels for {target.name} are compiled by Triton: pip install 'atomc[kernels]'.") from error
    return host


# What torch does on a GPU when weights are loaded, once: casts.
PREPARES: Final = frozenset({"aten.contiguous.default", "aten.reshape.default", "aten.to.dtype"})


# What torch does on a GPU between ranks: collectives, and what packs and sorts what they send, which has no kernel yet.
BETWEEN_RANKS: Final = frozenset(f"atom.{op}.default" for op in EXCHANGES)


def has_kernel(op: str, target: Target) -> bool:
    """Whether a GPU target runs an operator, named as in a plan's step: a kernel of ours, or torch between ranks."""
    return target.is_gpu and (op in HOSTS or op in BETWEEN_RANKS or op.startswith(f"{NAMESPACE}."))
