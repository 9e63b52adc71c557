"""The least time of a step of a layer stack: bytes over the copy rate, operations over the matrix rates."""

from __future__ import annotations

from atomc.models.deepseek_v4.config import DeepseekV4Config

Flops = dict[str, float]


def operations(config: DeepseekV4Config, requests: int, length: int, context: int) -> Flops:
    """FLOPs by format of a step: `length` tokens of each request, the last at position `context` - 1.

    Products of quantised weights count as FP8, all others as bf16. Of the index scores those are counted that decide:
    who sees no more rows than the top-k takes all. Logits are of one token a request.
    """
    tokens, d = requests * length, config.hidden_size
    found: Flops = {"fp8": 0.0, "bf16": 2.0 * requests * d * config.vocab_size}
    positions = range(context - length, context)
    near = sum(min(p + 1, config.sliding_window) for p in positions)
    for ratio in config.compress_ratios[: config.num_hidden_layers]:
        found["fp8"] += tokens * _quantised(config, ratio)
        found["bf16"] += tokens * _wide(config, ratio)
        seen = [(p + 1) // ratio if ratio else 0 for p in positions]
        used = sum(min(n, config.index_topk) if ratio == 4 else n for n in seen)
        found["bf16"] += 4.0 * requests * (near + used) * config.num_attention_heads * config.head_dim
        if ratio == 4:
            scored = sum(n for n in seen if n > config.index_topk)
            found["bf16"] += 2.0 * requests * scored * config.index_n_heads * config.index_head_dim
    return found


def _quantised(c: DeepseekV4Config, ratio: int) -> float:
    """FLOPs of a token in products of quantised weights."""
    d, heads = c.hidden_size, c.num_attention_heads * c.head_dim
    weights = d * (c.q_lora_rank + c.head_dim) + c.q_lora_rank * heads
    weights += heads // c.o_groups * c.o_groups * c.o_lora_rank + c.o_groups * c.o_lora_rank * d
    weights += 3 * d * c.moe_intermediate_size * (c.num_experts_per_tok + 1)
    if ratio == 4:
        weights += c.q_lora_rank * c.index_n_heads * c.index_head_dim
    return 2.0 * weights


def _wide(c: DeepseekV4Config, ratio: int) -> float:
    """FLOPs of a token in products of weights that stay in full."""
    d, n = c.hidden_size, c.hc_mult
    weights = d * c.n_routed_experts + 2 * (2 * n + n * n) * n * d
    if ratio == 4:
        weights += d * (4 * c.head_dim + 4 * c.index_head_dim + c.index_n_heads)
    elif ratio:
        weights += d * 2 * c.head_dim
    return 2.0 * weights


def least(size: float, flops: Flops, best: dict[str, float]) -> float:
    """Seconds: the longer of moving and computing."""
    return max(size / best["copy"], sum(count / best[kind] for kind, count in flops.items()))
