"""What a layout on many ranks has to divide of a model in a scheme."""

from __future__ import annotations

import math

from atomc.formats import FP8_TILE, MXFP4
from atomc.formats import Layout as Format
from atomc.models.deepseek_v4.config import DeepseekV4Config
from atomc.parallel.layout import ModelSizes
from atomc.passes.scheme import Rule, Scheme


def model_sizes(config: DeepseekV4Config, scheme: Scheme) -> ModelSizes:
    """The numbers that a layout has to divide, in blocks that are rounded together where the scheme has such."""

    def blocks(kind: str, path: str, stored: str | None, rows: bool = False) -> list[int]:
        found = scheme.rule(kind, (path,))
        if found is None:
            return []
        return [_block(text, rows) for text in (_stored(found[1], stored), found[1].activation) if text and ":" in text]

    experts = {"fp4": str(MXFP4), "fp8": str(FP8_TILE)}.get(config.expert_dtype) if config.quantized else None
    dense = str(FP8_TILE) if config.quantized else None
    inner = [n or config.moe_intermediate_size for n in blocks("experts", "ffn.experts.w13", experts)]
    ranks, head = config.o_lora_rank, config.head_dim
    return ModelSizes(
        config.num_attention_heads, config.o_groups, config.n_routed_experts, config.moe_intermediate_size,
        config.vocab_size, math.lcm(1, *inner),
        {
            "rows of wq_b": (config.num_attention_heads * head, blocks("linear", "attn.wq_b", dense, rows=True)),
            "rows of wo_a": (config.o_groups * ranks, blocks("grouped_output", "attn.wo_a", dense, rows=True)),
            "columns of wo_b": (config.o_groups * ranks, blocks("linear", "attn.wo_b", dense)),
        },
    )  # fmt: skip


def _stored(rule: Rule, stored: str | None) -> str | None:
    return stored if rule.weight == "stored" else rule.weight


def _block(text: str, rows: bool) -> int:
    """Columns, or rows, that have one scale; 0: all of them have."""
    layout = Format.parse(text)
    return layout.rows if rows else layout.columns
