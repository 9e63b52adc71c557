"""Memory of a rank: its part of the weights, the state of its requests, and what a step needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from atomc.models.deepseek_v4.config import DeepseekV4Config
from atomc.parallel.layout import Layout
from atomc.passes.shard import form_of
from atomc.planning.operators import FP8, INDEX_ROW, ROW, expert_bytes
from atomc.planning.step import Step, schedule
from atomc.targets import Target

USABLE: Final = 0.92  # of a device's memory: the driver, the collectives' library and captured graphs take the rest


@dataclass(frozen=True)
class RankMemory:
    """Bytes of weights, of a request's state, of a step's buffers, and of all that there may be."""

    weights: float
    request: float
    step: float
    usable: float

    @property
    def requests(self) -> int:
        """Requests that a rank holds."""
        return max(0, int((self.usable - self.weights - self.step) // self.request))

    def left(self, requests: int) -> int:
        """Bytes that a step may have beside weights and so many requests."""
        return int(self.usable - self.weights - requests * self.request)

    def at(self, requests: int) -> float:
        """Bytes with so many requests."""
        return self.weights + self.step + requests * self.request


def rank_memory(config: DeepseekV4Config, layout: Layout, target: Target, context: int, tokens: int) -> RankMemory:
    """Of requests of `context` tokens and steps of `tokens`."""
    step = Step(tokens, 1, tokens)
    kinds = config.compress_ratios[: config.num_hidden_layers]
    layers = sorted({kinds.index(ratio) for ratio in kinds})  # one of each, so that each kind of region is there
    form = form_of(layout, target, "prefill")
    cuts = [step.whole, *([step.halves] if layout.tbo != "off" and step.halves else [])]
    peak = max(schedule(config, layout, target, parts, layers=layers, form=form).peak for parts in cuts)
    return RankMemory(weight_bytes(config, layout), request_bytes(config, context), peak, USABLE * target.memory_bytes)


def weight_bytes(config: DeepseekV4Config, layout: Layout) -> float:
    """A rank's weights, in the released formats (spec 3.1, 4.4)."""
    d, tp = config.hidden_size, layout.tp
    total = 2 * config.vocab_size * d * 2 / tp
    return total + sum(_layer(config, layout, ratio) for ratio in config.compress_ratios[: config.num_hidden_layers])


def _layer(config: DeepseekV4Config, layout: Layout, ratio: int) -> float:
    d, dh, qr, tp = config.hidden_size, config.head_dim, config.q_lora_rank, layout.tp
    width, groups, rank = config.num_attention_heads * dh, config.o_groups, config.o_lora_rank
    size = FP8 * (d * (qr + dh) + (qr * width + width * rank + groups * rank * d) / tp)
    if ratio:
        size += 2 * 2 * d * dh * (2 if ratio == 4 else 1)
    if ratio == 4:
        di, heads = config.index_head_dim, config.index_n_heads
        size += (FP8 * qr * heads * di + 2 * d * heads) / tp + 2 * 2 * d * 2 * di
    n = config.hc_mult
    size += 2 * 4 * (2 * n + n * n) * n * d  # streams of two sublayers
    size += 2 * d * config.n_routed_experts + FP8 * 3 * d * config.moe_intermediate_size  # router, shared expert
    return size + expert_bytes(config) * config.n_routed_experts / layout.ranks


def request_bytes(config: DeepseekV4Config, context: int) -> float:
    """A request's caches, the same on every rank that serves it (spec 4.3)."""
    total = 0.0
    for ratio in config.compress_ratios[: config.num_hidden_layers]:
        total += config.sliding_window * ROW
        if ratio:
            ring, width = (2 * ratio, 2 * config.head_dim) if ratio == 4 else (ratio, config.head_dim)
            total += context // ratio * ROW + ring * width * 2 * 4
        if ratio == 4:
            total += context // 4 * INDEX_ROW + 8 * 2 * config.index_head_dim * 2 * 4
    return total
