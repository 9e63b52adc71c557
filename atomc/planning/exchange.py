"""Routed experts on many ranks: what is sent before and after them, and what a rank does between.

The one place that says what the layouts of `--parallel` send. It states the sizes of what `passes.shard` inserts, for
plans that are made without capturing a model.

Terms:
    gather  every rank gets the tokens of all and has a slice of every expert (`moe=tp`), or whole ones; sums go back
    route   tokens go to the ranks that have their experts (`moe=ep` along `dp`), once a rank, and come back. The host
            reads how many before they can be sent, so that such a step is captured in no graph
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from atomc.models.deepseek_v4.config import DeepseekV4Config
from atomc.parallel.kinds import Kind
from atomc.parallel.layout import Layout
from atomc.planning.operators import CODES, PARTIAL, Operator, Part, expert_bytes, experts_read, padded

if TYPE_CHECKING:
    from atomc.passes.shard import Form


def message_bytes(config: DeepseekV4Config) -> float:
    """Bytes of a token in a message: its codes and scales, the weights and numbers of its experts."""
    return config.hidden_size * CODES + 8 * config.num_experts_per_tok


def exchange(config: DeepseekV4Config, layout: Layout, part: Part, form: Form) -> Iterator[Operator]:
    """Operators from the router's choice to the layer's output."""
    yield from (_routed if form == "route" else _gathered)(config, layout, part)
    t, d = part.tokens, config.hidden_size
    yield Operator("add_shared", "experts", ("routed", "shared"), {"y_out": t * d * 2}, t * d * (PARTIAL + 4))


def _collective(name: str, kind: Kind, read: str, write: str, size: float, result: float, ranks: int) -> Operator:
    return Operator(name, "communication", (read,), {write: result}, size, {}, 1, kind, ranks)


def _experts(config: DeepseekV4Config, layout: Layout, reads: tuple[str, ...], write: str, rows: tuple[float, ...],
             everyone: float) -> Operator:  # fmt: skip
    """The routed experts of a rank: `rows` in, out, and pairs of a row and an expert; `everyone`: tokens of all."""
    d, inner, ranks = config.hidden_size, config.moe_intermediate_size, layout.ranks
    given, made, pairs = rows
    weights = expert_bytes(config) * experts_read(config, everyone) / ranks
    flops = everyone * config.num_experts_per_tok * 6 * d * inner / ranks
    width = inner if layout.moe == "ep" else inner / ranks
    moved = given * d * CODES + pairs * (d * CODES + width * (2 * CODES + 2) + d * 4) + made * d * PARTIAL
    waste = padded(everyone * config.num_experts_per_tok / config.n_routed_experts)
    return Operator(
        "experts",
        "experts",
        reads,
        {write: made * d * PARTIAL},
        weights + moved,
        {"fp8": flops},
        4,
        product="experts",
        waste=waste,
    )


def _gathered(config: DeepseekV4Config, layout: Layout, part: Part) -> Iterator[Operator]:
    t, d, everyone = part.tokens, config.hidden_size, part.everyone(layout)
    pairs = everyone * config.num_experts_per_tok / (layout.ranks if layout.moe == "ep" else 1)
    reads: tuple[str, ...] = ("x_experts", "chosen")
    if layout.dp > 1:
        message = t * message_bytes(config)
        yield Operator("pack", "experts", reads, {"message": message}, 2 * message)
        yield _collective("gather", "all_gather", "message", "gathered", message, message * layout.dp, layout.dp)
        reads = ("gathered",)
    out = "sums" if layout.ranks > 1 else "routed"
    yield _experts(config, layout, reads, out, (everyone, everyone, pairs), everyone)
    if layout.dp > 1:
        mine = t * d * PARTIAL
        after = "mine" if layout.tp > 1 else "routed"
        yield _collective("scatter", "reduce_scatter", "sums", after, mine, mine, layout.dp)
    if layout.tp > 1:
        size = t * d * PARTIAL
        before = "mine" if layout.dp > 1 else "sums"
        yield _collective("experts_sum", "all_reduce", before, "routed", size, size, layout.tp)


def _routed(config: DeepseekV4Config, layout: Layout, part: Part) -> Iterator[Operator]:
    t, d, dp, k = part.tokens, config.hidden_size, layout.dp, config.num_experts_per_tok
    copies = t * dp * (1 - (1 - 1 / dp) ** k)  # ranks that some of a token's experts are on, chosen alike
    message = message_bytes(config)
    yield Operator("sort", "experts", ("chosen",), {"order": t * k * 4, "counts": dp * 4.0}, t * k * 16, launches=2)
    yield _collective("counts", "all_to_all", "counts", "expected", dp * 4.0, dp * 4.0, dp)
    yield Operator("host_sizes", "experts", ("counts", "expected"), {"sizes": 0.0}, dp * 8.0, host=True)
    packed = {"rows": copies * message}
    yield Operator("pack", "experts", ("x_experts", "order", "sizes"), packed, 2 * copies * message)
    yield _collective("dispatch", "all_to_all", "rows", "dispatched", copies * message, copies * message, dp)
    pairs = t * dp * k / layout.ranks
    yield _experts(config, layout, ("dispatched",), "done", (copies, copies, pairs), part.everyone(layout))
    size = copies * d * PARTIAL
    yield _collective("combine", "all_to_all", "done", "back", size, size, dp)
    after = "mine" if layout.tp > 1 else "routed"
    made = t * d * PARTIAL
    yield Operator("combine_rows", "experts", ("back", "order"), {after: made}, size + made)
    if layout.tp > 1:
        yield _collective("experts_sum", "all_reduce", "mine", "routed", made, made, layout.tp)
