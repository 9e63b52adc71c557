"""A small sharded DeepSeek-V4 in two micro-batches: cut, stitched over the borders of regions, scheduled; and run."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from atomc.capture import Call
from atomc.ops import Batch
from atomc.ops.batch import middle, split_batch
from atomc.parallel.collectives import is_collective
from atomc.parallel.sizes import AGREED, STEP, half_rows
from atomc.passes.borders import Region, stitch
from atomc.passes.chunk import Chunk
from atomc.passes.graph import base_of
from atomc.passes.row_wise import free_symbols
from atomc.passes.runner import Context
from atomc.passes.schedule import ScheduleOverlap
from tests.support.eager import Caches
from tests.support.ranks import run_ranks
from tests.support.sharded import Compiled, compiled


def node_seconds(fast: float, slow: float, collective: float) -> Callable[[Node], float]:
    """A cost model without a target: products and fused operators `slow`, other calls `fast`, views nothing."""

    def seconds(node: Node) -> float:
        if is_collective(node):
            return collective
        if not isinstance(node.target, torch._ops.OpOverload) or base_of(node) is not node:
            return 0.0
        heavy = node.target.namespace == "atom" or "linear" in str(node.target) or "mm" in str(node.target)
        return slow if heavy else fast

    return seconds


SECONDS = node_seconds(fast=1e-6, slow=1e-4, collective=5e-5)


@dataclass
class Part:
    """One call of a region, with a graph of its own."""

    call: Call
    region: Region
    inputs: Sequence[Any]


@dataclass
class Halves:
    """The calls of a step in two micro-batches."""

    unit: Compiled
    parts: list[Part]

    def step(
        self, batches: list[Batch], caches: list[Caches], most: int, by_requests: bool = False, cut: int | None = None
    ) -> list[Tensor]:
        """Logits on every rank; `most`: tokens of the fullest rank. `cut`: after so many tokens, not at the middle."""
        cuts = [middle(batch.query_start, by_requests=by_requests) if cut is None else cut for batch in batches]
        split = [split_batch(batch, at) for batch, at in zip(batches, cuts, strict=True)]
        own = [max(h[half].ids.shape[0] for h in split) for half in (0, 1)]
        rows = list(half_rows(most)) if cut is None and not by_requests else own
        values: list[list[dict[str, Any]]] = [[{}, {}] for _ in batches]
        carried: list[list[Any]] = [[] for _ in batches]
        for part in self.parts:
            given = [
                self._given(part, rank, halves, caches[rank], values[rank], carried[rank], rows)
                for rank, halves in enumerate(split)
            ]
            results = run_ranks(part.region.gm, self.unit.layout.mesh, given)
            for rank, found in enumerate(results):
                carried[rank] = self._take(part, found, values[rank])
        return [
            torch.cat([half["logits"] for half in values[rank]])[halves.logit_rows] for rank, halves in enumerate(split)
        ]

    def _given(
        self, part: Part, rank: int, halves: Any, caches: Caches, values: list[dict[str, Any]], carried: list[Any],
        rows: Sequence[int],
    ) -> dict[str, Any]:  # fmt: skip
        ctx, call, chunked = part.region.ctx, part.call, part.region.chunked
        mine: dict[str, Any] = self.unit.sizes(ctx, 0, rank) | self.unit.of_rank(call.region, call.prefix, rank)
        for placeholder, symbol in ctx.sizes.items():
            if symbol == AGREED:
                mine |= dict(zip(chunked.inputs[placeholder], rows, strict=True))
        for i in part.inputs:
            if i.role == "state":
                layer = int(call.prefix.rstrip(".").removeprefix("layers."))
                mine[i.placeholder] = getattr(caches.states[layer], i.name)
            elif i.role != "weight" and i.placeholder in chunked.inputs:
                for half, batch in enumerate((halves.first, halves.second)):
                    known = batch._asdict() if i.role == "batch" else values[half]
                    name = i.name if i.role == "batch" else call.binds.get(i.name, i.name)
                    mine[chunked.inputs[i.placeholder][half]] = known.get(name)
        return mine | dict(zip(chunked.given, carried, strict=True))

    def _take(self, part: Part, found: Sequence[Any], values: list[dict[str, Any]]) -> list[Any]:
        """Notes what a region gave; returns what it carries over."""
        count, chunked, outputs = part.region.chunked.results, part.region.chunked, part.region.outputs
        stays = range(count) if chunked.second is None else chunked.second
        values[0] |= dict(zip(outputs, found[:count], strict=True))
        values[1] |= dict(zip((outputs[at] for at in stays), found[count : count + len(stays)], strict=True))
        rest = list(found[count + len(stays) :])
        assert len(rest) == chunked.carried
        return rest


@cache
def chunked(layout: str, form: Any = "gather", hot: bool = False) -> dict[str, tuple[GraphModule, Context]]:
    """The regions of a layout in two micro-batches."""
    whole, found = compiled(layout, form, hot), {}
    for region in whole.program.regions:
        gm, ctx = copy.deepcopy(whole.graphs[region.name]), copy.copy(whole.contexts[region.name])
        ctx.states = {i.placeholder: i.name for i in region.inputs if i.role == "state"}
        Chunk(frozenset(g for g, plan in region.symbols.items() if plan in STEP)).run(gm, ctx)
        gm.graph.lint()
        gm.recompile()
        found[region.name] = gm, ctx
    return found


def halves(
    layout: str, form: Any = "gather", hot: bool = False, *, stitched: bool = False,
    then: Callable[[GraphModule, Context], Any] | None = None,
) -> Halves:  # fmt: skip
    """The calls of a step, stitched if asked for, each graph given to `then`."""
    unit, known = compiled(layout, form, hot), chunked(layout, form, hot)
    regions = {r.name: r for r in unit.program.regions}
    parts = []
    for call in unit.program.calls:
        region = regions[call.region]
        gm, ctx = copy.deepcopy(known[call.region][0]), copy.copy(known[call.region][1])
        takes = {i.placeholder: call.binds.get(i.name, i.name) for i in region.inputs if i.role == "value"}
        parts.append(Part(call, Region(gm, ctx, region.symbols, region.outputs, takes), region.inputs))
    if stitched:
        for first, second in itertools.pairwise(parts):
            stitch(first.region, second.region)
    for part in parts:
        if then is not None:
            then(part.region.gm, part.region.ctx)
        part.region.gm.graph.lint()
        part.region.gm.recompile()
    return Halves(unit, parts)


def schedule(gm: GraphModule, ctx: Context, **options: Any) -> GraphModule:
    """Scheduled with example costs and sizes."""
    ScheduleOverlap(SECONDS, sizes_of(gm), under_way=5e-5, **options).run(gm, ctx)
    gm.graph.lint()
    gm.recompile()
    return gm


def sizes_of(gm: GraphModule, size: int = 8) -> dict[str, int]:
    """A value for every size symbol of a graph."""
    return dict.fromkeys(set().union(*(free_symbols(node.meta.get("val")) for node in gm.graph.nodes)), size)
