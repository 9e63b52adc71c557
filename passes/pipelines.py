"""The pipelines, each a tuple that reads top to bottom."""

from __future__ import annotations

from atomc.passes import fusions
from atomc.passes.canonicalize import Canonicalize, DeadCode
from atomc.passes.merge_linears import MergeLinears
from atomc.passes.runner import Pass

# Layers that read the same input and are stored in the same format (spec 6.1 K6, K7, K22).
MERGED_INPUTS = (
    ("attn.wq_a", "attn.wkv"),
    ("compressor.wkv", "compressor.wgate"),
    ("shared_experts.w1", "shared_experts.w3"),
)


def mathematics() -> tuple[Pass, ...]:
    """Find the operators that are plain mathematics. Larger patterns first: what they contain must still be whole."""
    return (
        Canonicalize(),
        fusions.HC_PRE,
        fusions.HC_HEAD,
        fusions.HC_POST,
        fusions.RMS_NORM,
        fusions.RMS_NORM_UNIT,
        fusions.ROPE_INVERSE,
        fusions.ROPE,
        fusions.MOE_EXPERTS,
        fusions.SWIGLU,
        fusions.ROUTE_TOPK,
        fusions.ROUTE_HASH,
    )


def fusion() -> tuple[Pass, ...]:
    """The pipeline of every compile: find the operators, merge linears, then fuse operators with their neighbours."""
    return (
        *mathematics(),
        MergeLinears(MERGED_INPUTS),
        fusions.RMS_NORM_PAIR,
        fusions.QK_NORM_ROPE_INSERT,
        fusions.COMPRESSOR,
        fusions.INDEX_ROPE_TOPK,
        fusions.ATTENTION_INVERSE_ROPE,
        fusions.HC_PRE_NORM,
        fusions.HC_POST_PRE_NORM,
        fusions.HC_HEAD_NORM,
        DeadCode(),
    )
