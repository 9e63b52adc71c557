"""What a compile does for many ranks: reads the layout, gives the pass that cuts for it, and proves what comes out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from atomc.capture import Program
from atomc.collectives import Collective, Proof, RankGraph, check_graph, prove
from atomc.formats import FP8_TILE, MXFP4
from atomc.formats import Layout as Format
from atomc.models.deepseek_v4.config import DeepseekV4Config
from atomc.models.deepseek_v4.sharding import placement_of
from atomc.parallel.layout import Layout, LayoutError, ModelSizes, parse_layout
from atomc.passes.runner import Context
from atomc.passes.scheme import Scheme
from atomc.passes.shard import ShardGraph


@dataclass(frozen=True)
class Ranks:
    """What the ranks of a layout send one another: region -> collectives; and the proof that they do so alike."""

    layout: Layout
    collectives: dict[str, list[Collective]]
    proof: Proof


def layout_for(text: str, config: DeepseekV4Config, scheme: Scheme) -> Layout:
    """The layout that `--parallel` says, if the model in that scheme can be cut so.

    Raises:
        LayoutError: it cannot; the message has the number and the nearest legal ones.
    """
    layout = layout_of(text)
    layout.check(model_sizes(config, scheme))
    return layout


def layout_of(text: str) -> Layout:
    """The layout that `--parallel` says; one rank where it says nothing."""
    return parse_layout(text) if text else Layout()


def check_parallel(text: str, stop_after: str | None) -> None:
    """What can be done for more than one rank today: the graphs are cut and proven, no plan is written.

    Raises:
        LayoutError: more is asked for.
    """
    layout = layout_of(text)
    if layout.tbo != "off":
        raise LayoutError(f"--parallel {layout}: batches cannot be overlapped yet; leave tbo out.")
    if layout.ranks > 1 and stop_after is None:
        raise LayoutError(
            f"--parallel {layout}: an artifact is for one rank as yet. With --stop-after dead_code the graphs are cut "
            "for the ranks and their collectives are proven; nothing is written."
        )


def model_sizes(config: DeepseekV4Config, scheme: Scheme) -> ModelSizes:
    """The numbers that a layout has to divide; an expert's columns in the blocks that are rounded together."""
    found = scheme.rule("experts", ("ffn.experts.w13", "ffn.experts.w2"))
    stored = {"fp4": str(MXFP4), "fp8": str(FP8_TILE)}.get(config.expert_dtype) if config.quantized else None
    texts = [] if found is None else [stored if found[1].weight == "stored" else found[1].weight, found[1].activation]
    columns = [Format.parse(t).columns or config.moe_intermediate_size for t in texts if t and ":" in t]
    return ModelSizes(
        config.num_attention_heads, config.o_groups, config.n_routed_experts, config.moe_intermediate_size,
        config.vocab_size, math.lcm(1, *columns),
    )  # fmt: skip


def shard_pass(layout: Layout) -> ShardGraph | None:
    """The pass that cuts regions for the layout; experts are gathered for, which suits steps of any kind."""
    return ShardGraph(layout.mesh, layout.moe, placement_of) if layout.ranks > 1 else None


def prove_ranks(program: Program, cut: Mapping[str, Context], layout: Layout, buckets: Sequence[int]) -> Ranks | None:
    """Check the collectives of every region, and prove that all ranks issue them alike; None for one rank.

    Args:
        cut: region -> what its passes found, of those that the shard pass has cut. buckets: rows of a step.
    Raises:
        CollectivesError: a sum is used before it is taken, or ranks would wait for one another for ever.
    """
    if layout.ranks == 1 or len(cut) < len(program.regions):
        return None
    graphs = [RankGraph(r.name, r.gm, (ctx := cut[r.name]).placements, r.symbols, ctx.sizes) for r in program.regions]
    found = {graph.name: check_graph(graph, layout.mesh) for graph in graphs}
    calls = [c.region for c in program.calls]
    return Ranks(layout, found, prove(found, lambda *_: calls, layout.mesh, buckets))
