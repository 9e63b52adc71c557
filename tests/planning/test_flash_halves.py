"""V4-Flash's regions for eight MI355X, cut in two, stitched, scheduled by their own costs: what a plan says of them."""

from __future__ import annotations

import copy
from functools import cache

import pytest
from torch.fx import GraphModule

from atomc.capture import Region as Captured
from atomc.compiler import check_scheme, fuse
from atomc.parallel.layout import parse_layout
from atomc.parallel.sizes import AGREED, STEP
from atomc.passes import pipelines
from atomc.passes.borders import Region, stitch
from atomc.passes.chunk import Chunk
from atomc.passes.overlap import overlap
from atomc.passes.row_wise import free_symbols
from atomc.passes.runner import Context, run_pipeline
from atomc.passes.schedule import ScheduleOverlap, task_graph
from atomc.planning.nodes import Load, NodeCosts
from atomc.planning.step import Step, step_tasks
from atomc.ranks import Variant
from atomc.regions import copy_context
from tests.planning.test_nodes import MI355X, flash

pytestmark = pytest.mark.slow
TOKENS = 8192


@cache
def uncut() -> dict[str, tuple[Captured, GraphModule, Context]]:
    """The regions of one rank, before they are cut for many."""
    source, options, program = flash()
    quantisation, found = check_scheme(options, source.config, MI355X), {}
    for region in program.regions:
        one = fuse(source, program, region, quantisation, options, lambda *_: None, keep=True)
        assert one.uncut is not None
        found[region.name] = region, one.uncut[0], one.uncut[1]
    return found


def halved(name: str, layout: str) -> Region:
    """A region of a rank in two micro-batches."""
    captured, gm, ctx = uncut()[name]
    gm, ctx = copy.deepcopy(gm), copy_context(ctx)
    shard = Variant(parse_layout(layout), "gather").shard_pass()
    run_pipeline((shard, *pipelines.emission(MI355X)), gm, ctx, after=pipelines.finding(target=MI355X))
    Chunk(frozenset(g for g, plan in captured.symbols.items() if plan in STEP)).run(gm, ctx)
    call = next(c for c in flash()[2].calls if c.region == name)
    takes = {i.placeholder: call.binds.get(i.name, i.name) for i in captured.inputs if i.role == "value"}
    return Region(gm, ctx, captured.symbols, captured.outputs, takes)


def sizes_of(region: Region) -> dict[str, int]:
    """Of a prefill of one request, halved."""
    half = TOKENS // 2
    known = {"T": half, "B": 1, "N4": half // 4, "NH": half // 128, "L": 1, AGREED: half}
    meanings = {**region.symbols, **region.meanings()}
    symbols = set().union(*(free_symbols(n.meta.get("val")) for n in region.gm.graph.nodes))
    agreed = {s for s, twin in region.chunked.symbols.items() if meanings.get(twin) == AGREED}
    return {s: half if s in agreed else known.get(meanings.get(s, ""), 0) for s in symbols}


@pytest.mark.parametrize("layout", ["dp=8,moe=tp", "dp=8,moe=ep"])
@pytest.mark.parametrize(("name", "layer"), [("layer_csa_topk", 4), ("layer_hca_topk", 5)])
def test_a_layer_between_two_others(name: str, layer: int, layout: str) -> None:
    """Compute and communication are the plan's of such a layer; what is left open on both sides hides some of it."""
    before, here, after = halved("layer_hca_topk", layout), halved(name, layout), halved("layer_csa_topk", layout)
    assert stitch(before, here)
    assert stitch(here, after)
    for region in (before, here, after):
        region.gm.graph.lint()
    config, known = flash()[0].config, parse_layout(layout)
    costs = NodeCosts(
        MI355X, sizes_of(here), {"dp": known.dp, "tp": known.tp}, [Load(1, TOKENS // 2), Load(1, TOKENS)],
        config.n_routed_experts, frozenset(here.ctx.weights),
    )  # fmt: skip
    plan = step_tasks(config, known, MI355X, Step(TOKENS, 1, TOKENS).halves or [], [layer])
    pending = max(t.seconds for t in plan.graph.tasks if "scatter" in t.name)
    graph = task_graph(here.gm.graph, costs, dict(costs.sizes), pending)
    assert len(graph.pending) == len(graph.open) == 1
    own = [t for t in graph.tasks if t.name not in graph.pending]
    for stream, most in (("compute", 0.08), ("collective", 0.02)):
        spent, planned = (sum(t.seconds for t in g if t.stream == stream) for g in (own, plan.graph.tasks))
        assert spent == pytest.approx(planned, rel=most), stream
    found = overlap(graph, require=True)
    assert found.computed < sum(t.seconds for t in graph.tasks) - 0.4 * found.communication
    limited = ScheduleOverlap(costs, dict(costs.sizes), limit=int(1.01 * found.peak), under_way=pending)
    report = limited.run(here.gm, here.ctx)
    here.gm.graph.lint()
    reasons = {refusal.reason.partition(" are not hidden: ")[2] or refusal.reason for refusal in report.refusals}
    assert reasons <= {"compute independent of it hides other collectives", "left to the next region"}
    assert "left to the next region" in reasons
