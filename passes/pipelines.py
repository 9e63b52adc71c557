"""The pipelines, each a tuple that reads top to bottom."""

from __future__ import annotations

from collections.abc import Mapping

from atomc.passes import fusions, quant_fusions
from atomc.passes.cancel_quantize import CancelQuantize
from atomc.passes.canonicalize import Canonicalize, DeadCode
from atomc.passes.merge_linears import MergeLinears
from atomc.passes.pointwise import Pointwise
from atomc.passes.quantize import Quantize
from atomc.passes.runner import Pass
from atomc.passes.scheme import SCHEMES, Scheme
from atomc.passes.wide_linears import WideLinears
from atomc.targets import Target, get_target

# Layers that read the same input and are stored in the same format (spec 6.1 K6, K7, K22).
MERGED_INPUTS = (
    ("attn.wq_a", "attn.wkv"),
    ("compressor.wkv", "compressor.wgate"),
    ("shared_experts.w1", "shared_experts.w3"),
)
# Find the operators that are plain mathematics. Larger patterns first: what they contain must still be whole.
_BLOCKS = (
    fusions.HC_PRE,
    fusions.HC_HEAD,
    fusions.HC_POST,
    fusions.RMS_NORM,
    fusions.RMS_NORM_UNIT,
    fusions.ROPE_INVERSE,
    fusions.ROPE,
)
_EXPERTS = (fusions.MOE_EXPERTS, fusions.SWIGLU, fusions.ROUTE_TOPK, fusions.ROUTE_HASH)


def mathematics() -> tuple[Pass, ...]:
    """The operators of any module, in full precision."""
    return (Canonicalize(), *_BLOCKS, *_EXPERTS)


def compilation(
    scheme: Scheme = SCHEMES["none"],
    target: Target | None = None,
    rows: Mapping[str, str] | None = None,
    index_query: str = "",
) -> tuple[Pass, ...]:
    """The pipeline of every compile: find the operators, merge linears, quantise, fuse operators with their neighbours.

    Args:
        rows, index_query: see `Quantize`.
    """
    return (*finding(scheme, target, rows, index_query), *emission(target))


def finding(
    scheme: Scheme = SCHEMES["none"],
    target: Target | None = None,
    rows: Mapping[str, str] | None = None,
    index_query: str = "",
) -> tuple[Pass, ...]:
    """The passes up to where the graphs of one rank and of many part."""
    target = target or get_target("cpu")
    scaled = (
        (quant_fusions.SCALED_MOE_EXPERTS, quant_fusions.SCALED_GROUPED_OUTPUT, quant_fusions.SCALED_LINEAR)
        if target.is_gpu
        else ()  # the cpu multiplies no narrow format: weights are expanded when they are loaded
    )
    return (
        Canonicalize(),
        *_BLOCKS,
        MergeLinears(MERGED_INPUTS),
        Quantize(scheme, target, rows or {}, index_query),
        CancelQuantize(),
        quant_fusions.MOE_EXPERTS_QUANT,
        *_EXPERTS,
        quant_fusions.SWIGLU_QUANT,
        fusions.RMS_NORM_PAIR,
        quant_fusions.RMS_NORM_PAIR_QUANT,
        fusions.QK_NORM_ROPE_INSERT,
        fusions.COMPRESSOR,
        fusions.INDEX_ROPE_TOPK,
        fusions.ATTENTION_INVERSE_ROPE,
        quant_fusions.ATTENTION_INVERSE_ROPE_QUANT,
        fusions.HC_PRE_NORM,
        fusions.HC_POST_PRE_NORM,
        quant_fusions.HC_POST_PRE_NORM_QUANT,
        fusions.HC_HEAD_NORM,
        *scaled,
    )


def emission(target: Target | None = None) -> tuple[Pass, ...]:
    """The passes after that."""
    generated = (WideLinears(), Pointwise()) if (target or get_target("cpu")).is_gpu else ()
    return (*generated, DeadCode())
