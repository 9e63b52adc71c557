"""Sharded, cut in two and scheduled: the ranks' graphs compute what they computed before, with collectives hidden."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule

from atomc.ops.batch import middle, split_batch
from atomc.parallel.collectives import WAIT, is_collective
from atomc.passes.chunk import Chunk
from atomc.passes.graph import PassError, order_edges
from atomc.passes.overlap import OverlapError
from atomc.passes.row_wise import free_symbols
from atomc.passes.runner import Context
from atomc.passes.schedule import ScheduleOverlap, node_seconds, task_graph
from tests.support.eager import Caches, make_batch, new_caches
from tests.support.micro_batches import STEP_SYMBOLS, operators
from tests.support.ranks import run_ranks
from tests.support.sharded import CONFIG, CONTEXT, LONGEST, Compiled, captured, compiled
from tests.support.v4_configs import random_ids

LAYOUTS = (("dp=2,moe=tp", "gather"), ("dp=2,moe=ep", "route"), ("tp=2", "gather"), ("dp=2,tp=2,moe=ep", "route"))
SECONDS = node_seconds(fast=1e-6, slow=1e-4, collective=5e-5)


@cache
def chunked(layout: str, form: Any) -> Compiled:
    """The regions of a layout in two micro-batches."""
    whole = compiled(layout, form)
    graphs, contexts = {}, {}
    for region in captured().regions:
        gm, ctx = copy.deepcopy(whole.graphs[region.name]), copy.copy(whole.contexts[region.name])
        ctx.states = {i.placeholder: i.name for i in region.inputs if i.role == "state"}
        Chunk(frozenset(g for g, plan in region.symbols.items() if plan in STEP_SYMBOLS)).run(gm, ctx)
        gm.graph.lint()
        gm.recompile()
        graphs[region.name], contexts[region.name] = gm, ctx
    return Compiled(whole.layout, graphs, contexts)


def scheduled(unit: Compiled) -> Compiled:
    """The same, scheduled; regions without collectives too."""
    graphs = {}
    for name, gm in unit.graphs.items():
        graphs[name] = schedule(copy.deepcopy(gm), unit.contexts[name])
    return Compiled(unit.layout, graphs, unit.contexts)


def schedule(gm: GraphModule, ctx: Context, **options: Any) -> GraphModule:
    sizes = dict.fromkeys(set().union(*(free_symbols(node.meta.get("val")) for node in gm.graph.nodes)), 8)
    ScheduleOverlap(SECONDS, sizes, **options).run(gm, ctx)
    gm.graph.lint()
    gm.recompile()
    return gm


def logits(unit: Compiled, halves: bool) -> tuple[list[Tensor], list[Caches]]:
    """A prefill whose middle a request straddles, then decode: logits of each step, dp rank after dp rank."""
    layout = unit.layout
    caches = [new_caches(CONFIG, 3, CONTEXT, longest_step=LONGEST) for _ in range(layout.ranks)]
    found, done = [], [0, 0]
    for lengths in ((17, 12), (5, 9), (1, 1)):
        batches = []
        for rank in range(layout.ranks):
            ids = [random_ids(CONFIG, 60, 10 * (rank // layout.tp) + i) for i in range(2)]
            pieces = [(i, done[i], ids[i][done[i] : done[i] + n]) for i, n in enumerate(lengths)]
            batches.append(make_batch(CONFIG, pieces, caches[rank]))
        done = [a + b for a, b in zip(done, lengths, strict=True)]
        with torch.no_grad():
            if halves:
                found += step_halves(unit, batches, caches, sum(lengths))
            else:
                found += unit.step(batches, [c.states for c in caches], sum(lengths))
    return found, caches


def step_halves(unit: Compiled, batches: list[Any], caches: list[Caches], rows: int) -> list[Tensor]:
    regions = {r.name: r for r in captured().regions}
    cuts = [middle(batch.query_start, by_requests=False) for batch in batches]
    split = [split_batch(batch, cut) for batch, cut in zip(batches, cuts, strict=True) if cut is not None]
    values: list[list[dict[str, Any]]] = [[{}, {}] for _ in batches]
    for call in captured().calls:
        region, ctx = regions[call.region], unit.contexts[call.region]
        assert ctx.chunked is not None
        given = []
        for rank, halves in enumerate(split):
            mine: dict[str, Any] = unit.weights(call.region, call.prefix, rank)
            for placeholder in ctx.sizes:
                mine |= dict.fromkeys(ctx.chunked.inputs[placeholder], -(-rows // 2))
            for i in region.inputs:
                if i.role == "state":
                    layer = int(call.prefix.rstrip(".").removeprefix("layers."))
                    mine[i.placeholder] = getattr(caches[rank].states[layer], i.name)
                elif i.role != "weight" and i.placeholder in ctx.chunked.inputs:
                    for half, batch in enumerate((halves.first, halves.second)):
                        known = batch._asdict() if i.role == "batch" else values[rank][half]
                        name = i.name if i.role == "batch" else call.binds.get(i.name, i.name)
                        mine[ctx.chunked.inputs[i.placeholder][half]] = known[name]
            given.append(mine)
        results = run_ranks(unit.graphs[call.region], unit.layout.mesh, given)
        for rank, result in enumerate(results):
            for half in (0, 1):
                mine_out = result[half * ctx.chunked.results : (half + 1) * ctx.chunked.results]
                values[rank][half] |= dict(zip(region.outputs, mine_out, strict=True))
    return [
        torch.cat([half["logits"] for half in values[rank]])[halves.logit_rows] for rank, halves in enumerate(split)
    ]


@pytest.mark.parametrize(("layout", "form"), LAYOUTS)
def test_ranks_in_two_micro_batches_compute_what_they_did(layout: str, form: Any) -> None:
    """Scheduled: bitwise what the halves give in the order they were cut; and what the whole step gives, to 1e-5."""
    want, _ = logits(compiled(layout, form), halves=False)
    plain, before = logits(chunked(layout, form), halves=True)
    moved, after = logits(scheduled(chunked(layout, form)), halves=True)
    for a, b, c in zip(want, plain, moved, strict=True):
        assert (a - b).abs().max() <= 1e-5 * max(1.0, float(a.abs().max()))
        assert torch.equal(b, c)
    for one, other in zip(before, after, strict=True):
        for x, y in zip(one.states, other.states, strict=True):
            for s, t in zip(x, y, strict=True):
                assert s is None or t is None or torch.equal(s.view(torch.uint8), t.view(torch.uint8))


@pytest.mark.parametrize(("layout", "form"), LAYOUTS)
def test_a_schedule_moves_nodes_and_hides_collectives(layout: str, form: Any) -> None:
    for name, gm in chunked(layout, form).graphs.items():
        moved = schedule(copy.deepcopy(gm), chunked(layout, form).contexts[name], require=name.startswith("layer"))
        assert operators(moved) == operators(gm)
        place = {node.name: at for at, node in enumerate(moved.graph.nodes)}
        for node, edges in order_edges(gm.graph).items():
            assert all(place[edge.name] < place[node.name] for edge in edges if node.op != "placeholder")
        if name.startswith("layer"):
            nodes = list(moved.graph.nodes)
            apart = [n.name for n in nodes if is_collective(n) and nodes[place[n.name] + 1].target is not WAIT]
            assert apart, name


def test_a_whole_graph_hides_nothing_and_says_so() -> None:
    unit = compiled("dp=2,moe=tp")
    gm = copy.deepcopy(unit.graphs["layer_csa_topk"])
    free = node_seconds(0.0, 0.0, 1e-4)  # nothing to hide them with
    sizes = dict.fromkeys(set().union(*(free_symbols(n.meta.get("val")) for n in gm.graph.nodes)), 8)
    with pytest.raises(OverlapError, match="no communication is hidden"):
        ScheduleOverlap(free, sizes).run(gm, unit.contexts["layer_csa_topk"])


def test_a_size_without_a_value_is_an_error() -> None:
    gm = chunked("dp=2,moe=tp", "gather").graphs["layer_csa_topk"]
    with pytest.raises(PassError, match="which has no value"):
        task_graph(gm.graph, SECONDS, {})
