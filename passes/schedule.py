"""Schedule: the nodes of a region in an order that hides its collectives, on two streams (`passes.overlap`).

Contract:
    The pass only moves nodes: what a graph computes, and every node in it, stays. Order edges hold: data, and writes of
    state before later reads of it. A collective stands as early and its `wait_tensor` as late as the schedule says; one
    graph is every rank's, so the order of collectives is the same on all. Where nothing can be hidden though the graph
    has collectives, that is an error with the reasons; what is exposed in part is refused with its reason each.

Terms:
    task     a call; views, sizes and tuple items take no time and no memory
    buffer   the storage that a call makes; of a collective, its result until the last reader of its wait

Pseudo-code:
    tasks of the calls in order, waits belonging to their collectives; seconds by the caller's cost model
    overlap(tasks); place the nodes in the order of the issues
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch.fx import Graph, GraphModule, Node

from atomc.parallel.collectives import WAIT, is_collective
from atomc.parallel.tasks import Schedule, Stream, Task, TaskGraph
from atomc.passes.graph import PassError, base_of, calls, location, op_name, order_edges
from atomc.passes.overlap import overlap
from atomc.passes.runner import Context, Match, Pass, Refusal, Report

Seconds = Callable[[Node], float]


@dataclass(frozen=True)
class ScheduleOverlap(Pass):
    """Reorder a region's nodes.

    Attributes:
        seconds: what a call takes. sizes: symbol of the graph -> its value, for bytes. limit: most bytes of live
            buffers. require: raise where nothing is hidden.
    """

    name: ClassVar[str] = "schedule"
    requires: ClassVar[frozenset[str]] = frozenset({"canonical", "values"})
    seconds: Seconds = field(repr=False)
    sizes: Mapping[str, int] = field(default_factory=dict)
    limit: int | None = None
    require: bool = True

    def run(self, gm: GraphModule, ctx: Context) -> Report:
        found = overlap(task_graph(gm.graph, self.seconds, self.sizes), self.limit, require=self.require)
        place(gm.graph, found)
        nodes = {node.name: node for node in calls(gm.graph)}
        refused = [Refusal(f"{location(nodes[why.task])} {why.task}", why.reason) for why in found.why]
        hidden = [nodes[name] for name, exposed in found.exposed.items() if not exposed]
        return Report([Match(location(node), op_name(node.target)) for node in hidden], refused)


def task_graph(graph: Graph, seconds: Seconds, sizes: Mapping[str, int]) -> TaskGraph:
    """The calls of a graph as tasks, named as their nodes; a wait is part of its collective.

    Raises:
        PassError: a size has a symbol without a value; a wait waits for no collective.
    """
    before, tasks, buffers = order_edges(graph), [], dict[str, int]()
    for node in calls(graph):
        if node.target is WAIT:
            if not is_collective(_collective(node)):
                raise PassError(f"{node.name} ({location(node)}) waits for {node.args[0]}, which is no collective.")
            continue
        after = {_collective(n).name for n in before[node] if n.op == "call_function"}
        reads = {name for n in node.all_input_nodes if (name := _buffer(n))}
        made = _buffer(node)
        if made and made not in reads:
            buffers[made] = _bytes(node, sizes)
        writes = (made,) if made and made not in reads else ()
        stream: Stream = "collective" if is_collective(node) else "compute"
        tasks.append(
            Task(
                node.name,
                stream,
                seconds(node),
                tuple(sorted(reads)),
                writes,
                tuple(sorted(after)),
                where=location(node),
            )
        )
    output = next(node for node in graph.nodes if node.op == "output")
    results = frozenset(name for n in output.all_input_nodes if (name := _buffer(n)))
    return TaskGraph(tuple(tasks), buffers, results)


def _collective(node: Node) -> Node:
    """What a wait waits for; any other node itself."""
    if node.target is not WAIT:
        return node
    source = node.args[0]
    assert isinstance(source, Node)
    return source


def _buffer(node: Node) -> str | None:
    """The name of the storage of a call's tensor; None for inputs, sizes and tuples (their items have storages)."""
    base = base_of(_collective(base_of(node)))
    if base.op != "call_function" or not isinstance(base.meta.get("val"), torch.Tensor):
        return None
    return f"%{base.name}"


def _bytes(node: Node, sizes: Mapping[str, int]) -> int:
    value: Any = node.meta["val"]
    total = value.element_size()
    for size in value.shape:
        if isinstance(size, torch.SymInt):
            expr = size.node.expr
            if unknown := sorted(str(s) for s in expr.free_symbols if str(s) not in sizes):
                raise PassError(f"{node.name} ({location(node)}) has a size of {unknown[0]}, which has no value.")
            size = int(expr.subs({s: sizes[str(s)] for s in expr.free_symbols}))
        total *= size
    return int(total)


def place(graph: Graph, schedule: Schedule) -> None:
    """Put the nodes of a graph in the order of a schedule of its tasks."""
    nodes = {node.name: node for node in calls(graph)}
    waits = {_collective(node).name: node for node in nodes.values() if node.target is WAIT}
    placed: list[Node] = []
    done: set[Node] = set()

    def put(node: Node) -> None:
        for wait in (n for n in node.all_input_nodes if n.target is WAIT):
            put(wait)  # of a collective that another one reads
        if node not in done:
            done.add(node)
            placed.append(node)

    for action, name in schedule.issues:
        if action != "wait":
            put(nodes[name])
        elif name in waits:
            put(waits[name])
    output = next(node for node in graph.nodes if node.op == "output")
    for node in placed:
        output.prepend(node)


def node_seconds(fast: float, slow: float, collective: float) -> Seconds:
    """A cost model without a target: products and fused operators `slow`, other calls `fast`, views nothing."""

    def seconds(node: Node) -> float:
        if is_collective(node):
            return collective
        if not isinstance(node.target, torch._ops.OpOverload) or base_of(node) is not node:
            return 0.0
        heavy = node.target.namespace == "atom" or "linear" in str(node.target) or "mm" in str(node.target)
        return slow if heavy else fast

    return seconds
