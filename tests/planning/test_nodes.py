"""Seconds of real graphs: planning's operators are those of a captured layer; schedules go by a graph's own costs."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

from atomc.compiler import Options, check_limits, check_scheme, fuse, serving_facts, trace
from atomc.costs.work import CostError
from atomc.models.source import open_model
from atomc.ops import OPS, exchange
from atomc.parallel.collectives import KINDS, is_collective
from atomc.parallel.layout import parse_layout
from atomc.parallel.links import sent_bytes
from atomc.passes.graph import PassError
from atomc.passes.runner import Context
from atomc.passes.schedule import ScheduleOverlap, task_graph
from atomc.planning.nodes import Load, NodeCosts
from atomc.planning.operators import LayerOperators, Part
from atomc.targets import get_target
from tests.support.halves import chunked, sizes_of
from tests.support.sharded import CONFIG

MI355X = get_target("mi355x")


def flash() -> tuple[Any, ...]:
    """V4-Flash without weights, the options, and its graphs, which passes may change."""
    source, options, program = _flash()
    regions = [replace(region, gm=copy.deepcopy(region.gm)) for region in program.regions]
    return source, options, replace(program, regions=regions)


@cache
def _flash() -> tuple[Any, ...]:
    source = open_model("deepseek-v4-flash", with_weights=False)
    options = Options(dtype="bfloat16", with_weights=False)
    serving = serving_facts(source, check_limits(options, source.config))
    return source, options, trace(source.config, serving, options, lambda *_: None)


@cache
def layer(name: str) -> tuple[Any, GraphModule, Context, dict[str, str]]:
    """A layer of V4-Flash as it is compiled for an MI355X."""
    source, options, program = flash()
    quantisation = check_scheme(options, source.config, MI355X)
    region = next(r for r in program.regions if r.name == name)
    found = fuse(source, program, region, quantisation, options, lambda *_: None)
    return source.config, region.gm, found.ctx, dict(region.symbols)


# Operators of a plan -> those of the graph that are the same work.
SAME = {
    "streams": "hc_post_pre_norm_quant", "linear": "rms_norm_pair_quant|scaled_grouped_output",
    "caches": "qk_norm_rope_insert|compressor", "index": "index_rope_topk", "attention": "sparse_attention",
    "experts": "scaled_moe_experts", "rest": "quantize|route|swiglu|pointwise|to.dtype",
}  # fmt: skip
PLANNED = {
    "streams": "streams", "caches": "q_rope_insert|pool", "index": "index_topk", "attention": "attention",
    "linear": "router", "experts": "experts", "rest": "quantize_z|route|swiglu|add_shared",
}  # fmt: skip


def group(name: str, groups: dict[str, str]) -> str:
    parts = {part: key for key, text in groups.items() for part in text.split("|")}
    found = [part for part in parts if name.startswith(part)]
    return parts[max(found, key=len)] if found else "linear"


@pytest.mark.slow
@pytest.mark.parametrize(("tokens", "requests"), [(4096, 1), (64, 64)])
@pytest.mark.parametrize(("name", "number"), [("layer_csa_topk", 4), ("layer_hca_topk", 3)])
def test_plans_do_what_the_compiled_layer_does(name: str, number: int, tokens: int, requests: int) -> None:
    """Bytes, FLOPs and seconds of the whole layer, and of each group of operators."""
    config, gm, ctx, symbols = layer(name)
    values = {"T": tokens, "B": requests, "N4": max(1, tokens // 4), "NH": max(1, tokens // 128), "L": requests}
    sizes = {symbol: values.get(meaning, 64) for symbol, meaning in symbols.items()}
    load = Load(requests, 4096)
    costs = NodeCosts(MI355X, sizes, {}, [load], config.n_routed_experts, frozenset(ctx.weights))
    graph: dict[str, list[float]] = {}
    for node in gm.graph.nodes:
        if node.op == "call_function" and (spent := costs(node).seconds):
            moved, flops = costs.work(node)
            add(graph, group(str(node.target).split(".", 1)[1], SAME), spent, moved, flops)
    plan: dict[str, list[float]] = {}
    for o in LayerOperators(config, number, parse_layout("dp=1"), Part(tokens, requests, 4096)).operators:
        add(plan, group(o.name, PLANNED), o.cost(MI355X).seconds, o.bytes, dict(o.flops))
    assert graph.keys() == plan.keys()
    for at, most in ((0, 0.08), (2, 0.01)):  # seconds, FLOPs
        assert sum(g[at] for g in graph.values()) == pytest.approx(sum(p[at] for p in plan.values()), rel=most), at
    for key in graph:
        assert graph[key][0] == pytest.approx(plan[key][0], rel=0.12, abs=25e-6), key
        assert graph[key][2] == pytest.approx(plan[key][2], rel=0.01), key
        if tokens > 1000 and key != "experts":  # the plan counts what passes between the experts' two products
            assert graph[key][1] == pytest.approx(plan[key][1], rel=0.08, abs=2e6), key


def add(to: dict[str, list[float]], key: str, seconds: float, moved: float, flops: dict[Any, float]) -> None:
    found = to.setdefault(key, [0.0, 0.0, 0.0])
    done = sum(count for kind, count in flops.items() if kind != "vector")
    for at, value in enumerate((seconds, moved, done)):
        found[at] += value


def costs_of(gm: GraphModule, axes: dict[str, int], rows: int) -> NodeCosts:
    return NodeCosts(MI355X, sizes_of(gm, rows), axes, [Load(1, 4096)] * 2, CONFIG.n_routed_experts)


def test_collectives_take_what_their_bytes_take() -> None:
    gm, _ = chunked("dp=2,moe=tp")["layer_csa_topk"]
    costs, link = costs_of(gm, {"dp": 2}, 4096), MI355X.link
    for node in filter(is_collective, gm.graph.nodes):
        read: Any = node.args[0]
        value = node.meta["val"] if KINDS[node.target] == "reduce_scatter" else read.meta["val"]
        sent = sent_bytes(KINDS[node.target], costs.bytes_of(value), 2)
        assert costs(node).seconds == pytest.approx(link.latency + sent / (link.pair_rate * link.share))
        assert costs(node).beside == link.kept


def test_own_experts_are_a_part_of_all() -> None:
    """Of gathered tokens a rank with half of the experts computes half of the pairs."""
    whole, part = chunked("dp=2,moe=tp")["layer_csa_topk"][0], chunked("dp=2,moe=ep")["layer_csa_topk"][0]
    found = []
    for gm in (whole, part):
        costs = costs_of(gm, {"dp": 2}, 64)
        node = next(n for n in gm.graph.nodes if "moe_experts" in str(n.target))
        found.append(costs.work(node)[1])
    assert found[0].keys() == found[1].keys()
    for kind in found[0]:  # half of each expert, or half of the experts
        assert found[0][kind] == pytest.approx(found[1][kind])


@pytest.mark.parametrize("layout", ["dp=2,moe=tp", "tp=2"])
def test_a_graph_is_scheduled_by_its_own_costs_and_within_a_limit(layout: str) -> None:
    gm, ctx = chunked(layout)["layer_csa_topk"]
    costs = costs_of(gm, {"dp": 2, "tp": 2}, 4096)
    sizes = {name: int(size) for name, size in costs.sizes.items()}
    free = _peak(gm, ctx, costs, sizes, None)
    tight = _peak(gm, ctx, costs, sizes, free - 1)
    assert tight < free
    with pytest.raises(PassError, match="no order found takes"):
        _peak(gm, ctx, costs, sizes, 1000)


def _peak(gm: GraphModule, ctx: Context, costs: NodeCosts, sizes: dict[str, int], limit: int | None) -> int:
    from atomc.passes.overlap import overlap

    moved = copy.deepcopy(gm)
    ScheduleOverlap(costs, sizes, limit=limit, require=False).run(moved, ctx)
    return overlap(task_graph(gm.graph, costs, sizes), limit).peak


def test_what_surrounds_a_collective_is_all_that_its_file_defines() -> None:
    assert {name for name, op in OPS.items() if op.reference.__module__ == exchange.__name__} == exchange.EXCHANGES


def test_an_operator_that_nothing_describes_is_named() -> None:
    gm = make_fx(lambda x: torch.ops.atom.swiglu(x, x, 1.0), tracing_mode="symbolic")(torch.ones(5, 4))
    node: Node = next(n for n in gm.graph.nodes if n.op == "call_function" and "swiglu" in str(n.target))
    costs = costs_of(gm, {}, 5)
    assert costs(node).seconds > 0
    node.target = torch.ops.atom.grouped_linear.default
    with pytest.raises(CostError, match="grouped_linear"):
        costs(node)
    moved, flops = replace(costs, lenient=True).work(node)  # of what only a cpu runs: x [5, 5] twice, and its result
    assert (moved, flops) == (3 * 5 * 5 * 4, {})
