"""Aliases, side effects, and the order they impose on a graph."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from atomc.passes.graph import (
    PassError,
    base_of,
    is_pure,
    location,
    mutated_args,
    order_edges,
    quiet,
    reorder,
    resources_written,
    storage_of,
)
from tests.support.graphs import TOKENS, operators, randn, traced

atom = torch.ops.atom


def calls(gm: GraphModule) -> dict[str, Node]:
    return {n.name: n for n in gm.graph.nodes if n.op == "call_function"}


# -- aliases -----------------------------------------------------------------------------------------------------------


def views(x: Tensor) -> tuple[Tensor, ...]:
    first, _ = x.split([3, 5], dim=-1)
    return first[:, 1:], x.unsqueeze(0).transpose(1, 2), x + 1, x.clone()


def test_a_chain_of_views_leads_to_its_base() -> None:
    gm = traced(views, randn(TOKENS, 8))
    x = next(iter(gm.graph.nodes))
    first, turned, computed, copied = next(n for n in gm.graph.nodes if n.op == "output").args[0]
    assert base_of(first) is x
    assert base_of(turned) is x
    assert storage_of(first) == storage_of(turned) == storage_of(x)
    assert base_of(computed) is computed
    assert base_of(copied) is copied


def test_inputs_that_overlap_share_a_storage() -> None:
    base = randn(4, 8)
    mode_gm = traced(lambda x: (x[:2], x[1:]), base)
    low, high = next(n for n in mode_gm.graph.nodes if n.op == "output").args[0]
    assert low is not high
    assert storage_of(low) == storage_of(high)


# -- side effects ------------------------------------------------------------------------------------------------------


def effects(x: Tensor, cache: Tensor) -> Tensor:
    cache.add_(x)
    noise = torch.rand_like(x)
    return x.relu() + noise


def test_what_is_pure() -> None:
    nodes = calls(traced(effects, randn(4), randn(4)))
    assert {name: is_pure(node) for name, node in nodes.items()} == {
        "add_": False, "rand_like": False, "relu": True, "add": True,
    }  # fmt: skip
    assert resources_written(nodes["rand_like"]) == {"state"}
    assert [n.name for n in mutated_args(nodes["add_"])] == ["cache_1"]


def insert_then_read(cache: Tensor, x: Tensor, table: Tensor, rows: Tensor) -> Tensor:
    before = cache.sum()
    atom.cache_insert(cache, x, table, rows, rows)
    return cache.sum() * before + x.sum()


@pytest.fixture
def cache_graph() -> GraphModule:
    ints = torch.zeros(TOKENS, dtype=torch.int32)
    return traced(insert_then_read, randn(3, 4, 8), randn(TOKENS, 8), torch.zeros(1, 3, dtype=torch.int32), ints)


def test_reads_stay_on_their_side_of_a_write(cache_graph: GraphModule) -> None:
    nodes = calls(cache_graph)
    edges = order_edges(cache_graph.graph)
    insert = nodes["cache_insert"]
    assert nodes["sum_1"] in edges[insert]
    assert insert in edges[nodes["sum_2"]]
    assert insert not in edges[nodes["sum_3"]]  # x is not written


def test_reorder_restores_a_scrambled_graph(cache_graph: GraphModule) -> None:
    before = operators(cache_graph)
    edges = order_edges(cache_graph.graph)
    output = next(n for n in cache_graph.graph.nodes if n.op == "output")
    for node in reversed([n for n in cache_graph.graph.nodes if n.op == "call_function"]):
        output.prepend(node)  # the calls in reverse order
    assert reorder(cache_graph.graph, edges) is None
    after = [n.name for n in cache_graph.graph.nodes if n.op == "call_function"]
    assert sorted(operators(cache_graph)) == sorted(before)
    assert after.index("sum_1") < after.index("cache_insert") < after.index("sum_2")
    cache_graph.graph.lint()


def test_random_calls_keep_their_order() -> None:
    gm = traced(lambda x: torch.rand_like(x) - torch.rand_like(x), randn(4))
    nodes = calls(gm)
    assert nodes["rand_like"] in order_edges(gm.graph)[nodes["rand_like_1"]]


def test_a_cycle_is_reported(cache_graph: GraphModule) -> None:
    edges = order_edges(cache_graph.graph)
    nodes = calls(cache_graph)
    edges[nodes["sum_1"]].add(nodes["sum_2"])
    assert reorder(cache_graph.graph, edges) is not None


# -- fake values -------------------------------------------------------------------------------------------------------


def test_looking_at_symbolic_sizes_adds_no_guard() -> None:
    gm = traced(lambda x: x + 1, randn(TOKENS, 8))
    value = next(iter(gm.graph.nodes)).meta["val"]
    with quiet([value]):
        assert value.shape[0] == TOKENS  # would specialise the size
    assert not value.fake_mode.shape_env.guards


def test_a_graph_without_fake_values_is_refused() -> None:
    with pytest.raises(PassError, match=r"no fake values; capture it with torch\.export"), quiet([torch.ones(1)]):
        pass


def test_location_is_the_models_line() -> None:
    node = calls(traced(lambda x: x.relu(), randn(4)))["relu"]
    assert location(node).startswith("passes/test_graph.py:")
